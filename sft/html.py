"""The look of sft's pages: one HTML file, which asks no network for anything and runs offline."""

from __future__ import annotations

import base64
import decimal
import hashlib
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from sft.errors import few

# Controls, formats (such as a change of text direction), surrogates, line and paragraph separators.
HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
GENERATOR = '<meta name="generator" content="sft">'  # by which a page of sft is recognised


def visible(text: str, around: str = "{}") -> str:
    """Mark the ends of lines, and escape control characters and invisible characters.

    Args:
        text: Decoded text.
        around: Format of each mark and escape.
    """

    def shown(char: str) -> str:
        if char == "\n":
            return around.format("↵") + char
        # Do not escape joiners: emoji and several scripts need them.
        if char not in "\u200c\u200d" and unicodedata.category(char) in HIDDEN:
            return around.format(char.encode("unicode_escape").decode())
        return char

    return "".join(map(shown, text))


def text(value: object) -> str:
    """Return a text for a page: escaped, and with nothing invisible in it."""
    return escape(visible(str(value)))


def long_text(value: object, limit: int = 2000) -> str:
    """Return a text of several lines for a page; what is beyond the limit is left out."""
    whole = str(value)
    cut = f"{whole[:limit]} [...]" if len(whole) > limit else whole
    return visible(escape(cut), '<span class="esc">{}</span>')


def name(key: object) -> str:
    """Return the key of a figure as words for a page."""
    return text(str(key).replace("_", " "))


def figure(value: object, key: str = "") -> str:
    """Return a value as a text: numbers with separators, and shares in percent."""
    if value is None or value in ({}, []):
        return "-"
    if isinstance(value, float):
        if key.endswith("share"):
            return f"{100 * value:.3g} %"
        return whole(value) if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return whole(value)
    if isinstance(value, list):
        return few(value)
    return str(value)


def whole(value: float) -> str:
    """Return a number without decimals: with separators, or short if it is very large."""
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{decimal.Decimal(value):.4g}"


def amount(size: float) -> str:
    """Return a number of bytes as a text."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if size >= 2**power / 10:
            return f"{size / 2**power:{',.1f' if size < 1e27 else '.3g'}} {unit}"
    return f"{size / 2**10:,.1f} KiB"


def cell(value: object, key: str = "") -> str:
    """Return a table's cell; the verdict of a check is coloured."""
    kind = ""
    if key == "verdict":
        kind = ' class="ok"' if value == "ok" else ' class="alert"'
    return f"<td{kind}>{text(figure(value, key))}</td>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], label: str, kind: str = "") -> str:
    """Return a table that scrolls within itself on a narrow screen; its first column is a heading.

    Args:
        head: The columns' names, as HTML; the first may be empty.
        rows: The cells of each row, as HTML.
        label: What the table shows, for a screen reader.
        kind: A class, such as ``text`` for columns of texts.
    """
    top = "".join(f'<th scope="col">{item}</th>' if item else "<td></td>" for item in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>'
        + "".join(item if item.startswith("<td") else f"<td>{item}</td>" for item in row[1:])
        + "</tr>\n"
        for row in rows
    )
    head_row = f"<tr>{top}</tr>\n" if head else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">'
        f'<table class="{kind}">\n{head_row}{body}</table></div>\n'
    )


def card(title: str, body: str, note: str = "", kind: str = "") -> str:
    """Return a section with a heading; nothing if its body is empty."""
    if not body:
        return ""
    small = f" <small>{note}</small>" if note else ""
    return (
        f'<section class="card{kind and f" {kind}"}">\n<h2>{title}{small}</h2>\n{body}</section>\n'
    )


def figures(
    values: Mapping[str, Any],
    histogram: Callable[[Any, float | None], str],
    level: int = 2,
    limit: int | None = None,
    within: str = "",
) -> str:
    """Render figures: single values as rows, flat mappings as tables, others under a heading.

    Args:
        values: Figures by name, nested to any depth. A ``histogram``, rows of [from, to, count],
            becomes a chart, and a ``max_length`` at its level or above a line in the chart.
        histogram: Draws the chart.
        level: The level of the headings.
        limit: The ``max_length`` of a level above.
        within: The names of the levels above, for a screen reader.
    """
    limit = values.get("max_length", limit)
    rows = sections = ""
    for key, value in values.items():
        title = name(key)
        head = f"<section>\n<h{level}>{title}</h{level}>\n"
        if key == "histogram" and value:
            sections += histogram(value, limit)
        elif not isinstance(value, Mapping) or not value:
            rows += f'<tr><th scope="row">{title}</th>{cell(value, key)}</tr>\n'
        elif all(_is_flat(row) for row in value.values()):
            columns = list(dict.fromkeys(itertools.chain(*value.values())))
            cells = (
                [name(label), *(cell(row.get(column), column) for column in columns)]
                for label, row in value.items()
            )
            label = f"{within} {key}".strip().replace("_", " ")
            inner = table(["", *map(name, columns)], cells, label)
            sections += f"{head}{inner}</section>\n"
        else:
            inner = figures(value, histogram, min(level + 1, 6), limit, f"{within} {key}".strip())
            sections += f"{head}{inner}</section>\n"
    single = f"<table>\n{rows}</table>\n" if rows else ""
    return f'<div class="figures">\n{single}{sections}</div>\n'


