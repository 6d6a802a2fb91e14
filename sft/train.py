"""One run, from top to bottom: config, choices, model, data, trainer, training, saving."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import environment, process
from sft.cli.command import Command
from sft.config.checks import check
from sft.config.settings import Config, fill_names, streamed_samples
from sft.errors import MergeError, RunError, Stopped
from sft.training.signals import Signals, end_with_launcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sft.data.prepared import Prepared
    from sft.run.run import Run
    from sft.training.trainer import Trainer

logger = logging.getLogger("sft")


def train(config: Config) -> dict[str, Any] | None:
    """Train one run, and merge its adapter if ``train.merge`` is set.

    Returns:
        On rank 0, the run's folder and the result in its run.json, which ``--json`` prints; None on
        other ranks.

    Raises:
        SftError: The run is refused or has failed; the message includes a fix.
    """
    folder = fit(config)
    if process.rank() != 0:
        return None
    if config.train.merge:
        merge(folder)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {"run": str(folder), **{key: record[key] for key in ("status", "seconds", "final")}}


def fit(config: Config) -> Path:
    """Train, evaluate and save one run. What can be refused is refused before any weight loads.

    Returns:
        The run's folder.

    Raises:
        SftError: The run is refused or has failed; the message includes a fix.
    """
    from sft.data import artefact
    from sft.run.run import Run

    end_with_launcher()
    fill_names(config)
    config.template = artefact.template_of(config.dataset.path) or config.template
    run = Run(config)
    resume_from = run.resume_point()
    with environment.prepared(distributed=config.zero.config is not None):
        fit_in(run, config, resume_from)
    return run.dir


def fit_in(run: Run, config: Config, resume_from: Path | None) -> None:
    """Do the part of ``fit`` that imports torch and the other libraries."""
    from sft.data.prepare import prepare
    from sft.data.template import Template
    from sft.fast import cpu_products
    from sft.model import adapter
    from sft.model import base as model
    from sft.model.precision import dtype_of
    from sft.plan import choices
    from sft.run import resume
    from sft.training import build, summary

    tokenizer = model.load_tokenizer(config.model)
    architecture = model.load_architecture(config.model)
    precision = choices.choose_precision(config, architecture, run.begun_identity())
    lora = adapter.lora_config(config, architecture)
    template = Template(config.template, tokenizer, config.dataset.format)
    prepared = prepare(config.dataset, template, config.seed, streamed_samples(config))
    model.check_fits(architecture, tokenizer, prepared.parts.values())
    chosen = choices.decide(config, architecture, precision, prepared)
    run.identify(chosen, prepared)
    logger.info("%s", "\n".join(chosen.lines()))
    cpu_products.widen_products(dtype_of(precision.value), precision.products)

    # Create SFTConfig before the model loads: only then does ZeRO-3 partition the weights while
    # they load. On a CPU the process group must exist by then too.
    args = build.sft_config(config, chosen)
    with _ending(run):
        resume.require_same_checkpoint(run.dir, resume_from)
        base = model.load_base(config, architecture.config, precision.value, chosen.attention.value)
        collator = build.make_collator(config, chosen, tokenizer)
        trainer = build.make_trainer(base, args, chosen, prepared, collator, tokenizer, lora)
        summary.describe_run(config, trainer, prepared, tokenizer)
        with Signals() as signals:
            start(run, trainer, prepared, template.stop_id(), resume_from, signals)
            final = finish_training(trainer, config, template.stop_id(), resume_from)
            save(run, trainer, config, final)


@contextlib.contextmanager
def _ending(run: Run) -> Iterator[None]:
    """Record why a run ended early; end its process group and release its folder in any case.

    Raises:
        RunError: Another rank died.
    """
    try:
        yield
    except BaseException as error:
        if process.rank() == 0:
            status = "stopped" if isinstance(error, Stopped) else "failed"
            run.end(status, f"{type(error).__name__}: {error}")
        if environment.lost_a_rank(error):
            raise RunError(
                "contact with another rank was lost: the rank or its machine died\n"
                "    fix: read the errors of the other ranks, then give the same command again to "
                "resume"
            ) from error
        raise
    finally:
        environment.end_process_group()
        run.release()


def merge(folder: Path) -> None:
    """Merge in a separate process, after training has freed its memory; no other rank waits for it.

    Raises:
        MergeError: The merge failed and has reported why. The run itself is finished.
    """
    from sft.sweep.trial import environment as outside_of_ranks

    command = [sys.executable, "-m", "sft.merge", f"run={folder}"]
    if subprocess.run(command, env=outside_of_ranks(), check=False).returncode:
        raise MergeError(
            f"the run {folder} is finished, but its adapter could not be merged\n"
            f"    fix: correct the error above, then: python -m sft.merge run={folder}"
        )


def start(
    run: Run,
    trainer: Trainer,
    prepared: Prepared,
    stop_id: int | None,
    resume_from: Any,
    signals: Signals,
) -> None:
    """Claim the run's folder, open the logs, and add the checks that run before the first step."""
    from sft.fast import proof
    from sft.merge import probes
    from sft.training.guard import Guard
    from sft.watch import callbacks

    if trainer.args.process_index == 0:
        run.claim()
        run.keep_audit(prepared.folder)
        probes.keep(prepared, run.dir / probes.FILE)
    trainer.accelerator.wait_for_everyone()
    run.log_to_file(trainer.args.process_index)
    callbacks.watch(trainer, run.dir / "metrics.jsonl")
    settings = run.config.train
    trainer.guard = Guard(
        trainer.args, signals, trainer.rows_of, settings.max_loss_jump, settings.on_nan
    )
    trainer.add_callback(trainer.guard)
    trainer.args.eval_on_start &= resume_from is None

    def before_training(action: Callable[[], object], on_resume: bool = True) -> None:
        trainer.add_callback(callbacks.BeforeTraining(action, on_resume))

    device, vocabulary = trainer.args.device, len(trainer.processing_class)
    packed = "seq_lengths" in prepared.train.dataset.column_names

    def check_head() -> None:
        precision = trainer.accelerator.mixed_precision
        if plain := proof.prove_head(trainer.model_wrapped, device, vocabulary, precision):
            trainer.use_head(plain.value)
            run.correct(plain)

    def check_isolation() -> None:
        may_pad = settings.padding_free == "auto" and not packed
        padded = proof.prove_isolation(
            trainer.model_wrapped, trainer.data_collator, device, vocabulary, may_pad
        )
        if padded:
            run.correct(padded)

    before_training(trainer.resume_counts)
    if trainer.lm_head != "plain":
        before_training(check_head)
    if packed or trainer.data_collator.padding_free:
        before_training(check_isolation)
    count = run.config.dataset.exact_match
    if count:
        before_training(lambda: log_answers(trainer, count, stop_id), on_resume=False)
    if resume_from is not None and trainer.eval_dataset is not None:
        before_training(trainer.evaluate_if_due)


