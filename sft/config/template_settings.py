"""The settings of the section template: how a row becomes text, and what of it is trained."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from string import Formatter
from typing import Any

from sft.config.rules import one_of, setting


@dataclass
class TemplateConfig:
    """How a row becomes text, and which part of it is trained."""

    name: str | None = setting(None, "short name of the template")
    kind: str = setting(
        "completion",
        "completion: a prompt, then a trained completion; chat: messages in the tokenizer's chat "
        "template; text: plain text, all of it trained",
        one_of("completion", "chat", "text"),
    )
    train_on: str | None = setting(
        None,
        "which tokens are trained; null: the completion (kind=completion), every assistant turn "
        "(kind=chat) or the whole text (kind=text)",
        one_of("completion", "assistant", "last_assistant", "all"),
    )
    chat_template: str | None = setting(
        None,
        "with kind=chat: a Jinja template, a .jinja file, or the name of a template of TRL (qwen3, "
        "llama3, ...); null: the tokenizer's own",
    )
    system: str | None = setting(
        None, "with kind=chat: system message for conversations that do not begin with one"
    )
    prompts: list[str] = setting(
        [], "prompt texts with {column} fields; the first whose columns a row fills is used"
    )
    completions: list[str] = setting(
        [], "texts of the trained part with {column} fields, chosen in the same way"
    )
    append_eos: bool = setting(
        True, "true: append the EOS token to each completion or document (not with kind=chat)"
    )
    kwargs: dict[str, Any] = setting(
        {},
        "with kind=chat: values of the chat template's own switches, such as "
        "{enable_thinking: false}",
    )
    date: str | None = setting(
        None,
        "with kind=chat: the day that a chat template with a date writes, as YYYY-MM-DD; null: the "
        "day of the run's first start",
    )
    control_tokens: str | None = setting(
        None,
        "what a control token such as <|im_end|> is in the data: text or token; null: token for "
        "kind=text, else text",
        one_of("text", "token"),
    )
    bos: str | None = setting(
        None,
        "which BOS begins a sample. tokenizer: what the tokenizer puts before a document, unless "
        "the text begins with it; template: only what the template writes; null: template for "
        "kind=chat, else tokenizer",
        one_of("tokenizer", "template"),
    )


@functools.cache  # called for every row
def parts_of(text: str) -> tuple[tuple[str, str | None], ...]:
    """Split a template's text into pairs of literal text and the ``{column}`` after it, if any.

    Raises:
        ValueError: The braces of the text do not match.
    """
    parts = []
    for literal, name, how, conversion in Formatter().parse(text):
        # A field is a column and nothing else; with a format of Python's it names no column.
        rest = f"!{conversion}" * bool(conversion) + f":{how}" * bool(how)
        parts.append((literal, None if name is None else name + rest))
    return tuple(parts)


@functools.cache
def columns_of(text: str) -> tuple[str, ...]:
    """List the ``{column}`` fields of a template's text; errors are those of ``parts_of``."""
    return tuple(name for _, name in parts_of(text) if name is not None)
