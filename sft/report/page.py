"""The page of a run or of several, as one HTML file without network access."""

from __future__ import annotations

import math
import string
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sft import html
from sft.report import charts, facts, sections
from sft.report.curves import key as look_of
from sft.report.folder import Folder, number
from sft.report.style import SCRIPT, STYLE
from sft.report.words import damages, duration, hidden, rounded

# Settings that differ among any two runs, and say nothing about the difference.
NAMES = ("run_name", "output_dir", "overwrite")
TILES = 6  # in a row, at most
LARGEST_TABLE = 60  # settings that differ, in a comparison


def page(runs: Sequence[Folder]) -> str:
    """Return the page of a run, or the comparison of several."""
    if len(runs) == 1:
        return html.page(runs[0].name, single(runs[0]), STYLE, SCRIPT)
    names = ", ".join(run.name for run in runs)
    return html.page(f"{len(runs)} runs: {names}"[:200], several(runs), STYLE, SCRIPT)


def single(run: Folder) -> str:
    """Return the page of one run."""
    # Before the head, which says what these parts have found damaged.
    cards = "".join(filter(None, (_shown(run, title, draw) for title, draw in PARTS)))
    return f'{_head(run)}<div class="parts">\n{cards}</div>\n{_foot()}'


def _shown(run: Folder, title: str, draw: Callable[[Folder], str]) -> str:
    """Draw a part; files with content that no run writes cost this part only."""
    try:
        return draw(run)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        run.damaged[title] = f"cannot be shown: {type(error).__name__}: {error}"
        return ""


# The parts of a run's page, in their order.
PARTS: tuple[tuple[str, Callable[[Folder], str]], ...] = (
    ("curves", lambda run: html.card("Curves", charts.charts(run))),
    ("samples", sections.samples),
    ("events", sections.events),
    ("weights", sections.weights),
    ("merge", facts.merged),
    ("forgetting", sections.forgetting),
    ("operations", facts.measured),
    ("machine", lambda run: html.card("Use of the machine", charts.system(run))),
    ("profile", sections.profile),
    ("data", facts.audit),
    ("choices", facts.choices),
    ("settings", facts.settings),
    ("software", facts.machine),
    ("command", facts.again),
)


def _head(run: Folder) -> str:
    lora = run.setting("lora.enabled")
    method = (
        f"LoRA of rank {run.setting('lora.r')}" if lora else "all weights" if run.settings else ""
    )
    parts = [run.setting("model.name"), run.setting("dataset.name"), method]
    if (seed := run.setting("seed")) is not None:
        parts.append(f"seed {seed}")
    subtitle = " · ".join(html.text(part) for part in parts if part)
    shown = list(_tiles(run))
    columns = math.ceil(
        len(shown) / math.ceil(len(shown) / TILES)
    )  # so that rows are of one length
    tiles = "".join(
        f"<div><dt>{html.text(label)}</dt><dd>{value}<small>{note}</small></dd></div>\n"
        for label, value, note in shown
    )
    notices = [str(run.run["reason"])] if run.run.get("reason") else []
    if run.status == "killed":
        notices = ["The run ended without a word: its process was killed."]
    if run.status in ("killed", "stopped", "failed"):
        notices.append("Give the same command again to resume it.")
    notices += damages(run)
    said = "".join(f"<p>{html.text(notice)}</p>" for notice in notices)
    return (
        f'<header>\n<div class="head"><h1>{html.text(run.name)}</h1>'
        f'<span class="pill {html.text(run.status)}">{html.text(run.status)}</span></div>\n'
        f'<p class="subtitle">{subtitle}</p>\n</header>\n'
        f'<dl class="tiles" style="--n: {columns}">\n{tiles}</dl>\n'
        + (f'<div class="notice" role="note">{said}</div>\n' if said else "")
    )


