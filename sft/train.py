"""One run, top to bottom: config, model, data, trainer, train, save."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import environment
from sft.checks import check
from sft.cli import Command
from sft.config import Config, fill_names, streamed_samples
from sft.errors import MergeError, RunError, Stopped
from sft.signals import Signals, end_with_launcher

if TYPE_CHECKING:
    from collections.abc import Callable

    from sft.data.prepare import Prepared
    from sft.run import Run
    from sft.trainer import Trainer

logger = logging.getLogger("sft")


def train(config: Config) -> dict[str, Any] | None:
    """Train one run, and merge its adapter where that is asked for.

    Returns:
        On rank 0, the run's folder and what its run.json says at the end; what ``--json`` prints.

    Raises:
        SftError: With what is wrong and how to mend it.
    """
    folder = fit(config)
    if os.environ.get("RANK", "0") != "0":
        return None
    if config.train.merge:
        merge(folder)
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {"run": str(folder), **{key: record[key] for key in ("status", "seconds", "final")}}


def fit(config: Config) -> Path:
    """Train, evaluate and save one run; refuses before any weight loads.

    Returns:
        The run's folder.

    Raises:
        SftError: With what is wrong and how to mend it.
    """
    from sft.data import artefact
    from sft.run import Run

    end_with_launcher()
    fill_names(config)
    config.template = artefact.template_of(config.dataset.path) or config.template
    run = Run(config)
    resume_from = run.resume_point()
    with environment.prepared(distributed=config.zero.config is not None):
        fit_in(run, config, resume_from)
    return run.dir


def fit_in(run: Run, config: Config, resume_from: Path | None) -> None:
    """Do what ``fit`` does once the libraries may be imported."""
    from sft import adapter, build, memory, model, resume, summary, zero
    from sft.data.prepare import prepare
    from sft.data.template import Template
    from sft.fast import half, head, linear
    from sft.fast import lora as fast_lora
    from sft.ranks import from_rank_zero, gather

    tokenizer = model.load_tokenizer(config.model)
    architecture = model.load_architecture(config.model)
    begun = {} if config.overwrite else run.record().get("identity", {})
    width = architecture.config.get_text_config().hidden_size
    chosen = model.Precision(
        *from_rank_zero(lambda: model.choose_precision(config.precision, begun, width))
    )
    precision = chosen.name
    logger.info("precision %s: %s", precision, chosen.reason)
    half.widen_products(model.dtype_of(precision), chosen.products)
    ds_config = zero.read(config.zero)
    stage = zero.stage(ds_config)
    lora = None
    if config.lora.enabled:
        lora = adapter.lora_config(config.lora, architecture, stage)
    if ds_config is not None and stage == 3:
        ranks = [lora.r, *lora.rank_pattern.values()] if lora else [0]
        ds_config = zero.sized(ds_config, architecture, max(ranks))

    template = Template(config.template, tokenizer, config.dataset.format)
    prepared = prepare(config.dataset, template, config.seed, streamed_samples(config))
    model.check_fits(architecture, tokenizer, prepared.parts.values())
    if os.environ.get("RANK", "0") == "0":
        found = resume.identity(config.model, prepared)
        run.identify({**found, **chosen.identity()})
    collator, kernel = build.make_collator(config, architecture, precision, tokenizer, prepared)
    layers, reason = linear.choose(config, architecture, precision, stage)
    logger.info("frozen layers %s: %s", layers, reason)
    recomputes, reason = memory.choose_checkpointing(
        config,
        architecture,
        prepared.train.counts.longest,
        model.dtype_of(precision).itemsize,
        stage,
        keeps_scores=kernel == "eager" or not architecture._supports_sdpa,
        taken=linear.extra_bytes(architecture) if layers == "packed" else 0,
    )
    logger.info("activations are %s: %s", "recomputed" if recomputes else "kept", reason)

    # In this order: a model loaded after SFTConfig is partitioned by ZeRO-3 as it loads, and on a
    # CPU only if the process group exists by then.
    evaluates = prepared.eval is not None
    args = build.sft_config(config, precision, ds_config, recomputes, evaluates)
    try:
        lm_head, reason = head.choose(config.model.lm_head, architecture, args)
        logger.info("LM head %s: %s", lm_head, reason)
        if len(set(gather(resume_from))) > 1:
            raise RunError(
                f"not all ranks see the same checkpoints in {run.dir}\n"
                "    fix: output_dir=FOLDER on a file system that all nodes share"
            )
        if any(gather(recomputes)) and not recomputes:
            # Under ZeRO-3, ranks that pass the layers in different orders would wait for ever.
            logger.info("activations are recomputed: another rank has too little memory")
            args = build.sft_config(config, precision, ds_config, True, evaluates)
        base = model.load_base(config, architecture.config, precision, kernel)
        trainer = build.make_trainer(base, args, prepared, collator, tokenizer, lora)
        trainer.use_head(lm_head)
        if layers == "packed":
            linear.install(trainer.model)
        if stage != 3 and not args.torch_compile:
            fast_lora.install(trainer.model)
        summary.describe_run(config, trainer, prepared, tokenizer)
        with Signals() as signals:
            start(run, trainer, prepared, template.stop_id(), resume_from, signals)
            final = finish_training(trainer, config, template.stop_id(), resume_from)
            save(run, trainer, config, final)
    except BaseException as error:
        if args.process_index == 0:
            status = "stopped" if isinstance(error, Stopped) else "failed"
            run.end(status, f"{type(error).__name__}: {error}")
        if environment.lost_a_rank(error):
            raise RunError(
                "contact with another rank was lost: it died, or its machine did\n"
                "    fix: see what the other ranks say; the same command again resumes"
            ) from error
        raise
    finally:
        environment.end_process_group()
        run.release()


def merge(folder: Path) -> None:
    """Merge in a process of its own, with all the memory; other ranks have ended, and none waits.

    Raises:
        MergeError: It failed, and has said why; the run itself is finished.
    """
    from sft.trial import environment as outside_of_ranks

    command = [sys.executable, "-m", "sft.merge", f"run={folder}"]
    if subprocess.run(command, env=outside_of_ranks(), check=False).returncode:
        raise MergeError(
            f"{folder} is trained, its adapter was not merged\n    fix: see what was said above, "
            f"then: python -m sft.merge run={folder}"
        )


def start(
    run: Run,
    trainer: Trainer,
    prepared: Prepared,
    stop_id: int | None,
    resume_from: Any,
    signals: Signals,
) -> None:
    """Take the folder, begin the logs, and arrange what comes before the first step."""
    from sft import callbacks
    from sft.fast import proof
    from sft.guard import Guard
    from sft.merge import probes

    if trainer.args.process_index == 0:
        run.claim()
        run.keep_audit(prepared.folder)
        probes.keep(prepared, run.dir / probes.FILE)
    trainer.accelerator.wait_for_everyone()
    run.log_to_file(trainer.args.process_index)
    trainer.on_nan = run.config.train.on_nan
    callbacks.watch(trainer, run.dir / "metrics.jsonl")
    trainer.guard = Guard(trainer, signals, run.config.train.max_loss_jump)
    trainer.add_callback(trainer.guard)
    trainer.args.eval_on_start &= resume_from is None

    def before_training(action: Callable[[], object], on_resume: bool = True) -> None:
        trainer.add_callback(callbacks.BeforeTraining(action, on_resume))

    before_training(trainer.resume_counts)
    if trainer.lm_head != "plain":
        before_training(lambda: proof.check_head(trainer))
    packed = "seq_lengths" in prepared.train.dataset.column_names
    if packed or trainer.data_collator.padding_free:
        may_pad = run.config.train.padding_free == "auto" and not packed
        before_training(lambda: proof.prove_isolation(trainer, may_pad))
    count = run.config.dataset.exact_match
    if count:
        before_training(lambda: log_answers(trainer, count, stop_id), on_resume=False)
    if resume_from is not None and trainer.eval_dataset is not None:
        before_training(trainer.evaluate_if_due)


def log_answers(trainer: Trainer, count: int, stop_id: int | None) -> dict[str, float]:
    """Answer held-out prompts and log how many are exactly right."""
    from sft.answers import exact_match

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
    """Train to the end; give the last evaluation and the share of exact answers."""
    trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
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
    """Write the adapter, or the model where all of it was trained, and the finished flag last."""
    from sft.inference import card_of, write_card
    from sft.ranks import gather
    from sft.trainer import share_of_state

    kind = "adapter" if config.lora.enabled else "model"
    folder = run.dir / kind
    trainer.write_model(folder)
    memory = gather(share_of_state(trainer))
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
