"""Decide what a value in a row means: text, a flag or nothing; everything else is a bad row."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any

from sft.errors import DataError

SHOWN = 60  # characters of a value in a message
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
MASKS = (
    *("attention_mask", "completion_mask", "assistant_masks", "assistant_mask"),
    *("assistant_tokens_mask", "loss_mask", "label_mask", "response_mask"),
)
_MEDIA_FIX = "leave such rows out; sft trains on text only"
_TOKENS_FIX = "rows with input_ids, which dataset.format=tokenized reads"
# Columns whose meaning is known: to ignore one changes what is trained. Each has its fix.
KNOWN = {
    "context": "prompts in the template that use {context}, as template=completion has them, or "
    "dataset.columns.input=context for template=alpaca",
    "input": "prompts in the template that use {input}, as template=alpaca has them",
    "history": "template=chat or template=plain-chat",
    "system": "template=chat or template=plain-chat",
    "tools": "template=chat or template=plain-chat",
    "functions": "template=chat or template=plain-chat",
    "system_prompt": "dataset.columns.system=system_prompt",
    "chat_template_kwargs": "template.kwargs, which are the same for all rows",
    "documents": "rows that hold them in a message",
    **dict.fromkeys(MEDIA, _MEDIA_FIX),
    **dict.fromkeys((*MASKS, "labels"), _TOKENS_FIX),
    "prompt_mask": _TOKENS_FIX + ", and completion_mask or labels",
    "reasoning_content": "template=chat for a text as completion, or reasoning_content within the "
    "message of the answer",
    "seq_lengths": "rows of one document each; dataset.packing joins them",
}
# Keys of messages that say, in other words than FLAGS_OF_MESSAGES, what of them is trained.
KNOWN_OF_MESSAGES = KNOWN | dict.fromkeys(
    ("mask", "masked", "loss_mask", "loss_scale", "train_detail"),
    "train: true or false, or a weight from 0 to 1, in each message",
)
_KNOWN_OF_TOKENS = frozenset((*MEDIA, "prompt_mask", "seq_lengths"))
_PLAIN = frozenset((str, int, bool, list, dict, bytes, type(None)))


class Empty(DataError):
    """A row has the columns to be trained, but nothing in them is to be trained."""


def is_absent(value: Any) -> bool:
    """Return whether a value is null, NaN or NaT, which is the only value unequal to itself."""
    return value is None or (type(value) not in _PLAIN and (value != value) is True)


def is_filled(value: Any) -> bool:
    """Return whether a value is neither absent nor empty."""
    if type(value) in _PLAIN:
        return bool(value) or type(value) in (int, bool)  # 0 and false are values
    return not is_absent(value) and not (isinstance(value, str | list | dict) and not value)


def present(row: dict[str, Any]) -> dict[str, Any]:
    """Return the row with None for each value that is absent."""
    for value in row.values():
        if type(value) not in _PLAIN and is_absent(value):
            return {key: None if is_absent(item) else item for key, item in row.items()}
    return row


def text_of(value: Any, place: str) -> str:
    """Return a value as the text that a template writes.

    Args:
        value: Text, or a finite number, which is written as in JSON.
        place: The column or message that holds it, for the error.

    Raises:
        DataError: It is something else.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float | Decimal) and math.isfinite(value):
        return str(value)  # the same characters as in JSON
    raise DataError(
        f"{place} holds {described(value)}; a template writes text and finite numbers only\n"
        "    fix: write the value as text, or name a different column in dataset.columns"
    )


def described(value: Any) -> str:
    """Return a value and its kind, for an error."""
    if isinstance(value, bool):
        return f"the boolean {json.dumps(value)}"
    if isinstance(value, int | float | Decimal):
        return f"the number {str(value)[:SHOWN]}"
    if isinstance(value, str | list | dict):
        shown = json.dumps(value, ensure_ascii=False, default=str)
        kind = {str: "the text", list: "the list", dict: "the object"}
        name = next(kind[known] for known in kind if isinstance(value, known))
        return f"{name} {shown if len(shown) <= SHOWN else shown[:SHOWN] + '...'}"
    return f"a value of type {type(value).__name__}"


def parsed(value: Any, place: str) -> Any:
    """Return a value, parsed if it is JSON text, as tables hold lists and objects.

    Raises:
        DataError: The text is not JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise DataError(f"{place} is not valid JSON: {error}") from None


def unused(
    row: Mapping[str, Any], names: Iterable[str], template: str, tokens: bool
) -> tuple[str, ...]:
    """List those columns of a row, of those that were not used, that it fills.

    Args:
        row: The row.
        names: Columns that were not used.
        template: The template's name, for the error.
        tokens: Whether the row's text is given as token ids: its other columns tell nothing new.

    Raises:
        DataError: One of them has a meaning that changes what should be trained.
    """
    # A table writes an empty list or object as text.
    left = [name for name in names if is_filled(row[name]) and row[name] not in ("[]", "{}")]
    known = _KNOWN_OF_TOKENS if tokens else KNOWN.keys()
    if not known.isdisjoint(left):
        refuse(sorted(known & set(left)), template)
    # A pair that was judged, as for KTO.
    if "label" in left and row.get("completion") and str(row["label"]).lower() == "false":
        raise DataError(
            "the row has label=false: its completion is one not to learn\n"
            "    fix: leave such rows out, or dataset.ignore_columns=[label]"
        )
    return tuple(sorted(left))


def is_known(name: str) -> bool:
    """Return whether a key of a message (COLUMN.KEY) has a known meaning."""
    return name.rpartition(".")[2] in KNOWN_OF_MESSAGES


def refuse(names: list[str], template: str) -> None:
    """Refuse columns or keys of known meaning that are not used.

    Raises:
        DataError: There are any.
    """
    if names:
        fix = KNOWN_OF_MESSAGES[names[0].rpartition(".")[2]]
        raise DataError(
            f"template={template} does not use the column {names[0]}, which the row fills\n"
            f"    fix: {fix}; or dataset.ignore_columns=[{','.join(names)}]"
        )


def without(row: dict[str, Any], ignored: Iterable[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Remove ignored columns, and ignored keys of messages (COLUMN.KEY), from a row.

    Returns:
        The rest of the row, and the names of what it filled and was removed.
    """
    kept, removed = dict(row), []
    for name in ignored:
        column, _, key = name.partition(".")
        items = kept.get(column)
        if key and isinstance(items, str):  # a table holds messages as JSON text
            with contextlib.suppress(ValueError):
                items = json.loads(items)
        if name in kept:
            if is_filled(kept.pop(name)):
                removed.append(name)
        elif key and isinstance(items, list):
            if any(isinstance(item, dict) and is_filled(item.get(key)) for item in items):
                removed.append(name)
            kept[column] = [
                {other: value for other, value in item.items() if other != key}
                if isinstance(item, dict)
                else item
                for item in items
            ]
    return kept, tuple(removed)
