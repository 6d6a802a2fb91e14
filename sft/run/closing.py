"""The last lines of a run: how it went, where its files are, and what to type next.

They are read from the files of the run's folder, so that those of a resumed run cover all of it.
"""

from __future__ import annotations

import logging
import math
import shlex
from pathlib import Path
from typing import Any

from sft import process
from sft.checkpoint import folders
from sft.cli.commands import COMMANDS
from sft.files import read_records
from sft.progress import duration
from sft.run import record

logger = logging.getLogger("sft")

# Parts of a step's time are figures with this prefix; these two are not parts.
PART, NOT_PARTS = "seconds_", {"seconds_per_step", "seconds_left"}
PEAKS = {"memory_device": "of a GPU", "memory_resident": "of a process"}


def log(lines: list[str]) -> None:
    """Write lines to the log."""
    for line in lines:
        logger.info("%s", line)


def finished(folder: Path) -> list[str]:
    """Return the lines of a run that is finished."""
    run, logged = record.read(folder), _logged(folder)
    files = {name: folder / name for name in (record.ADAPTER, record.MODEL, record.MERGED)}
    files |= {"metrics": folder / record.METRICS, "page": folder / record.REPORT}
    rows = [(name, str(path)) for name, path in files.items() if path.exists()]
    if kept := folders.checkpoints(folder):
        rows.insert(-1, ("checkpoints", ", ".join(str(path) for path in reversed(kept))))
    rows += [("next", command) for command in _next(folder)]
    return [
        f"finished in {_spent(run, logged)}",
        *_table([*_evaluations(run, logged), *_memory(logged), *rows]),
    ]


def stopped(folder: Path) -> list[str]:
    """Return the lines of a run that a signal has ended: what is saved, and how to go on."""
    kept = folders.checkpoints(folder)
    if not kept:
        return []
    step, losses = folders.step_of(kept[0]), [log for log in _logged(folder) if "loss" in log]
    loss = f"; the loss was {losses[-1]['loss']:.4f} at step {losses[-1]['step']}" if losses else ""
    return _table(
        [("saved", f"{kept[0]}, step {step:,}{loss}"), ("to go on", process.command_line())]
    )


def _logged(folder: Path) -> list[dict[str, Any]]:
    file = folder / record.METRICS
    return read_records(file) if file.is_file() else []


def _spent(run: dict[str, Any], logged: list[dict[str, Any]]) -> str:
    """Describe the time, the steps and the tokens of all starts of a run."""
    parts = sum(
        value
        for log in logged
        for name, value in log.items()
        if name.startswith(PART) and name not in NOT_PARTS
    )
    starts = 1 + len(run["resumed"])
    text = duration(run["seconds"])
    if starts > 1:
        text += f" after the last of {starts} starts"
        text = f"{duration(parts)}, in {starts} starts" if parts else text
    text += f": {run['final']['steps']:,} steps"
    tokens = max((log.get("num_tokens") or 0 for log in logged), default=0)
    text += f", {tokens:,.0f} tokens" if tokens else ""
    seconds = parts or (run["seconds"] if starts == 1 else 0)
    return text + (f", {tokens / seconds:,.0f} tokens/s" if tokens and seconds else "")


def _evaluations(run: dict[str, Any], logged: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """List the last and the best evaluation."""
    found = [log for log in logged if "eval_loss" in log]
    rows = []
    if found:
        known = [log for log in found if math.isfinite(float(log["eval_loss"]))] or found
        last, best = found[-1], min(known, key=lambda log: float(log["eval_loss"]))
        text = f"{last['eval_loss']:.4f} at step {last['step']:,}, the last"
        if best["step"] == last["step"]:
            text += " and the best"
        else:
            text += f"; {best['eval_loss']:.4f} at step {best['step']:,}, the best"
        rows.append(("eval loss", text))
    if chosen := run.get("best"):
        used = ""
        if chosen.get("written"):
            used = f"; the weights of step {chosen['step']:,} are written"
        text = f"{chosen['value']:.4f} at step {chosen['step']:,}, the best{used}"
        if chosen["metric"] != "eval_loss":
            rows.append((chosen["metric"].replace("_", " "), text))
        elif used:
            if chosen["step"] != best["step"]:  # such as before training, or what is largest
                used = f"; {chosen['value']:.4f} at step {chosen['step']:,}, which is written"
            rows[-1] = (rows[-1][0], rows[-1][1] + used)
    if (share := run["final"].get("exact_match")) is not None:
        rows.append(("exact match", f"{share:.1%} of {run['final']['exact_match_rows']:,}"))
    return rows


def _memory(logged: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """List the largest figures of memory."""
    peaks = {name: max((log.get(name) or 0 for log in logged), default=0) for name in PEAKS}
    shown = [f"{peak / 2**30:.1f} GiB {PEAKS[name]}" for name, peak in peaks.items() if peak]
    return [("peak memory", ", ".join(shown))] if shown else []


def _next(folder: Path) -> list[str]:
    """List commands for the run that is finished."""
    name = shlex.quote(str(folder))
    commands = [f"sft generate run={name} prompt='...'"]
    if (folder / record.ADAPTER).is_dir() and not (folder / record.MERGED).is_dir():
        commands.append(f"sft merge run={name}")
    if "report" in COMMANDS:
        commands.append(f"sft report {name}")
    return commands


def _table(rows: list[tuple[str, str]]) -> list[str]:
    """Format names and texts in two columns; a name that repeats is written once."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    names = [name for name, _ in rows]
    shown = ["" if names[:index][-1:] == [name] else name for index, name in enumerate(names)]
    return [f"    {name:<{width}}{text}" for name, (_, text) in zip(shown, rows, strict=True)]
