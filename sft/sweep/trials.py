"""The trials of a sweep, one torchrun after the other, and the table that compares them."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft import child, process
from sft.errors import ConfigError, Problem, RunError
from sft.files import write_text
from sft.run import record
from sft.sweep.trial import Trial

logger = logging.getLogger("sft")


def sweep_name(overrides: Sequence[str]) -> str:
    """Name a sweep after its command, so that the same command finds its finished trials."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides(list(overrides))
    # Swept settings come first, because a long name is cut at its end.
    parsed.sort(key=lambda override: not override.is_sweep_override())
    return file_name("+".join(str(item.input_line).lstrip("+") for item in parsed), limit=60)


def file_name(text: str, limit: int = 100) -> str:
    """Make a name that every file system accepts; a hash replaces the characters removed."""
    name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "-", text).strip("-.")
    if name == text and 0 < len(name) <= limit:
        return name
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return "-".join(filter(None, [name[: limit - 9].rstrip("-.,+"), digest]))


def ranks(asked: int | None, environ: Mapping[str, str] = os.environ) -> int:
    """Return the ranks of a trial: ``asked``, or as many as torchrun started here, or 1."""
    return process.local_world_size(environ) if asked is None else asked


def plan(
    jobs: Sequence[list[str]],
    configs: Sequence[Any],
    asked: list[str],
    sweep_dir: Path,
    nproc_per_node: int,
    config_dirs: Sequence[str],
) -> list[Trial]:
    """Build the trials with their commands, folders and log files.

    Args:
        jobs: Each trial's overrides, as Hydra's sweeper expanded them.
        configs: Each trial's composed settings.
        asked: The command line's overrides, not expanded.
        sweep_dir: The sweep's folder.
        nproc_per_node: Ranks of each trial.
        config_dirs: The folder given as ``--config-dir``, if any.

    Raises:
        ConfigError: The trials would have no rank, or share a folder or a name.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString

    parsed = OverridesParser.create().parse_overrides(asked)
    fixed = {item.key_or_group: item for item in parsed if not item.is_sweep_override()}
    problems = []
    if nproc_per_node < 1:
        setting = f"hydra.launcher.nproc_per_node={nproc_per_node}"
        problems.append(Problem(setting, "must be at least 1", "hydra.launcher.nproc_per_node=1"))
    for key, rule, fix in (
        ("output_dir", "trials would write to this one folder", " hydra.sweep.dir={}"),
        ("run_name", "trials would have this one name", ""),
    ):
        for value, count in Counter(config.get(key) for config in configs).items():
            if value is not None and count > 1:
                other = f"{key}=null{fix.format(value)}"
                problems.append(Problem(f"{key}={value}", f"{count} {rule}", other))
    if problems:
        raise ConfigError(problems)
    train = child.command("sft.train", nproc_per_node)
    for config_dir in config_dirs:
        train += ["--config-dir", config_dir]
    trials = []
    for job, config in zip(jobs, configs, strict=True):
        plain = [override.lstrip("+") for override in job]
        swept = [override for override in plain if override.split("=", 1)[0] not in fixed]
        path = str(sweep_dir / (file_name(",".join(swept)) if swept else "trial"))
        command = [*train, *job]
        if config["output_dir"] is None:
            command.append(f"output_dir={QuotedString(path, Quote.single).with_quotes()}")
        output_dir = config["output_dir"] or path
        trials.append(Trial(command, config, swept, output_dir, f"{path}.log"))
    return trials


def run(trials: Sequence[Trial], sweep_dir: Path) -> int:
    """Train one trial after the other, and print their table.

    Returns:
        The exit code: 0, 1 if a trial failed, 130 if the user interrupted.

    Raises:
        RunError: The folder of the sweep cannot be written to.
    """
    exit_code = 0
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the folder of the sweep cannot be made: {error}\n    fix: hydra.sweep.dir=FOLDER"
        ) from error
    count = "1 trial" if len(trials) == 1 else f"{len(trials)} trials"
    logger.info("%s; the output of each is in %s/TRIAL.log", count, sweep_dir)
    try:
        with child.signals_as_interrupt():
            _save(trials, sweep_dir)  # trackers of the first trial find the sweep by this file
            for number, trial in enumerate(trials, 1):
                _train(trial, f"trial {number}/{len(trials)}  {trial}")
                _save(trials, sweep_dir)
                exit_code = exit_code or int(trial.status != "finished")
    except KeyboardInterrupt:
        exit_code = 130
        _save(trials, sweep_dir)
    _show(trials, sweep_dir)
    return exit_code


def all_failed(trials: Sequence[Trial]) -> str:
    """Return the error of a sweep none of whose trials finished; "" if one did, or was not run."""
    if not all(trial.status == "failed" for trial in trials):
        return ""
    first = trials[0]
    fix = f"correct what {first.log} shows, then give the same command again"
    advice = "" if "fix: " in first.message else f"\n    fix: {fix}"
    return (
        f"no trial of the sweep finished; the first one, {first}, whose output is in {first.log}, "
        f"failed: {first.message}{advice}"
    )


def _train(trial: Trial, title: str) -> None:
    trial.wait(title)
    if trial.take_over():
        logger.info("%s  finished before%s", title, _loss(trial))
        return
    logger.info("%s  started", title)
    trial.train()
    if trial.status == "finished":
        logger.info("%s  finished in %s%s", title, _duration(trial), _loss(trial))
    else:
        logger.info("%s  failed after %s", title, _duration(trial))
        logger.info("%s", textwrap.indent(trial.message, "    "))


def _save(trials: Sequence[Trial], sweep_dir: Path) -> None:
    """Write sweep.json atomically: it is complete whenever it is read or the sweep is killed."""
    write_text(sweep_dir / record.SWEEP, json.dumps(records(trials), indent=2) + "\n")


def records(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return the records of all trials, for sweep.json and ``--json``."""
    return [
        {key: value for key, value in vars(trial).items() if key not in ("command", "config")}
        for trial in trials
    ]