def _is_flat(row: object) -> bool:
    return isinstance(row, Mapping) and not any(isinstance(v, Mapping | list) for v in row.values())


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """Return a page.

    Args:
        title: Its heading in the browser, not yet escaped.
        body: HTML.
        style: Rules beside the common ones.
        script: JavaScript, without which the page must say the same. The browser runs only this
            text: the page's policy names its hash.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = f"; script-src 'sha256-{digest}'" if script else ""
    policy = f"default-src 'none'; style-src 'unsafe-inline'{allowed}"
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n{GENERATOR}\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{text(title)}</title>\n<style>{STYLE}{style}</style>\n<main>\n{body}</main>\n"
        + (f"<script>{script}</script>\n" if script else "")
        + "</html>\n"
    )


STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f7f4; --card: #fff; --ink: #1f2421; --soft: #5f6762; --line: #e3e5e0;
  --on: #dcefdf; --edge: #4f9d69; --good: #2b7a45; --alert: #a8480b; --warm: #fbeee4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141615; --card: #1c1f1d; --ink: #e3e7e4; --soft: #9aa39d; --line: #2f3431;
    --on: #1d4029; --edge: #58a973; --good: #67bd83; --alert: #f0a060; --warm: #3a2a1c;
  }
}
* { box-sizing: border-box; }
body { margin: 0; font: 15px/1.6 system-ui, sans-serif; background: var(--page);
  color: var(--ink); }
main { max-width: 68rem; margin: 0 auto; padding: 3rem 1.5rem 5rem; }
h1 { margin: 0 0 .5rem; font-size: 1.7rem; font-weight: 650; letter-spacing: -.01em;
  line-height: 1.25; overflow-wrap: anywhere; }
h2, h3, h4, h5, h6 { margin: 0 0 .6rem; font-size: 1.1rem; font-weight: 600; }
h3, h4, h5, h6 { margin-bottom: .2rem; font-size: .9rem; }
small { font-size: .85rem; font-weight: 400; color: var(--soft); }
.card { margin: 1.5rem 0; padding: 1.4rem 1.6rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px; }
.card > h2 { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; }
.card > h2 small { margin-left: auto; font-variant-numeric: tabular-nums; }
pre { margin: 0; font: 13.5px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.esc { color: var(--soft); font-size: .85em; user-select: none; }
.scroll { overflow-x: auto; max-width: 100%; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem 0 .22rem 1.5rem; text-align: right; font-weight: 400;
  border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
.figures { display: flex; flex-wrap: wrap; gap: 1.6rem 3rem; align-items: flex-start; }
.figures > * { max-width: 100%; }
.figures > table { min-width: 13rem; }
.figures > section:has(svg) { flex-basis: 100%; order: 1; }
.card > .figures > section { flex-basis: 100%; }
.card > .figures > section + section { padding-top: 1.6rem; border-top: 1px solid var(--line); }
.ok { color: var(--good); }
.alert { color: var(--alert); font-weight: 600; }
svg.drawn { width: 34rem; max-width: 100%; font: 12px system-ui, sans-serif; }
svg.drawn text { fill: var(--soft); }
svg.drawn line { stroke: var(--line); }
svg.drawn .axis { stroke: var(--soft); }
svg.drawn .bar { fill: var(--edge); opacity: .8; }
svg.drawn line.limit { stroke: var(--alert); stroke-dasharray: 4 3; }
svg.drawn text.limit { fill: var(--alert); }
@media (max-width: 40rem) {
  main { padding: 1.2rem .8rem 3rem; }
  .card { padding: 1rem .9rem; }
}
@media print {
  :root { color-scheme: light; --page: #fff; --card: #fff; --ink: #000; --soft: #555; --line: #ccc;
    --on: #dcefdf; --edge: #2f7d4a; --good: #226038; --alert: #a8480b; --warm: #fbeee4; }
  body { font-size: 9.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .figures { gap: 1.2rem 1.5rem; }
  .figures > table { min-width: 10rem; }
  .card { border: 0; padding: 0; }
  .scroll { overflow: visible; }
  h2, h3 { break-after: avoid; }
  tr, svg, figure { break-inside: avoid; }
}
"""
