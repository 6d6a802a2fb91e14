"""Trains to the last step: the checks before the first one, the evaluations, and the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.config import zero
from sft.fast import isolation, proof
from sft.fast.probe import Probe
from sft.inference.exact_match import exact_match
from sft.model.precision import dtype_of
from sft.training import forgetting, left_out
from sft.training.cadence import WithinEpochs
from sft.training.guard import Guard
from sft.training.signals import Signals
from sft.watch import callbacks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sft.config.settings import Config
    from sft.data.prepared import Prepared
    from sft.run.run import Run
    from sft.training.trainer import Trainer


def add_checks(
    run: Run,
    trainer: Trainer,
    prepared: Prepared,
    stop_ids: Sequence[int],
    resume_from: Path | None,
    signals: Signals,
) -> None:
    """Add the guard, and what must be checked, evaluated or measured before the first step."""
    settings = run.config.train
    trainer.guard = Guard(
        trainer.args, signals, trainer.rows_of, settings.max_loss_jump, settings.on_nan
    )
    trainer.within_epochs = WithinEpochs(settings, prepared.train.counts.samples)
    trainer.add_callback(trainer.within_epochs)
    trainer.add_callback(trainer.guard)  # the last: on a signal, no evaluation starts
    trainer.args.eval_on_start &= resume_from is None

    def before_training(action: Callable[[], object]) -> None:
        trainer.add_callback(callbacks.BeforeTraining(action, on_resume=True))

    device, vocabulary = trainer.args.device, len(trainer.processing_class)
    mixed = trainer.accelerator.mixed_precision
    packed = "seq_lengths" in prepared.train.dataset.column_names
    per_device = settings.per_device_train_batch_size, settings.per_device_eval_batch_size

    def check_head() -> None:
        if plain := proof.prove_head(trainer.model_wrapped, device, vocabulary, mixed):
            trainer.use_head(plain.value)
            run.correct(plain)

    def probe() -> Probe:
        return Probe(
            trainer.model_wrapped,
            trainer.data_collator,
            device,
            vocabulary,
            dtype_of("fp32" if mixed == "no" else mixed),
            prepared.train.counts.longest,
        )

    def check_isolation() -> None:
        may_pad = settings.padding_free == "auto" and not packed
        if padded := isolation.prove_isolation(probe(), may_pad):
            run.correct(padded)
            isolation.require_rows(probe(), max(per_device) > 1)

    before_training(trainer.resume_counts)
    if zero.stage(trainer.args.deepspeed) == 3:
        before_training(lambda: left_out.require_reached(trainer, prepared))
    if trainer.lm_head != "plain":
        before_training(check_head)
    batched = max(per_device) > 1 and not (packed or trainer.data_collator.padding_free)
    before_training(lambda: isolation.require_rows(probe(), batched))
    if packed or trainer.data_collator.padding_free:
        before_training(check_isolation)
    before_training(lambda: measure_start(run, trainer, stop_ids))
    if resume_from is not None and trainer.eval_dataset is not None:
        before_training(trainer.evaluate_if_due)


def measure_start(run: Run, trainer: Trainer, stop_ids: Sequence[int]) -> None:
    """Measure the model as it is before the first step: exact answers, loss on general text."""
    if run.config.dataset.exact_match and trainer.state.global_step == 0:
        log_answers(trainer, run.config.dataset.exact_match, stop_ids)
    forgetting.measure_base(run, trainer)


def log_answers(trainer: Trainer, count: int, stop_ids: Sequence[int]) -> dict[str, float]:
    """Generate answers to held-out prompts, and log the share that is exactly right."""
    samples = trainer.eval_dataset.select(range(min(count, len(trainer.eval_dataset))))
    metrics = exact_match(
        trainer.bare_model,
        trainer.processing_class,
        samples,
        trainer.args.per_device_eval_batch_size,
        trainer.args.device,
        stop_ids,
    )
    trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def train(
    trainer: Trainer, config: Config, stop_ids: Sequence[int], resume_from: Path | None
) -> dict[str, Any]:
    """Train to the last step; return the last evaluation and the share of exact answers."""
    try:
        trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    finally:
        trainer.end_workers()
    state = trainer.state
    assert state.global_step >= state.max_steps
    losses = [log["loss"] for log in state.log_history if "loss" in log]
    final: dict[str, Any] = {"steps": state.global_step, "loss": losses[-1] if losses else None}
    if trainer.guard and trainer.guard.skipped:
        final["skipped_steps"] = trainer.guard.skipped
    if trainer.eval_dataset is not None:
        evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
        done = evaluated and evaluated[-1]["step"] == trainer.state.global_step
        last = evaluated[-1] if done else trainer.evaluate()
        final |= {key: last[key] for key in ("eval_loss", "eval_perplexity")}
    if config.dataset.exact_match:
        final |= log_answers(trainer, config.dataset.exact_match, stop_ids)
    return final
