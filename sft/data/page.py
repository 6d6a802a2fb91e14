"""Write the preview and the audit as one HTML page without scripts or network access."""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from sft.data.folders import few
from sft.data.histogram import histogram
from sft.data.preview import (
    Sample,
    Span,
    Token,
    documents_of,
    figures_of,
    tokens_of,
    untrained,
    visible,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.data.preview import Prompt


def page(
    samples: Sequence[Sample],
    tokenizer: PreTrainedTokenizerBase,
    title: str,
    audit: Mapping[str, Any] | None,
    prompts: Sequence[Sequence[Prompt | None]] = (),
) -> str:
    """Return samples and audit as HTML.

    Args:
        samples: As in ``preview.show``.
        tokenizer: The tokenizer that made them.
        title: The page's heading.
        audit: Figures by name, nested to any depth, shown above the samples. A ``histogram``, rows
            of [from, to, count], becomes a chart, and a ``max_length`` at its level or above
            becomes a line in the chart.
        prompts: As in ``preview.show``.
    """
    body = f'<section class="card">{_audit(audit)}</section>\n' if audit else ""
    every = zip(samples, prompts or itertools.repeat(()), strict=False)
    for number, (sample, asked) in enumerate(every, 1):
        documents, heading = documents_of(sample, tokenizer)
        strip = "".join(
            f'<i{" class=on" * span.trained} style="flex:{len(span.ids)}"></i>'
            for span in itertools.chain(*documents)
        )
        body += f'<article class="card">\n<h2>Sample {number} <small>{heading}</small></h2>\n'
        body += f'<div class="strip" aria-hidden="true">{strip}</div>\n'
        for position, (document, prompt) in enumerate(itertools.zip_longest(documents, asked), 1):
            if "seq_lengths" in sample:
                name = f"document {position} of {len(documents)}"
                body += f'<h3 class="rule">{name} <small>{figures_of(document)}</small></h3>\n'
            body += _document_html(document, tokenizer)
            if prompt is not None:
                note = escape(visible(prompt.note))
                body += f'<h3 class="rule">generation prompt <small>{note}</small></h3>\n'
                if prompt.ids:
                    body += _document_html(list(untrained(prompt.ids, tokenizer)), tokenizer)
        body += "</article>\n"
    return PAGE.substitute(title=escape(visible(title)), body=body)


def _document_html(document: list[Span], tokenizer: PreTrainedTokenizerBase) -> str:
    text = "".join(map(_span_html, document))
    tokens = "".join(map(_token_html, tokens_of(document, tokenizer)))
    return f'<pre class="text">{text}</pre>\n<pre class="tokens">{tokens}</pre>\n'


def _span_html(span: Span) -> str:
    # Escapes are styled: the data may hold the same letters as ordinary text.
    text = visible(escape(span.text), '<span class="esc">{}</span>')
    return f"<mark>{text}</mark>" if span.trained else text


def _token_html(token: Token) -> str:
    kinds = "token" + " on" * token.trained + " special" * token.special
    text, end = escape(token.text).replace("\n", ""), "<br>" * ("\n" in token.text)
    return f'<span class="{kinds}">{text}<i>{token.id}</i></span>{end}'


def _audit(figures: Mapping[str, Any], level: int = 2, limit: int | None = None) -> str:
    """Render figures: single values as rows, flat mappings as tables, others under a heading."""
    limit = figures.get("max_length", limit)
    rows = sections = ""
    for key, value in figures.items():
        name = _name(key)
        head = f"<section>\n<h{level}>{name}</h{level}>\n"
        if key == "histogram" and value:
            sections += histogram(value, limit)
        elif not isinstance(value, Mapping) or not value:
            rows += f"<tr><th>{name}</th>{_cell(key, value)}</tr>\n"
        elif all(_is_flat(row) for row in value.values()):
            columns = list(dict.fromkeys(itertools.chain(*value.values())))
            sections += head + "<table>\n<tr><td></td>"
            sections += "".join(f"<th>{_name(c)}</th>" for c in columns) + "</tr>\n"
            for label, row in value.items():
                cells = "".join(_cell(c, row.get(c)) for c in columns)
                sections += f"<tr><th>{_name(label)}</th>{cells}</tr>\n"
            sections += "</table>\n</section>\n"
        else:
            sections += f"{head}{_audit(value, min(level + 1, 6), limit)}</section>\n"
    table = f"<table>\n{rows}</table>\n" if rows else ""
    return f'<div class="figures">\n{table}{sections}</div>\n'


def _is_flat(row: object) -> bool:
    return isinstance(row, Mapping) and not any(isinstance(v, Mapping | list) for v in row.values())


def _name(key: object) -> str:
    return escape(visible(str(key).replace("_", " ")))


def _cell(name: str, value: object) -> str:
    """Render a table's cell: numbers with separators, and shares in percent."""
    kind = ""
    if value is None or value in ({}, []):
        text = "-"
    elif isinstance(value, float):
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
        text = f"{100 * value:.3g} %" if name.endswith("share") else text
    elif isinstance(value, int) and not isinstance(value, bool):
        text = f"{value:,}"
    else:
        text = few(value) if isinstance(value, list) else str(value)
        if name == "verdict":
            kind = ' class="ok"' if value == "ok" else ' class="alert"'
    return f"<td{kind}>{escape(visible(text))}</td>"


PAGE = string.Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>
:root {
  color-scheme: light dark;
  --page: #f7f7f4; --card: #fff; --ink: #1f2421; --soft: #6a726d; --line: #e3e5e0;
  --on: #dcefdf; --edge: #4f9d69; --alert: #a8480b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #141615; --card: #1c1f1d; --ink: #e3e7e4; --soft: #929b95; --line: #2f3431;
    --on: #1d4029; --edge: #58a973; --alert: #f0a060;
  }
}
* { box-sizing: border-box; }
body {
  max-width: 64rem; margin: 0 auto; padding: 3rem 1.5rem 5rem;
  background: var(--page); color: var(--ink); font: 15px/1.6 system-ui, sans-serif;
}
h1 { margin: 0 0 .5rem; font-size: 1.7rem; font-weight: 650; letter-spacing: -.01em; }
h2, h3, h4, h5, h6 { margin: 0 0 .6rem; font-size: 1.1rem; font-weight: 600; }
h3, h4, h5, h6 { margin-bottom: .2rem; font-size: .9rem; }
small { font-size: .85rem; font-weight: 400; color: var(--soft); }
.legend {
  position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem;
  margin: 0 0 1rem; padding: .7rem 0; background: var(--page);
  border-bottom: 1px solid var(--line); font-size: .9rem;
}
.legend label { margin-left: auto; cursor: pointer; }
.card {
  margin: 1.5rem 0; padding: 1.4rem 1.6rem; background: var(--card);
  border: 1px solid var(--line); border-radius: 10px;
}
.card > h2 { display: flex; flex-wrap: wrap; gap: 0 1rem; align-items: baseline; }
.card > h2 small { margin-left: auto; font-variant-numeric: tabular-nums; }
.strip { display: flex; height: 4px; margin-bottom: 1.1rem; background: var(--line);
  border-radius: 2px; overflow: hidden; }
