"""Report what became of each key."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

from sft.config.foreign import CONVERTED, DEFAULT, DIFFERS, NOT_OURS, UNKNOWN
from sft.config.grammar import hydra_text
from sft.config.secrets import HIDDEN, may_be_secret
from sft.convert.conversion import Line
from sft.convert.convert import TOOLS, Result

TITLES = {
    CONVERTED: "converted",
    DIFFERS: "converted, but the meaning differs",
    DEFAULT: "left out, because sft does so anyway",
    NOT_OURS: "not ours",
    UNKNOWN: "unknown to sft import",
}
WIDEST = 60  # characters of a value that is shown


def _hidden(line: Line) -> bool:
    """Check whether a value is not shown: that of an unknown key, or one that may be a secret."""
    if line.secret or (line.outcome.kind == UNKNOWN and line.value is not None):
        return True
    return not line.outcome.settings and may_be_secret(line.key, line.value)


def _shown(line: Line) -> str:
    """Return a key with its value; the value of an unknown key may be a secret."""
    text = json.dumps(line.value, ensure_ascii=False, default=str)
    text = HIDDEN if _hidden(line) else text if len(text) <= WIDEST else f"{text[: WIDEST - 3]}..."
    return f"{line.key}: {text.strip(chr(34))}"


def _ours(line: Line) -> str:
    """Return the settings that a key became; those of a list of data sets stand in the note."""
    settings = {**line.outcome.settings, **line.outcome.also}
    words = " ".join(f"{name}={hydra_text(value)}" for name, value in settings.items())
    return words or (
        line.outcome.note if re.match(r"(dataset|template)[.=]", line.outcome.note) else ""
    )


def counts(result: Result) -> dict[str, int]:
    """Count the keys of the file by what became of them."""
    found = Counter(line.outcome.kind for line in result.conversion.lines if line.given)
    return {kind: found[kind] for kind in TITLES}


def share(result: Result) -> float:
    """Return the share of keys that are converted, or left out because sft does so anyway."""
    found = counts(result)
    converted = found[CONVERTED] + found[DIFFERS] + found[DEFAULT]
    return converted / max(1, sum(found.values()))


def lines(result: Result) -> list[str]:
    """Return the report as text, with a line for every key."""
    text: list[str] = []
    for kind, title in TITLES.items():
        chosen = [
            line for line in result.conversion.lines if line.given and line.outcome.kind == kind
        ]
        text += _block(title, chosen)
    added = [
        line
        for line in result.conversion.lines
        if not line.given and (line.outcome.settings or line.outcome.kind == DIFFERS)
    ]
    text += _block(f"not in the file: what {TOOLS[result.tool]} does then", added)
    if result.missing:
        text += ["not installed on this machine:"]
        text += [f"  {each.setting}  {each.rule}: {each.fix}" for each in result.missing] + [""]
    found = counts(result)
    parts = [f"{number} {TITLES[kind].partition(',')[0]}" for kind, number in found.items()]
    parts[1] = f"{found[DIFFERS]} converted with another meaning"
    text += [f"{sum(found.values())} keys: {', '.join(parts)} ({share(result):.0%} by themselves)"]
    return text


def _block(title: str, chosen: list[Line]) -> list[str]:
    if not chosen:
        return []
    width = min(46, max(len(_shown(line)) for line in chosen) + 2)
    text = [f"{title}:"]
    for line in chosen:
        ours, note = _ours(line), line.outcome.note
        first = ours or note
        shown = f"{_shown(line):<{width}}"
        shown += " " * (not shown.endswith(" "))
        text.append(f"  {shown}{'→ ' if ours else ''}{first}".rstrip())
        if ours and note and note != ours:
            text.append(f"  {'':<{width}}{note}")
    return [*text, ""]


def record(result: Result) -> dict[str, Any]:
    """Return the report for ``--json``."""
    return {
        "tool": result.tool,
        "keys": [
            {
                "key": line.key,
                "value": HIDDEN if _hidden(line) else line.value,
                "becomes": line.outcome.kind,
                "settings": dict(line.outcome.settings),
                "note": line.outcome.note,
                "in_file": line.given,
            }
            for line in result.conversion.lines
        ],
        "settings": result.settings,
        "counts": counts(result),
        "share": share(result),
        "problems": [vars(problem) for problem in result.problems],
        "missing": [vars(problem) for problem in result.missing],
    }
