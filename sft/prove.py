"""Proof, with a user's own settings, that an interrupted and resumed run is the same run."""

from __future__ import annotations

import logging
import math
import sys
import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sft import child, environment
from sft.cli.command import Command
from sft.config.checks import check
from sft.config.rules import at_least, setting
from sft.config.settings import Config, fill_names, streamed_samples
from sft.errors import Problem, RunError
from sft.run.outcome import cut_back, differences, outcome

# Settings that the proof decides itself: the user's values are not passed to the runs.
OWN = {
    *("steps", "ranks", "output_dir", "overwrite", "resume.checkpoint", "resume.allow"),
    *("train.max_steps", "train.save_strategy", "train.save_steps", "train.logging_steps"),
    *("train.save_total_limit", "train.saves_per_epoch", "train.evals_per_epoch"),
    *("dataset.max_rows", "dataset.max_eval_rows", "train.max_forgetting"),
}
EPOCH = 3  # optimizer steps of an epoch, at most, unless dataset.max_rows is set
FOLDER_OPTIONS = ("--config-dir", "-cd")
LONGEST = 50  # optimizer steps; an epoch that is longer is not trained to its end

logger = logging.getLogger("sft")


@dataclass
class ProveConfig(Config):
    """A run's settings, and the number of steps and ranks of the proof."""

    steps: int | None = setting(
        None, "number of optimizer steps; null: two epochs of few rows, plus one step", at_least(2)
    )
    ranks: int | None = setting(
        None, "number of ranks, one process each; null: first one rank, then two", at_least(1)
    )


def check_prove(config: ProveConfig) -> list[Problem]:
    """Check the settings, without the model or the data."""
    problems, train = check(config), config.train
    each = train.per_device_train_batch_size * (config.ranks or 1)
    if not problems and train.global_batch_size % each:
        problems.append(
            Problem(
                f"ranks={config.ranks}",
                f"train.global_batch_size={train.global_batch_size} is not a multiple of "
                f"{train.per_device_train_batch_size} per rank x {config.ranks} ranks",
                f"train.global_batch_size={each}",
            )
        )
    return problems


def prove(config: ProveConfig) -> dict[str, Any]:
    """Prove on one rank and on two that a run with these settings resumes exactly.

    The run is stopped in the middle of a later epoch: stopping in the first epoch would not show
    whether a resumed run restores the order of the rows.

    Returns:
        What was compared, for each number of ranks. ``--json`` prints it.

    Raises:
        RunError: A run failed, or a resumed run differs from the uninterrupted one.
    """
    epoch = _few_rows(config)
    stop, steps = _where(config.steps, epoch)
    if stop < epoch or stop % epoch == 0:
        logger.info(
            "warning: step %s, after which the run is stopped, is not in the middle of a later "
            "epoch: an epoch has %s steps; set a smaller dataset.max_rows for a shorter epoch, or "
            "a larger steps for a longer proof",
            stop,
            epoch,
        )
    ranks = [config.ranks] if config.ranks else _one_and_two(config)
    proofs = [_prove(config, count, stop, steps) for count in ranks]
    return {"same": True, "proofs": proofs}


def _few_rows(config: ProveConfig) -> int:
    """Limit the rows so that an epoch has few steps, unless dataset.max_rows is set.

    Returns:
        The optimizer steps of an epoch.
    """
    fill_names(config)
    environment.prepare()

    from sft.data import artefact
    from sft.data.prepare import prepare
    from sft.data.template import Template
    from sft.model.tokenizer import load_tokenizer

    dataset, batch = config.dataset, config.train.global_batch_size
    tokenizer = load_tokenizer(config.model)
    chosen = artefact.template_of(dataset.path) or config.template
    template = Template(chosen, tokenizer, dataset.format)
    config.train.max_steps = config.steps or 3 * EPOCH  # limits what is read with streaming=true
    if dataset.max_eval_rows is None and not dataset.eval_fraction:
        dataset.max_eval_rows = EPOCH * batch
    given, samples = dataset.max_rows, -1
    dataset.max_rows = given or EPOCH * batch
    while True:
        before = samples
        samples = len(
            prepare(dataset, template, config.seed, streamed_samples(config)).train.dataset
        )
        epoch = math.ceil(samples / batch)
        # Packing makes fewer samples than rows.
        if given or epoch > 1 or samples == before:
            return epoch
        dataset.max_rows *= 4


