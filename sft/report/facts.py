"""What a run was made of: data, choices, settings, versions, command; and its merge.

Each function returns a card of the page; "" if nothing is known.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sft import html
from sft.config.compare import flatten
from sft.config.rules import typed
from sft.config.secrets import command_without_secrets
from sft.data.histogram import histogram
from sft.report.folder import MERGE_REPORT, Folder, defaults, number
from sft.report.words import flag, hidden
from sft.run import record

# Of the audit, what a reader of a page asks for; data.json has all of it.
FIGURES = (
    *("rows", "samples", "dropped", "truncated", "tokens", "trained_tokens"),
    *("longest", "max_length", "efficiency"),
)
LENGTHS = ("mean", "p50", "p95", "max")
OPERATIONS = {
    "per_token": "token, as computed",
    "convention_6n": "token, by the convention of 6 per weight",
    "peak_per_second": "second at the device's peak",
}
# Of the report of a merge, what a reader asks for.
MERGE = (
    *("compared_on", "dtype", "max_difference", "allowed_difference", "top1_agreement", "kl"),
    *("greedy_texts", "eval_loss", "seconds"),
)


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping as it is, and anything else as an empty one."""
    return value if isinstance(value, Mapping) else {}


def audit(run: Folder) -> str:
    """Show how rows became samples: figures, checks and a histogram of lengths of each part."""
    audited = mapping(run.json(record.AUDIT).get("parts"))
    parts = {name: mapping(part) for name, part in audited.items()}
    if not parts:
        return ""
    lengths = [mapping(part.get("lengths")) for part in parts.values()]
    checks = [mapping(part.get("checks")) for part in parts.values()]
    rows = _rows(FIGURES, list(parts.values())) + _rows(LENGTHS, lengths, "length: ")
    found = [row for row in _rows(dict.fromkeys(itertools.chain(*checks)), checks) if _any(row)]
    heads = list(map(html.name, parts))
    tables = f"<div>{html.table(['figure', *heads], rows, 'Figures of the data')}</div>\n"
    if found:
        tables += f"<div>{html.table(['check', *heads], found, 'Checks of the data')}</div>\n"
    elif any(checks):
        tables += "<p>The checks have found nothing.</p>\n"
    charts = ""
    for name, part in parts.items():
        bins = mapping(part.get("lengths")).get("histogram")
        if isinstance(bins, list) and bins:
            drawn = histogram(bins, part.get("max_length"))
            charts += f"<div><h3>Lengths: {html.name(name)}</h3>{drawn}</div>\n"
    body = f'<div class="columns">{tables}</div>\n<div class="columns">{charts}</div>\n'
    return html.card("Data", body)


def _rows(
    keys: Iterable[str], parts: Sequence[Mapping[str, Any]], before: str = ""
) -> list[list[str]]:
    """Return a table's rows of what the parts say under the keys, of those that any part has."""
    return [
        [before + html.name(key), *(html.cell(part.get(key), key) for part in parts)]
        for key in keys
        if any(part.get(key) is not None for part in parts)
    ]


def _any(row: list[str]) -> bool:
    """Return whether a row of counts has one that is not zero."""
    return any(cell != "<td>0</td>" for cell in row[1:])


def choices(run: Folder) -> str:
    """Show what auto has chosen, and why."""
    rows = [
        [
            html.text(key),
            html.text(hidden(said.get("value"), key)),
            html.text(said.get("reason", "")),
        ]
        for key, said in run.mapping("choices").items()
        if isinstance(said, dict)
    ]
    head = ["setting", "value", "because"]
    return html.card(
        "What auto chose", html.table(head, rows, "Choices", "text stacks") if rows else ""
    )


def measured(run: Folder) -> str:
    """Show what was computed and held: operations of a token, the device's peak, bytes of state."""
    said = run.mapping("operations")
    rows = [
        [f"operations per {what}", f"{number(said[key]):.4g} FLOP"]
        for key, what in OPERATIONS.items()
        if said.get(key) is not None
    ]
    for rank, held in enumerate(run.entries("ranks_memory")[:8]):
        for key, value in held.items():
            title = key.replace("_", " ").removesuffix(" bytes")
            rows.append([html.text(f"rank {rank}: {title}"), html.amount(number(value))])
    label = "Operations and memory"
    table = html.table(["figure", "value"], rows, label) if rows else ""
    return html.card(label, table, kind="half")


def merged(run: Folder) -> str:
    """Show the report of the merge."""
    found = run.json(f"{record.MERGED}/{MERGE_REPORT}")
    if not found:
        return ""
    passed = found.get("passed")
    verdict = "not done" if passed is None else "passed" if passed is True else "failed"
    rows = [["verification", flag(verdict, passed is not True)]]
    rows += [
        [html.name(key.replace(".", ": ")), html.cell(value)]
        for key, value in flatten({key: found.get(key) for key in MERGE}).items()
        if value is not None
    ]
    table = html.table(["check", "value"], rows, "Report of the merge", "text")
    return html.card("Merge", table, kind="half")


def settings(run: Folder) -> str:
    """List the settings that differ from their defaults."""
    known = defaults()
    rows = []
    for key, value in run.flat().items():
        default = known.get(key, {})
        if value != default and not (not value and not default):
            rows.append([key, hidden(value, key), typed(default) if key in known else "-"])
    cells = [[html.long_text(cell, 400) for cell in row] for row in rows]
    table = (
        html.table(["setting", "value", "default"], cells, "Settings", "text stacks")
        if rows
        else ""
    )
    return html.card("Settings that differ from their defaults", table)


def machine(run: Folder) -> str:
    """List versions and hardware."""
    facts = {**run.mapping("hardware"), "ranks": run.run.get("ranks"), "git": run.run.get("git")}
    facts = {key: value for key, value in facts.items() if value not in (None, [])}
    tables = ""
    for head, found in (
        (["package", "version"], run.mapping("versions")),
        (["machine", "value"], facts),
    ):
        rows = [[html.name(key), html.cell(value, key)] for key, value in found.items()]
        tables += f"<div>{html.table(head, rows, head[0])}</div>\n" if rows else ""
    body = f'<div class="columns">{tables}</div>\n' if tables else ""
    return html.card("Software and machine", body)


def again(run: Folder) -> str:
    """Show the command of the run."""
    command = run.run.get("command")
    if not isinstance(command, str):
        return ""
    shown = html.text(command_without_secrets(command))
    return html.card("The command", f'<pre class="command">{shown}</pre>\n')