.strip .on { background: var(--edge); }
.rule { display: flex; gap: .8rem; align-items: center; margin: 1.4rem 0 .6rem; }
.rule::after { content: ""; flex: 1; border-top: 1px dashed var(--soft); opacity: .5; }
pre { margin: 0; font: 13.5px/1.75 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono",
  monospace; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.text { unicode-bidi: plaintext; }
mark { padding: .1em 0; color: inherit; background: var(--on); border-bottom: 2px solid var(--edge);
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.esc { color: var(--soft); font-size: .85em; user-select: none; }
.tokens, body:has(#toggle:checked) .text { display: none; }
body:has(#toggle:checked) .tokens { display: block; }
.token { display: inline-block; max-width: 100%; margin: 0 2px 5px 0; padding: 0 3px;
  vertical-align: top; line-height: 1.5; border: 1px solid var(--line); border-radius: 3px; }
.token.on { background: var(--on); border-color: var(--on); border-bottom-color: var(--edge); }
.token.special { font-weight: 700; }
.token i { display: block; font: 10px/1.4 system-ui, sans-serif; color: var(--soft); }
.figures { display: flex; flex-wrap: wrap; gap: 1.6rem 3rem; align-items: flex-start; }
.figures > table { min-width: 13rem; }
.figures > section:has(svg) { flex-basis: 100%; order: 1; }
.card > .figures > section { flex-basis: 100%; }
.card > .figures > section + section { padding-top: 1.6rem; border-top: 1px solid var(--line); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem 0 .22rem 1.5rem; text-align: right; font-weight: 400;
  border-bottom: 1px solid var(--line); }
th { color: var(--soft); }
th:first-child { padding-left: 0; text-align: left; }
.ok { color: var(--edge); }
.alert { color: var(--alert); font-weight: 600; }
svg { width: 34rem; max-width: 100%; font: 12px system-ui, sans-serif; }
svg text { fill: var(--soft); }
svg line { stroke: var(--line); }
svg .axis { stroke: var(--soft); }
svg .bar { fill: var(--edge); opacity: .8; }
svg line.limit { stroke: var(--alert); stroke-dasharray: 4 3; }
svg text.limit { fill: var(--alert); }
@media print {
  :root { --page: #fff; --card: #fff; --ink: #000; --soft: #555; --line: #ccc;
    --on: #dcefdf; --edge: #2f7d4a; --alert: #a8480b; }
  body { max-width: none; padding: 0; font-size: 9.5pt; print-color-adjust: exact;
    -webkit-print-color-adjust: exact; }
  .figures { gap: 1.2rem 1.5rem; }
  .figures > table { min-width: 10rem; }
  .legend { position: static; }
  .legend label { display: none; }
  .card { border: 0; padding: 0; }
  h2, h3, .strip { break-after: avoid; }
  table, svg { break-inside: avoid; }
}
</style>
<h1>$title</h1>
<p class="legend"><span><mark>trained</mark></span> <span>not trained</span>
<label><input type="checkbox" id="toggle"> token boundaries and ids</label></p>
$body</html>
""")