def _where(steps: int | None, epoch: int) -> tuple[int, int]:
    """Choose the step after which the run is stopped, and the last step."""
    if steps is None:
        steps = 2 * epoch + 1 if 1 < epoch <= LONGEST else 4
    later = [step for step in range(epoch + 1, steps) if step % epoch]
    return min(later, key=lambda step: abs(step - steps / 2), default=steps // 2), steps


def _one_and_two(config: ProveConfig) -> list[int]:
    """List one and two ranks, or say why two are not possible."""
    import torch

    whole, each = config.train.global_batch_size, config.train.per_device_train_batch_size
    if torch.cuda.device_count() == 1:
        reason = "this machine has one GPU"
    elif whole % (2 * each):
        reason = f"two ranks need train.global_batch_size to be a multiple of {2 * each}"
    else:
        return [1, 2]
    logger.info("warning: this is proven on one rank only: %s", reason)
    return [1]


def _prove(config: ProveConfig, ranks: int, stop: int, steps: int) -> dict[str, Any]:
    """Train without interruption, then resume from a middle step in a new process, and compare.

    A killed process leaves nothing but its files. So the finished run is reduced to the files that
    a kill after that step would have left, and the same command is run again.
    """
    with tempfile.TemporaryDirectory(prefix="sft-prove-") as work:
        run = Path(work) / "run"
        command = child.command("sft.train", ranks if ranks > 1 else None)
        command += [*_given(), f"output_dir={run}", f"train.max_steps={steps}"]
        command += ["train.save_strategy=steps", f"train.save_steps={stop}"]
        command += ["train.logging_steps=1", f"train.save_total_limit={steps}"]
        command += ["train.max_forgetting=null"]  # it is not part of what is compared
        limits = {name: getattr(config.dataset, name) for name in ("max_rows", "max_eval_rows")}
        command += [f"dataset.{name}={rows}" for name, rows in limits.items() if rows is not None]
        logger.info("training %s steps without interruption on %s", steps, _counted(ranks))
        straight = _outcome(command, run)
        cut_back(run, stop)
        logger.info("resuming after step %s in a new process", stop)
        resumed = _outcome(command, run)
    if found := differences(straight, resumed):
        raise RunError(
            f"on {_counted(ranks)} the resumed run differs from the uninterrupted one:\n"
            + "\n".join(f"    {line}" for line in found[:10])
            + "\n    fix: please report this with the settings; do not resume runs with these "
            "settings until it is solved"
        )
    logger.info(
        "the resumed run is the same, bit for bit, on %s: losses, learning rates, gradient norms "
        "and evaluations of steps %s to %s, and %s",
        _counted(ranks),
        stop + 1,
        steps,
        ", ".join(straight["files"]),
    )
    return {"ranks": ranks, "steps": steps, "resumed_after": stop, "files": straight["files"]}


def _given() -> list[str]:
    """List the words of this command, and of its settings file, that sft.train takes too."""
    words = [word for word in sys.argv[1:] if word != "--json"]
    folder = next((after for word, after in pairwise(words) if word in FOLDER_OPTIONS), None)
    options = [
        word
        for before, word in pairwise(["", *words])
        if word in FOLDER_OPTIONS or before in FOLDER_OPTIONS
    ]
    settings = main.expanded([word for word in words if word not in options], folder)
    return options + [word for word in settings if word.partition("=")[0].lstrip("+") not in OWN]


def _counted(ranks: int) -> str:
    return f"{ranks} rank{'s' * (ranks > 1)}"


def _outcome(command: list[str], run: Path) -> dict[str, Any]:
    """Train, and read the result."""
    ended = child.run(command, log=run.with_name("log"))
    if ended.exit_code:
        raise RunError(f"a training run of the proof failed: {ended.message}")
    return outcome(run)


main = Command(
    name="prove",
    schema=ProveConfig,
    run=prove,
    check=check_prove,
    config_name="train",
    summary="prove that a run with these settings resumes exactly",
    examples=(
        "python -m sft.prove model=opt-125m dataset=alpaca",
        "python -m sft.prove model=opt-125m dataset=alpaca zero=stage2 ranks=4",
    ),
)

if __name__ == "__main__":
    main()