def log_answers(trainer: Trainer, count: int, stop_id: int | None) -> dict[str, float]:
    """Generate answers to held-out prompts, and log the share that is exactly right."""
    from sft.inference.answers import exact_match

    samples = trainer.eval_dataset.select(range(min(count, len(trainer.eval_dataset))))
    metrics = exact_match(
        trainer.bare_model,
        trainer.processing_class,
        samples,
        trainer.args.per_device_eval_batch_size,
        trainer.args.device,
        stop_id,
    )
    trainer.callback_handler.on_log(trainer.args, trainer.state, trainer.control, metrics)
    return metrics


def finish_training(
    trainer: Trainer, config: Config, stop_id: int | None, resume_from: Any
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
        final |= log_answers(trainer, config.dataset.exact_match, stop_id)
    return final


def save(run: Run, trainer: Trainer, config: Config, final: dict[str, Any]) -> None:
    """Write the adapter, or without LoRA the model, and then mark the run as finished."""
    from sft.inference.card import card_of, write_card
    from sft.ranks import gather

    kind = "adapter" if config.lora.enabled else "model"
    folder = run.dir / kind
    trainer.write_model(folder)
    memory = gather(trainer.held_bytes())
    trainer.accelerator.wait_for_everyone()
    if trainer.args.process_index == 0:
        write_card(folder, card_of(config, run.identity))
        run.finish(final, ranks_memory=memory)
        logger.info("%s written to %s", kind, folder)
    trainer.accelerator.wait_for_everyone()


main = Command(
    name="train",
    schema=Config,
    run=train,
    check=check,
    config_name="train",
    summary="fine-tune a causal language model",
    examples=(
        "python -m sft.train",
        "torchrun --nproc_per_node 4 -m sft.train model=opt-125m dataset=alpaca zero=stage2",
        "python -m sft.train -m model=opt-125m lora.r=4,8,16",
    ),
)

if __name__ == "__main__":
    main()
