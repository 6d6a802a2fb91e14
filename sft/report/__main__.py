"""Write one page of a run or of several, and replay runs into a tracker: ``sft report DIR…``."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import html
from sft.cli.command import Command
from sft.config import packages
from sft.config.rules import rule_problems, setting
from sft.errors import Problem, RunError
from sft.files import write_text
from sft.report import folder, page, places
from sft.run import record
from sft.watch.trackers import replay

logger = logging.getLogger("sft")


@dataclass
class ReportConfig:
    """Which runs are shown, and where."""

    runs: list[str] = setting(
        [], "the folders of the runs; the word runs= may be left out: sft report DIR DIR"
    )
    output: str | None = setting(
        None,
        "the page; null: report.html in the run's folder, or in this folder for several runs",
        path="written",
    )
    tracker: Any = setting(
        None,
        "replay the figures into tensorboard, wandb, mlflow or trackio, or several: [wandb,mlflow]",
    )
    overwrite: bool = setting(False, "true: replace a file in output= that is not such a page")


def trackers(config: ReportConfig) -> list[str]:
    """List the trackers that are asked for."""
    given = config.tracker if isinstance(config.tracker, list) else [config.tracker]
    return [] if config.tracker is None else [str(name) for name in given]


def check(config: ReportConfig) -> list[Problem]:
    """Check the settings without reading any run."""
    problems = list(rule_problems(config))
    if not config.runs:
        problems.append(Problem("runs=[]", "a run's folder is needed", "sft report outputs/NAME"))
    if config.output == "":
        problems.append(Problem("output=", "must not be empty", "output=FILE.html"))
    for name in trackers(config):
        problems += packages.tracker_problems(name)
    return problems


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the page, and replay the runs into trackers.

    Returns:
        The path of the page, and for each run where its trackers show it, for ``--json``.

    Raises:
        RunError: A folder is not that of a run, a tracker did not get everything, or the page
            cannot be written.
    """
    paths = [Path(run).expanduser() for run in config.runs]
    for path in paths:
        places.require(path)
    names = trackers(config)
    where = [replay(path, names) for path in paths] if names else []
    found = [folder.read(path) for path in paths]
    default = paths[0] / record.REPORT if len(paths) == 1 else Path(record.REPORT)
    output = Path(config.output) if config.output else default
    _write(output, page.page(found), config.overwrite)
    logger.info("page written to %s", output)
    return {"page": str(output), "runs": [str(path) for path in paths], "trackers": where}


def _write(output: Path, text: str, overwrite: bool) -> None:
    """Write the page.

    Raises:
        RunError: A file that sft has not written is there, or the page cannot be written.
    """
    try:
        if output.exists() and not overwrite:
            with output.open(encoding="utf-8", errors="replace") as file:
                if html.GENERATOR not in file.read(4096):
                    raise RunError(f"{output} is not a page of sft\n    fix: overwrite=true")
        write_text(output, text)
    except OSError as error:
        raise RunError(
            f"{output} cannot be written: {error.strerror}\n"
            "    fix: output=FILE.html in a folder that you may write to"
        ) from error


main = Command(
    name="report",
    schema=ReportConfig,
    run=report,
    check=check,
    takes="runs",
    summary="write the page of a run or of several; replay runs into trackers",
    examples=(
        "sft report outputs/opt-125m_alpaca_r8_seed42",
        "sft report outputs/first outputs/second output=both.html",
        "sft report outputs/opt-125m_alpaca_r8_seed42 tracker=wandb",
    ),
)

if __name__ == "__main__":
    main()
