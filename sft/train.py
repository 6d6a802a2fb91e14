"""One run, from top to bottom: config, choices, model, data, trainer, training, saving."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import child, environment, process
from sft.cli.command import Command
from sft.config import zero
from sft.config.checks import check
from sft.config.settings import Config, fill_names, streamed_samples
from sft.errors import ConfigError, MergeError, Problem
from sft.report import written
from sft.run import closing, record
from sft.training.ending import ending
from sft.training.signals import Signals, end_with_launcher

if TYPE_CHECKING:
    from sft.data.prepared import Prepared
    from sft.run.run import Run
    from sft.training.timed import TimedTrainer

logger = logging.getLogger("sft")


def train(config: Config) -> dict[str, Any] | None:
    """Train one run, and merge its adapter if ``train.merge`` is set.

    Returns:
        On rank 0, the run's folder and the result in its run.json, which ``--json`` prints; None on
        other ranks.

    Raises:
        SftError: The run is refused or has failed; the message includes a fix.
    """
    from sft.watch import trackers

    with trackers.delivered():
        folder = fit(config)
        if process.rank() != 0:
            return None
        if config.train.merge:
            merge(folder, config)
    closing.log(closing.finished(folder))
    found = record.read(folder)
    return {"run": str(folder), **{key: found[key] for key in ("status", "seconds", "final")}}


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
    prepared = artefact.template_of(config.dataset.path)
    config.template = prepared or config.template
    require_files(config, prepared is not None)
    run = Run(config)
    resume_from = run.resume_point()
    if resume_from is None:
        require_start(config)
    with environment.prepared(distributed=zero.read(config.zero) is not None):
        fit_in(run, config, resume_from)
    return run.dir


def require_files(config: Config, prepared: bool) -> None:
    """Check that the model's folder and the data exist, before torch is imported.

    Args:
        config: The run's config.
        prepared: Whether the data is a folder of prepared samples, which has been read.
    """
    from sft.data import sources
    from sft.data.named_template import named_template
    from sft.model.source import source

    source(config.model)
    if config.template.chat_template is not None:
        named_template(config.template.chat_template)
    if not prepared:
        sources.require_paths(config.dataset)


def require_start(config: Config) -> None:
    """Check that the folder of ``lora.init_from`` exists; a resumed run does not read it."""
    from sft.inference.card import ADAPTER_SETTINGS

    folder = config.lora.init_from
    if folder is not None and not (Path(folder) / ADAPTER_SETTINGS).is_file():
        rule = "is not the folder of an adapter"
        fix = f"lora.init_from=FOLDER with {ADAPTER_SETTINGS}"
        raise ConfigError([Problem(f"lora.init_from={folder}", rule, fix)])


def fit_in(run: Run, config: Config, resume_from: Path | None) -> None:
    """Do the part of ``fit`` that imports torch and the other libraries."""
    with environment.importing():
        from sft.data.prepare import prepare
        from sft.data.template import Template
        from sft.fast import cpu_products
        from sft.fast import lora as fast_lora
        from sft.inference.prompts import Prompts
        from sft.inference.stops import stop_at
        from sft.merge import refusals
        from sft.model import adapter, prequantized, tokens, trainable
        from sft.model.base import check_fits, load_architecture, load_base
        from sft.model.precision import dtype_of
        from sft.model.tokenizer import load_tokens
        from sft.plan import choices, schedule
        from sft.run import resume
        from sft.training import build, forgetting, groups, loop, start, summary
        from sft.training.watched import watched

    build.require(config)
    tokenizer, new = load_tokens(config.model)
    architecture = load_architecture(config.model)
    tokens.grow(architecture, new.needed)
    config = prequantized.as_stored(config, architecture.config)
    trainable.freeze_architecture(config.model, architecture, new)
    precision = choices.choose_precision(config, architecture, run.begun_identity())
    lora = adapter.lora_config(config, architecture, new)
    fast_lora.leave_out_unusual(lora, architecture)
    refusals.say_before_training(config, architecture.config, lora)
    start.require(config, lora, architecture, resume_from)
    groups.require(config, architecture, lora)
    template = Template(config.template, tokenizer, config.dataset.format)
    prepared = prepare(config.dataset, template, config.seed, streamed_samples(config))
    check_fits(architecture, tokenizer, prepared.parts.values())
    prompts = Prompts(config, template, prepared, architecture) if config.sample.every else None
    schedule.require(config, prepared.train.counts.samples)
    chosen = choices.decide(config, architecture, precision, prepared, new)
    run.identify(chosen, prepared)
    logger.info("%s", "\n".join(chosen.lines()))
    cpu_products.widen_products(dtype_of(precision.value), precision.products)

    # Create SFTConfig before the model loads: only then does ZeRO-3 partition the weights while
    # they load. On a CPU the process group must exist by then too.
    args = build.sft_config(config, chosen)
    with ending(run):
        resume.require_same_checkpoint(run.dir, resume_from)
        base = load_base(config, architecture.config, precision.value, chosen.attention.value)
        tokens.initialise(base, new)
        stop_at(base.generation_config, tokenizer, template.stop_ids)
        collator = build.make_collator(config, chosen, tokenizer)
        trainer = build.make_trainer(base, args, chosen, prepared, collator, tokenizer, lora)
        trainer.rates = groups.Rates.of(config.train)
        if resume_from is None:
            start.load(config, trainer)
        summary.describe_run(config, trainer, prepared, tokenizer)
        with Signals() as signals:
            claim(run, trainer, prepared)
            with watched(run, trainer, prompts, lambda: written.write(run.dir)):
                loop.add_checks(run, trainer, prepared, template.stop_ids, resume_from, signals)
                final = loop.train(trainer, config, template.stop_ids, resume_from)
                forgetting.measure_trained(run, trainer)
                save(run, trainer, config, final)


def merge(folder: Path, config: Config) -> None:
    """Merge in a separate process, after training has freed its memory; no other rank waits for it.

    Raises:
        MergeError: The merge failed and has reported why. The run itself is finished.
    """
    # The command of the run has asked for the base's code, or it would not have trained.
    consent = ["trust_remote_code=true"] if config.model.trust_remote_code else []
    if child.run([*child.command("sft.merge"), f"run={folder}", *consent]).exit_code:
        raise MergeError(
            f"the run {folder} is finished, but its adapter could not be merged\n"
            "    fix: correct the error above, then: "
            + " ".join((f"python -m sft.merge run={folder}", *consent))
        )


def claim(run: Run, trainer: TimedTrainer, prepared: Prepared) -> None:
    """Claim the run's folder, now that nothing can be refused any more, and open the logs."""
    from sft.merge import probes

    if trainer.args.process_index == 0:
        run.claim()
        trainer.fingerprint = run.fingerprint
        run.keep_audit(prepared.folder)
        probes.keep(prepared, run.dir / probes.FILE)
    trainer.accelerator.wait_for_everyone()
    run.log_to_file(trainer.args.process_index)


def save(run: Run, trainer: TimedTrainer, config: Config, final: dict[str, Any]) -> None:
    """Write the adapter, or without LoRA the model, and then mark the run as finished."""
    from sft.inference.card import card_of, write_card
    from sft.ranks import gather
    from sft.training import summary

    kind = record.ADAPTER if config.lora.enabled else record.MODEL
    folder = run.dir / kind
    trainer.write_model(folder)
    memory = gather(trainer.held_bytes())
    _, parameters = summary.parameter_counts(trainer.model)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.process_index == 0:
        write_card(folder, card_of(config, run.identity))
        operations = trainer.figures.facts(parameters)
        run.finish(final=final, ranks_memory=memory, operations=operations, **trainer.outcome())
        trainer.drop_checkpoints()
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
