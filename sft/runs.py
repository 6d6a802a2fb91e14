"""List runs in a table: their status, what differs among them, and how well they did."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.cli.command import Command
from sft.config.rules import rule_problems, setting
from sft.errors import Problem
from sft.report import folder, places

logger = logging.getLogger("sft")


@dataclass
class RunsConfig:
    """Which runs are listed, and in which order."""

    dirs: list[str] = setting(
        [],
        "folders with runs, up to three levels deep; dirs= may be left out; []: outputs",
    )


def check(config: RunsConfig) -> list[Problem]:
    """Check the settings."""
    return list(rule_problems(config))


def runs(config: RunsConfig) -> dict[str, Any]:
    """Print the table.

    Returns:
        A list of the runs, for ``--json``.
    """
    found = [
        folder.read(path)
        for where in config.dirs or ["outputs"]
        for path in places.runs_in(Path(where))
    ]
    for run in found:
        logger.info("%s  %s", run.name, run.status)
    return {"runs": [{"name": run.name, "status": run.status} for run in found]}


main = Command(
    name="runs",
    schema=RunsConfig,
    run=runs,
    check=check,
    takes="dirs",
    summary="list runs in a table: status, what differs, evaluation, speed, age",
    examples=("sft runs", "sft runs outputs/sweeps"),
)

if __name__ == "__main__":
    main()
