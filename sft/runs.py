"""List runs in a table: their status, what differs among them, and how well they did."""

from __future__ import annotations

import collections
import logging
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import html
from sft.cli.command import Command
from sft.config.rules import one_of, rule_problems, setting
from sft.config.upstream import closest
from sft.errors import Problem, RunError
from sft.report import folder, places
from sft.report.folder import Folder
from sft.report.words import age_of, hidden, rounded

logger = logging.getLogger("sft")

STATUSES = ("finished", "stopped", "failed", "running", folder.KILLED, "unknown")
COLOURS = {"finished": "green", "failed": "red", folder.KILLED: "red", "running": "cyan"}
# What a run is called, and what the columns model and data say.
SAID = (
    *("run_name", "output_dir", "overwrite", "model.name", "model.name_or_path", "dataset.name"),
    *("dataset.path", "dataset.eval_path"),
)
SAID_SECTIONS = ("template.", "resume.", "tracker.", "report.", "alert.", "sample.", "profile.")
# The columns, and the order in which they are left out on a narrow terminal.
COLUMNS = ("run", "status", "model", "data", "step", "differs", "eval", "best", "tokens/s", "age")
DROPPED = ("data", "step", "model", "best", "tokens/s", "age", "eval", "differs")
RIGHT = ("step", "eval", "best", "tokens/s", "age")
DIFFERS = (24, 60)  # letters of the column, at least and at most


@dataclass
class RunsConfig:
    """Which runs are listed, and in which order."""

    dirs: list[str] = setting(
        [],
        "folders with runs, up to three levels deep; dirs= may be left out; []: outputs",
    )
    sort: str = setting(
        "age",
        "what the runs are sorted by: name, status, model, data, step, age, a logged figure such "
        "as eval_loss, best (the smallest eval_loss) or a setting such as lora.r; -NAME: the "
        "largest first",
    )
    status: str | None = setting(None, "only runs with this status", one_of(*STATUSES))
    model: str | None = setting(None, "only runs whose model's name has this text")
    data: str | None = setting(None, "only runs whose dataset's name has this text")
    match: str | None = setting(None, "only runs whose name, or what differs, has this text")


def check(config: RunsConfig) -> list[Problem]:
    """Check the settings."""
    problems = list(rule_problems(config))
    if not config.sort.lstrip("-"):
        problems.append(Problem(f"sort={config.sort}", "must name a column", "sort=eval_loss"))
    return problems


def runs(config: RunsConfig) -> dict[str, Any]:
    """Print the table.

    Returns:
        What is known of each run, for ``--json``.

    Raises:
        RunError: A folder does not exist, or no run has what the runs are sorted by.
    """
    found: list[tuple[str, Folder]] = []
    for where in map(Path, config.dirs or ["outputs"]):
        if config.dirs and not where.is_dir():
            raise RunError(f"there is no folder {where}\n    fix: sft runs FOLDER")
        for path in places.runs_in(where):
            name = str(path.relative_to(where)) if path != where else path.name
            found.append((name, folder.read(path, brief=True)))
    differs = differing([run for _, run in found])
    rows = [row_of(name, run, own) for (name, run), own in zip(found, differs, strict=True)]
    asked = [row for row in rows if _asked(row, config)]
    by_path = {str(run.path): run for _, run in found}
    ordered = _sorted(asked, by_path, config.sort)
    if ordered:
        _print(ordered)
    elif rows:
        logger.info(
            "none of %d runs is as asked; leave out status, model, data or match", len(rows)
        )
    else:
        places_named = ", ".join(config.dirs or ["outputs"])
        logger.info("there are no runs in %s; sft train makes one", places_named)
    return {"runs": ordered}


def differing(runs: Sequence[Folder]) -> list[dict[str, Any]]:
    """Return, for each run, the settings whose value is not the one that most runs have.

    If two values are equally common, as in a sweep, both are shown.
    """
    flat = [
        {
            key: value
            for key, value in run.flat().items()
            if key not in SAID and not key.startswith(SAID_SECTIONS)
        }
        for run in runs
    ]
    common: dict[str, str] = {}
    for key in dict.fromkeys(key for settings in flat for key in settings):
        counts = collections.Counter(repr(settings.get(key)) for settings in flat)
        if len(counts) > 1:
            (most, count), (_, second) = counts.most_common(2)
            common[key] = most if count > second else ""
    return [
        {key: own[key] for key in common if key in own and repr(own[key]) != common[key]}
        for own in flat
    ]


