"""Trains to the last step: the checks before the first one, the evaluations, and the result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import progress
from sft.config import zero
from sft.config.evaluation import ANSWERED, RESULT, is_evaluation
from sft.fast import isolation, proof
from sft.fast.probe import Probe
from sft.inference.exact_match import exact_match
from sft.model.precision import dtype_of
from sft.run import record
from sft.training import forgetting, left_out
from sft.training.best import Best
from sft.training.cadence import WithinEpochs
from sft.training.guard import Guard
from sft.training.signals import Signals
from sft.watch import callbacks
from sft.watch.alerts import Alerts
from sft.watch.machine import Disk, Stall

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
    limits = settings.max_loss_jump, settings.on_nan
    trainer.guard = Guard(trainer.args, signals, trainer.rows_of, *limits, add_alerts(run, trainer))
    trainer.best = Best(settings)
    trainer.within_epochs = WithinEpochs(settings, prepared.train.counts.samples)
    trainer.add_callback(trainer.within_epochs)
    trainer.add_callback(trainer.guard)  # the last: on a signal, no evaluation starts
    trainer.args.eval_on_start &= resume_from is None

    def before_training(action: Callable[[], object]) -> None:
        trainer.add_callback(callbacks.BeforeTraining(action))

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
    if (count := run.config.dataset.exact_match) and settings.metric == ANSWERED:
        trainer.answers = lambda: answered(trainer, count, stop_ids)
    before_training(lambda: measure_start(run, trainer, stop_ids))
    if resume_from is not None and trainer.held_out:
        before_training(trainer.resume_evaluations)


def measure_start(run: Run, trainer: Trainer, stop_ids: Sequence[int]) -> None:
    """Measure the model as it is before the first step: exact answers, loss on general text."""
    count = run.config.dataset.exact_match
    if count and trainer.answers is None and trainer.state.global_step == 0:
        log_answers(trainer, count, stop_ids)
    forgetting.measure_base(run, trainer)


def add_alerts(run: Run, trainer: Trainer) -> Alerts:
    """Add the alerts, and on rank 0 those about the machine."""
    main = trainer.args.process_index == 0
    file = run.dir / record.ALERTS if main else None
    alerts = Alerts(run.config.alert, file, run.config.on_alert)
    trainer.add_callback(alerts)
    if main:
        trainer.add_callback(Stall(alerts))
        trainer.add_callback(Disk(alerts, run.dir))
    return alerts


def answered(trainer: Trainer, count: int, stop_ids: Sequence[int]) -> dict[str, float]:
    """Generate answers to held-out prompts, and return the share that is exactly right."""
    samples = trainer.eval_dataset.select(range(min(count, len(trainer.eval_dataset))))
    return exact_match(
        trainer.bare_model,
        trainer.processing_class,
        samples,
        trainer.args.per_device_eval_batch_size,
        trainer.args.device,
        stop_ids,
    )


def log_answers(trainer: Trainer, count: int, stop_ids: Sequence[int]) -> dict[str, float]:
    """Log what ``answered`` returns."""
    metrics = answered(trainer, count, stop_ids)
    trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def train(
    trainer: Trainer, config: Config, stop_ids: Sequence[int], resume_from: Path | None
) -> dict[str, Any]:
    """Train to the last step, or to an early stop.

    Returns:
        For ``run.json``: the steps, the last loss, and the evaluation of the weights that the run
        writes.
    """
    try:
        trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
    finally:
        progress.close_all()  # an error, or a signal, does not end the callbacks of the bar
        trainer.end_workers()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, Stall):
                callback.close()
    state = trainer.state
    assert state.global_step >= state.max_steps or trainer.stopped_early
    losses = [log["loss"] for log in state.log_history if "loss" in log]
    final: dict[str, Any] = {"steps": state.global_step, "loss": losses[-1] if losses else None}
    if trainer.guard and trainer.guard.skipped:
        final["skipped_steps"] = trainer.guard.skipped
    if trainer.stopped_early:
        final["stopped_early"] = trainer.stopped_early
    step = state.global_step if trainer.written is None else trainer.written
    if trainer.written is not None:
        final["written_step"] = step
    if trainer.held_out:
        evaluated = [log for log in state.log_history if is_evaluation(log)]
        last = next((log for log in reversed(evaluated) if log["step"] == step), None)
        last = last or trainer.evaluate()
        final |= {key: last[key] for key in last if RESULT.fullmatch(key) or ANSWERED in key}
    if (count := config.dataset.exact_match) and trainer.answers is None:
        log = log_answers if step == state.global_step else answered  # a record is of its own step
        final |= log(trainer, count, stop_ids)
    return final
