"""Print the audit as tables, and return it as figures for the HTML page."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from sft.config.data_settings import CHECKS
from sft.config.settings import DatasetConfig
from sft.data import audit
from sft.data.audit import Counts, verdicts
from sft.data.outlook import Outlook
from sft.errors import few

STYLES = {"ok": "green", "warn": "yellow", "stop": "red"}


def show(parts: dict[str, Counts], config: DatasetConfig, outlook: Outlook | None = None) -> None:
    """Print rows, tokens, roles, lengths, outlook, checks and the rows that are cut most."""
    console = Console(file=sys.stdout, highlight=False)
    table = _table("")
    for name in parts:
        table.add_column(name, justify="right")
    for label, values in [*_figures(parts, config), *_outlook(outlook)]:
        table.add_row(label, *values)
    console.print(table)
    checks = _table("check")
    for name in parts:
        checks.add_column(name, justify="right")
    checks.add_column("documents that ...")
    found = {name: {v[0]: v for v in verdicts(c, config)} for name, c in parts.items()}
    for check, meaning in CHECKS.items():
        cells = []
        for name, counts in parts.items():
            _, share, verdict = found[name][check]
            number = f"{counts.checks.get(check, 0):,} ({share:.1%})"
            cells.append(f"[{STYLES[verdict]}]{number} {verdict}[/]")
        checks.add_row(check, *cells, meaning)
    console.print(checks)
    for name, counts in parts.items():
        for place, row in counts.most_cut.items():
            console.print(
                f"{name}: {place} loses {row['cut_off']:,} of {row['trained_tokens']:,} trained "
                "tokens",
                markup=False,
                soft_wrap=True,
            )


def _table(first: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first)
    return table


def _outlook(found: Outlook | None) -> list[tuple[str, list[str]]]:
    """List (label, value); the only value is that of the samples to train on."""
    if found is None:
        return []
    rows = [
        ("trained tokens, per epoch", f"{found.trained_tokens_per_epoch:,}"),
        (f"  in all, {found.epochs:g} epochs", f"{found.trained_tokens:,}"),
        ("  each once", f"{found.distinct_trained_tokens:,}"),
        ("tokens in all", f"{found.tokens:,}"),
        ("optimizer steps", f"{found.steps:,}"),
    ]
    if found.adapter_parameters is not None:
        rows.append(("adapter's parameters", f"{found.adapter_parameters:,}"))
        rows.append(("  per trained token", f"{found.parameters_per_trained_token:,g}"))
    return [(label, [value]) for label, value in rows]


def _figures(parts: dict[str, Counts], config: DatasetConfig) -> list[tuple[str, list[str]]]:
    """List (label, one value per part)."""
    rows: list[tuple[str, list[str]]] = []

    def add(label: str, values: list[Any]) -> None:
        if any(value is not None for value in values):
            shown = ["" if v is None else v if isinstance(v, str) else f"{v:,}" for v in values]
            rows.append((label, shown))

    counts = list(parts.values())
    add("files read", [c.files or None for c in counts])
    add(
        "  beside them, not read", [few(c.unused_files) if c.unused_files else None for c in counts]
    )
    add("rows read", [c.rows for c in counts])
    add("  that do not fit", [c.bad for c in counts])
    add("  empty", [c.empty for c in counts])
    add("  unrolled, a sample a turn", [c.unrolled or None for c in counts])
    for column in {name: None for c in counts for name in c.unused_columns}:
        add(f"  column not used: {column}", [c.unused_columns.get(column, 0) for c in counts])
    for source in {name: None for c in counts for name in c.sources}:
        found = [c.sources.get(source) for c in counts]
        if any(f and f["weight"] != 1 for f in found) or len(counts[0].sources) > 1:
            cells = [f"{f['rows']:,} x {f['weight']:g}" if f else None for f in found]
            add(f"  from {source}", cells)
    met = [audit.roles_met([c]) for c in counts]
    for role in {name: None for each in met for name in each}:
        add(f"  messages of the role {role}", [each.get(role) for each in met])
    add("documents kept", [c.documents for c in counts])
    add("  overlong", [c.overlong for c in counts])
    add("  truncated", [c.truncated for c in counts])
    add("  trained tokens cut off", [c.cut_tokens or None for c in counts])
    add("dropped in all", [c.dropped for c in counts])
    add("samples", [c.samples for c in counts])
    full = [None if c.efficiency is None else f"{c.efficiency:.1%}" for c in counts]
    add("  blocks are full to", full)
    add("tokens", [c.tokens for c in counts])
    add("  trained", [f"{c.trained_tokens:,} ({_share(c)})" for c in counts])
    add("  with a weight below 1", [c.weighted or None for c in counts])
    overlap = "not trained again" if config.boundary_overlap == "context" else "trained again"
    add(f"  repeated, {overlap}", [c.repeated or None for c in counts])
    for role in {name: None for c in counts for name in c.roles}:
        pairs = [c.roles.get(role) for c in counts]
        cells = [f"{p['tokens']:,} ({p['trained']:,} trained)" if p else None for p in pairs]
        add(f"  {role}", cells)
    for key, label in (
        ("p50", "tokens a document, median"),
        ("p90", "  90th percentile"),
        ("p99", "  99th percentile"),
        ("max", "  longest"),
        ("suggested_max_length", "max_length for 99 % whole"),
        ("max_length_for_all", "  for all"),
    ):
        add(label, [c.lengths.get(key) for c in counts])
    add("max_length", [c.max_length for c in counts])
    return rows


def _share(counts: Counts) -> str:
    return f"{counts.trained_tokens / max(1, counts.tokens):.1%}"


def figures(parts: dict[str, Counts], config: DatasetConfig) -> dict[str, Any]:
    """Return every figure by part, with each check's share and verdict, for the page."""
    result: dict[str, Any] = {}
    for name, counts in parts.items():
        fields = dataclasses.asdict(counts)
        fields["by_role"] = fields.pop("roles")
        fields["checks"] = {
            check: {"documents": counts.checks.get(check, 0), "share": share, "verdict": verdict}
            for check, share, verdict in verdicts(counts, config)
        }
        fields["lengths"]["max_length"] = fields.pop("max_length")
        result[name] = fields
    return result
