"""Write the preview and the audit as one HTML page without scripts or network access."""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from sft import html
from sft.data.histogram import histogram
from sft.data.preview import (
    Sample,
    Span,
    Token,
    documents_of,
    figures_of,
    tokens_of,
    untrained,
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
    body = f'<section class="card">{html.figures(audit, histogram)}</section>\n' if audit else ""
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
                note = html.text(prompt.note)
                body += f'<h3 class="rule">generation prompt <small>{note}</small></h3>\n'
                if prompt.ids:
                    body += _document_html(list(untrained(prompt.ids, tokenizer)), tokenizer)
        body += "</article>\n"
    return html.page(title, LEGEND.substitute(title=html.text(title)) + body, STYLE)


def _document_html(document: list[Span], tokenizer: PreTrainedTokenizerBase) -> str:
    text = "".join(map(_span_html, document))
    tokens = "".join(map(_token_html, tokens_of(document, tokenizer)))
    return f'<pre class="text">{text}</pre>\n<pre class="tokens">{tokens}</pre>\n'


def _span_html(span: Span) -> str:
    # Escapes are styled: the data may hold the same letters as ordinary text.
    text = html.visible(escape(span.text), '<span class="esc">{}</span>')
    return f"<mark>{text}</mark>" if span.trained else text


def _token_html(token: Token) -> str:
    kinds = "token" + " on" * token.trained + " special" * token.special
    text, end = escape(token.text).replace("\n", ""), "<br>" * ("\n" in token.text)
    return f'<span class="{kinds}">{text}<i>{token.id}</i></span>{end}'


LEGEND = string.Template("""<h1>$title</h1>
<p class="legend"><span><mark>trained</mark></span> <span>not trained</span>
<label><input type="checkbox" id="toggle"> token boundaries and ids</label></p>
""")
STYLE = """
.legend {
  position: sticky; top: 0; display: flex; flex-wrap: wrap; gap: .3rem 1.5rem;
  margin: 0 0 1rem; padding: .7rem 0; background: var(--page);
  border-bottom: 1px solid var(--line); font-size: .9rem;
}
.legend label { margin-left: auto; cursor: pointer; }
.strip { display: flex; height: 4px; margin-bottom: 1.1rem; background: var(--line);
  border-radius: 2px; overflow: hidden; }
.strip .on { background: var(--edge); }
.rule { display: flex; gap: .8rem; align-items: center; margin: 1.4rem 0 .6rem; }
.rule::after { content: ""; flex: 1; border-top: 1px dashed var(--soft); opacity: .5; }
.text { unicode-bidi: plaintext; }
mark { padding: .1em 0; color: inherit; background: var(--on); border-bottom: 2px solid var(--edge);
  -webkit-box-decoration-break: clone; box-decoration-break: clone; }
.tokens, body:has(#toggle:checked) .text { display: none; }
body:has(#toggle:checked) .tokens { display: block; }
.token { display: inline-block; max-width: 100%; margin: 0 2px 5px 0; padding: 0 3px;
  vertical-align: top; line-height: 1.5; border: 1px solid var(--line); border-radius: 3px; }
.token.on { background: var(--on); border-color: var(--on); border-bottom-color: var(--edge); }
.token.special { font-weight: 700; }
.token i { display: block; font: 10px/1.4 system-ui, sans-serif; color: var(--soft); }
@media print {
  .legend { position: static; }
  .legend label { display: none; }
  .strip { break-after: avoid; }
}
"""