def _show(trials: Sequence[Trial], sweep_dir: Path) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    losses = {index: _eval_loss(trial) for index, trial in enumerate(trials)}
    several = sum(map(math.isfinite, losses.values())) > 1
    best = min(losses, key=losses.__getitem__) if several else None
    accuracy = any(trial.final.get("exact_match") is not None for trial in trials)
    table = Table(title=Text(str(sweep_dir)), title_justify="left")
    for name in (
        "trial",
        "overrides",
        "status",
        "eval loss",
        *["exact match"] * accuracy,
        "time",
        "",
    ):
        table.add_column(name, overflow="fold")
    for index, trial in enumerate(trials):
        loss, share = losses[index], trial.final.get("exact_match")
        note = textwrap.shorten(trial.message, 120, placeholder=" ...")
        cells = [str(index + 1), str(trial), trial.status]
        cells.append(f"{loss:.4f}" if math.isfinite(loss) else "")
        if accuracy:
            cells.append("" if share is None else f"{share:.1%}")
        cells += [_duration(trial), ", ".join(filter(None, ["best" * (index == best), note]))]
        # rich would read [q_proj] in a plain string as a mark-up tag.
        table.add_row(*map(Text, cells), style="bold" if index == best else None)
    # For a pipe, which has no width, rich would fold the overrides at 80 columns.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    logger.info("summary: %s/sweep.json", sweep_dir)


def _eval_loss(trial: Trial) -> float:
    loss = trial.final.get("eval_loss")
    return math.inf if loss is None or math.isnan(loss) else float(loss)


def _loss(trial: Trial) -> str:
    loss = _eval_loss(trial)
    return f", eval loss {loss:.4f}" if math.isfinite(loss) else ""


def _duration(trial: Trial) -> str:
    """Format seconds with a fitting unit: 4.2 s, 12 min, 3.5 h."""
    seconds = trial.seconds
    if seconds is None:
        return ""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