def _tiles(run: Folder) -> Iterator[tuple[str, str, str]]:
    """Yield (label, value, note) of the most important figures."""
    last = run.metrics[-1] if run.metrics else {}
    epoch = number(last.get("epoch"))
    yield "steps", html.whole(run.step()), f"epoch {epoch:.2f}" if epoch == epoch else ""
    if (loss := run.last("loss")) is not None:
        yield "training loss", rounded(loss), ""
    for key in run.held_out()[:3]:
        best, now = run.best(key), run.last(key)
        if best is not None and now is not None:
            note = f"best {rounded(best[1])} at step {html.whole(best[0])}"
            yield f"{charts.set_name(key, 'loss')} loss", rounded(now), note
    if (match := run.last("exact_match")) is not None:
        yield "exact match", f"{match:.1%}", ""
    if (speed := run.last("tokens_per_second")) is not None:
        mfu = run.last("mfu")
        yield "tokens/s", html.whole(speed), f"MFU {mfu:.1%}" if mfu is not None else ""
    if "seconds" in run.run:
        yield "time", duration(run.run["seconds"]), _since(run)
    elif run.status == "running" and (left := run.last("seconds_left")) is not None:
        yield "time left", duration(left), ""
    for key in ("memory_device", "memory_reserved", "memory_resident"):
        values = [value for _, value in run.points(key) if value == value]
        if values:
            yield "peak memory", html.amount(max(values)), charts.MEMORY[key]
            break


def _since(run: Folder) -> str:
    count = len(run.entries("resumed"))
    return {0: "", 1: "resumed once", 2: "resumed twice"}.get(count, f"resumed {count} times")


def _foot() -> str:
    written = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"<footer><small>Written by sft report on {written}.</small></footer>\n"


def letters() -> Iterator[str]:
    """Yield A to Z, then A1, B1 ...: the runs' short names."""
    for round_number in range(1000):
        for letter in string.ascii_uppercase:
            yield letter + (str(round_number) if round_number else "")


def differing(runs: Sequence[Folder]) -> dict[str, list[Any]]:
    """Return the settings that differ among runs, with each run's value; None where it has none."""
    flat = [run.flat() for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in NAMES)
    values = {key: [settings.get(key) for settings in flat] for key in keys}
    return {key: found for key, found in values.items() if any(v != found[0] for v in found)}


def several(runs: Sequence[Folder]) -> str:
    """Return the comparison of several runs."""
    short = [letter for letter, _ in zip(letters(), runs, strict=False)]
    names = [f"{letter} {run.name}" for letter, run in zip(short, runs, strict=True)]
    title = f"{len(runs)} runs"
    damaged = [
        f"{name}: {what}" for name, run in zip(names, runs, strict=True) for what in damages(run)
    ]
    said = "".join(f"<p>{html.text(line)}</p>" for line in damaged)
    body = [
        f'<header><div class="head"><h1>{title}</h1></div>\n'
        f'<p class="subtitle">{" · ".join(map(html.text, names))}</p></header>\n',
        f'<div class="notice" role="note">{said}</div>\n' if said else "",
        html.card("Results", _results(runs, short)),
        html.card("Curves", charts.compared(runs, short)),
        _settings(runs, short),
    ]
    return "".join(body) + _foot()


def _results(runs: Sequence[Folder], short: Sequence[str]) -> str:
    losses = [run.best("eval_loss") for run in runs]
    least = min((loss[1] for loss in losses if loss), default=None)
    rows = []
    for look, (letter, run, loss) in enumerate(zip(short, runs, losses, strict=True)):
        best = f"{rounded(loss[1])}<small> at {html.whole(loss[0])}</small>" if loss else "-"
        kind = ' class="best"' if loss and loss[1] == least else ""
        rows.append(
            [
                f'<span class="key">{look_of(look)}{letter}</span>{html.text(run.name)}',
                html.text(run.status),
                html.whole(run.step()),
                _number(run.last("loss")),
                _number(run.last("eval_loss")),
                f"<td{kind}>{best}</td>",
                _number(run.last("tokens_per_second"), html.whole),
                duration(run.run.get("seconds")),
            ]
        )
    head = ["run", "status", "steps", "loss", "held-out", "best held-out", "tokens/s", "time"]
    return html.table(head, rows, "Results of the runs")


def _number(value: float | None, shown: Callable[[float], str] = rounded) -> str:
    return "-" if value is None else shown(value)


def _settings(runs: Sequence[Folder], short: Sequence[str]) -> str:
    found = differing(runs)
    rows = [
        [html.text(key), *(html.text(hidden(value, key)) for value in values)]
        for key, values in list(found.items())[:LARGEST_TABLE]
    ]
    if not rows:
        return html.card("Settings that differ", "<p>All settings are equal.</p>\n")
    note = f"the first {LARGEST_TABLE} of {len(found)}" if len(found) > LARGEST_TABLE else ""
    table = html.table(["setting", *short], rows, "Settings that differ", "text")
    return html.card("Settings that differ", table, note)
