"""Read rows that are tokenised already: ids, labels and masks, checked and obeyed."""

from __future__ import annotations

import itertools
from typing import Any

from sft.data.text_encoder import TokenSpan
from sft.data.values import MASKS, Empty, described, is_absent, parsed
from sft.errors import DataError

IGNORE_INDEX = -100
COLUMNS = ("input_ids", "labels", "position_ids", *MASKS)


def spans_of(row: dict[str, Any], vocabulary: int) -> list[TokenSpan]:
    """Return the ids of a row and which are trained; without labels and masks, all of them are.

    Args:
        row: ``input_ids``, and any of ``labels`` (-100 is not trained), ``completion_mask``,
            ``assistant_masks`` (0 is not trained) and ``attention_mask`` (0 is padding, which is
            removed), all of the same length. Other masks of ``MASKS`` are like the second.
        vocabulary: Number of the tokenizer's tokens; every id is below it.

    Raises:
        Empty: There are no ids, or all are padding.
        DataError: An id is not in the vocabulary, or the columns do not fit together.
    """
    if is_absent(row.get("input_ids")):
        raise DataError("the format tokenized needs the column input_ids")
    ids = _numbers(row, "input_ids")
    if ids and not 0 <= min(ids) <= max(ids) < vocabulary:
        place = next(i for i, token in enumerate(ids) if not 0 <= token < vocabulary)
        raise DataError(
            f"input_ids has {ids[place]} at {place}; the ids of the model's tokenizer are 0 to "
            f"{vocabulary - 1:,}"
        )
    begin, end = _without_padding(row, ids)
    if begin == end:
        raise Empty("there is nothing to train: input_ids holds no token")
    if not is_absent(row.get("position_ids")):
        positions = _numbers(row, "position_ids", len(ids))[begin:end]
        if any(after != before + 1 for before, after in itertools.pairwise(positions)):
            raise DataError(
                "position_ids begin again within the row, which holds several documents\n"
                "    fix: rows of one document each; dataset.packing joins them"
            )
    trained: dict[str, list[bool]] = {}
    if not is_absent(row.get("labels")):
        trained["labels"] = _labelled(row, ids, begin, end)
    for name in MASKS[1:]:
        if not is_absent(row.get(name)):
            trained[name] = _mask(row, name, len(ids))[begin:end]
    if not trained:
        return [(ids[begin:end], True, "text")]
    first, *others = trained
    for other in others:
        if trained[other] != trained[first]:
            pairs = zip(trained[first], trained[other], strict=True)
            place = begin + next(i for i, (one, two) in enumerate(pairs) if one is not two)
            raise DataError(f"{first} and {other} disagree at {place} on what is trained")
    spans: list[TokenSpan] = []
    marked = zip(ids[begin:end], trained[first], strict=True)
    for flag, group in itertools.groupby(marked, key=lambda pair: pair[1]):
        role = "completion" if flag else "prompt"
        spans.append(([token for token, _ in group], flag, role))
    return spans


def _numbers(row: dict[str, Any], name: str, length: int | None = None) -> list[int]:
    """Return a column of whole numbers, of the same length as ``input_ids``."""
    values = parsed(row[name], f"the column {name}")
    if not isinstance(values, list):
        raise DataError(f"the column {name} holds {described(values)}, not a list of numbers")
    if length is not None and len(values) != length:
        raise DataError(f"the row has {length} input_ids but {len(values)} {name}")
    if all(type(value) is int for value in values):
        return values
    numbers = []
    for place, value in enumerate(values):
        if isinstance(value, bool) or not isinstance(value, int | float) or value % 1 != 0:
            raise DataError(f"{name} has {described(value)} at {place}; it must be a whole number")
        numbers.append(int(value))
    return numbers


def _mask(row: dict[str, Any], name: str, length: int) -> list[bool]:
    """Return a column of zeros and ones, which may also be written as booleans."""
    values = parsed(row[name], f"the column {name}")
    if isinstance(values, list):
        values = [int(value) if isinstance(value, bool) else value for value in values]
    numbers = _numbers({name: values}, name, length)
    for place, value in enumerate(numbers):
        if value not in (0, 1):
            raise DataError(f"{name} has {value} at {place}; it must be 0 or 1")
    return [value == 1 for value in numbers]


def _without_padding(row: dict[str, Any], ids: list[int]) -> tuple[int, int]:
    """Return where the tokens that are not padding begin and end."""
    if is_absent(row.get("attention_mask")):
        return 0, len(ids)
    seen = _mask(row, "attention_mask", len(ids))
    if not any(seen):
        return 0, 0
    begin, end = seen.index(True), len(seen) - seen[::-1].index(True)
    if not all(seen[begin:end]):
        place = seen.index(False, begin)
        raise DataError(
            f"attention_mask is 0 at {place}, between tokens where it is 1; padding is removed at "
            "the beginning and at the end only"
        )
    return begin, end


def _labelled(row: dict[str, Any], ids: list[int], begin: int, end: int) -> list[bool]:
    """Return which tokens are trained by the labels; those of padding are not looked at."""
    labels = _numbers(row, "labels", len(ids))
    for place in range(begin, end):
        if labels[place] not in (IGNORE_INDEX, ids[place]):
            raise DataError(
                f"label {labels[place]} at {place} is neither {IGNORE_INDEX} nor the token there: "
                "give labels unshifted"
            )
    return [label != IGNORE_INDEX for label in labels[begin:end]]