def row_of(name: str, run: Folder, differs: dict[str, Any]) -> dict[str, Any]:
    """Return what a table and ``--json`` show of a run."""
    best = run.best("eval_loss")
    return {
        "name": name,
        "path": str(run.path),
        "status": run.status,
        "model": run.setting("model.name"),
        "data": run.setting("dataset.name"),
        "differs": {key: hidden(value, key) for key, value in differs.items()},
        "step": run.step(),
        "loss": run.last("loss"),
        "eval_loss": run.last("eval_loss"),
        "best": None if best is None else best[1],
        "best_step": None if best is None else int(best[0]),
        "tokens_per_second": run.last("tokens_per_second"),
        "age": round(max(0.0, time.time() - folder.last_written(run.path))),
    }


def _asked(row: dict[str, Any], config: RunsConfig) -> bool:
    differs = " ".join(f"{key}={value}" for key, value in row["differs"].items())
    return (
        config.status in (None, row["status"])
        and (config.model or "").lower() in str(row["model"] or "").lower()
        and (config.data or "").lower() in str(row["data"] or "").lower()
        and (config.match or "").lower() in f"{row['name']} {differs}".lower()
    )


def _sorted(rows: list[dict[str, Any]], runs: dict[str, Folder], sort: str) -> list[dict[str, Any]]:
    """Sort the rows; those without the value come last."""
    key, down = sort.lstrip("-"), sort.startswith("-")

    def value(row: dict[str, Any]) -> Any:
        run = runs[row["path"]]
        found = row[key] if key in row else run.last(key)
        return run.setting(key) if found is None else found

    known = [row for row in rows if value(row) is not None]
    if rows and not known:
        names = {name for run in runs.values() for name in set().union(run.flat(), *run.metrics)}
        near = closest(key, names | set(rows[0]))
        fix = f"did you mean sort={near}?" if near else "sort=eval_loss, sort=age or sort=lora.r"
        raise RunError(f"no run has {key}\n    fix: {fix}")
    numbers = all(isinstance(value(row), int | float) for row in known)
    known.sort(key=value if numbers else lambda row: str(value(row)), reverse=down)
    return known + [row for row in rows if value(row) is None]


def _print(rows: list[dict[str, Any]]) -> None:
    """Print the table, without the columns for which the terminal is too narrow."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    cells = [_cells(row) for row in rows]
    columns = [name for name in COLUMNS if any(row[name] for row in cells)]
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 10_000
    widths = {name: max(len(name), *(len(row[name]) for row in cells)) for name in columns}
    widest = widths.get("differs", 0)
    widths["differs"] = min(widest, DIFFERS[0])
    for name in DROPPED:
        if sum(widths[column] + 2 for column in columns) - 2 > width and name in columns:
            columns.remove(name)
    rest = width - sum(widths[column] + 2 for column in columns) + 2
    room = min(widest, widths["differs"] + max(rest, 0), DIFFERS[1])
    for row in cells:
        if len(row["differs"]) > room:
            row["differs"] = f"{row['differs'][: room - 3]}..."
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name, justify="right" if name in RIGHT else "left", no_wrap=True)
    for row in cells:
        colour = COLOURS.get(row["status"], "")
        table.add_row(*(Text(row[c], colour if c == "status" else "") for c in columns))
    Console(file=sys.stdout, highlight=False, width=width).print(table)


def _cells(row: dict[str, Any]) -> dict[str, str]:
    differs = " ".join(f"{key}={value}" for key, value in row["differs"].items())
    best = (
        "" if row["best"] is None else f"{rounded(row['best'])} at {html.whole(row['best_step'])}"
    )
    speed = row["tokens_per_second"]
    loss = row["eval_loss"]
    texts = {
        "run": row["name"],
        "status": row["status"],
        "model": row["model"] or "",
        "data": row["data"] or "",
        "differs": differs,
        "step": html.whole(row["step"]),
        "eval": "" if loss is None or not math.isfinite(loss) else rounded(loss),
        "best": best,
        "tokens/s": "" if speed is None else html.whole(speed),
        "age": age_of(row["age"]),
    }
    return {key: "".join(c if c.isprintable() else "?" for c in str(v)) for key, v in texts.items()}


main = Command(
    name="runs",
    schema=RunsConfig,
    run=runs,
    check=check,
    takes="dirs",
    summary="list runs in a table: status, differences, evaluation, speed, age",
    examples=(
        "sft runs",
        "sft runs sort=eval_loss status=finished",
        "sft runs outputs/sweeps model=qwen sort=-lora.r --json",
    ),
)

if __name__ == "__main__":
    main()
