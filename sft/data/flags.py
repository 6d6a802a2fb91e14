"""Read the flags and weights of rows and messages, which say how much of them is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sft.data.values import SHOWN, Empty, is_filled
from sft.errors import DataError

# Keys of a row or of a message that say whether it is trained. OpenAI's fine-tuning files have
# weight, Axolotl's have training. A value between 0 and 1 is a weight of messages only.
FLAGS = frozenset(("train", "training", "weight", "loss_weight"))
FLAGS_OF_MESSAGES = FLAGS | {"loss"}  # ms-swift's; a row may have its loss by some model
WEIGHTS = frozenset(("weight", "loss_weight"))  # those of a message may be fractions
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")


def flag_of(
    values: Mapping[str, Any],
    place: str,
    names: frozenset[str] = FLAGS,
    prefix: str = "",
    fractions: frozenset[str] = frozenset(),
) -> float | None:
    """Return the weight of a row or a message in the loss, by its flags; None: it has none.

    Args:
        values: The row or the message.
        place: Its name, for the error.
        names: Keys to obey.
        prefix: What ``dataset.ignore_columns`` writes before a key.
        fractions: Keys whose value may be between 0 and 1.

    Returns:
        0: it is not trained; 1: it is; between: its tokens count as much less.

    Raises:
        DataError: A flag has another value, or two flags disagree.
    """
    if names.isdisjoint(values):
        return None
    found: dict[str, float] = {}
    for name in sorted(names & values.keys()):
        value = values[name]
        if not is_filled(value):
            continue
        text = str(value).strip().lower()
        if text in _TRUE or text in _FALSE:
            found[name] = float(text in _TRUE)
        elif name in fractions and 0 < _number(value) < 1:
            found[name] = _number(value)
        else:
            between = ", and a fraction less" if name in fractions else ""
            fix = "from 0 to 1" if name in fractions else "0 or 1, a weight in each message"
            raise DataError(
                f"{place} has {name}={str(value)[:SHOWN]}: 1 or true trains it, 0 or false does "
                f"not{between}; there are no other weights\n"
                f"    fix: {fix}, the weight of a source in dataset.mix, or "
                f"dataset.ignore_columns=[{prefix}{name}]"
            )
    weights = {value for name, value in found.items() if name in WEIGHTS}
    if len({value > 0 for value in found.values()}) > 1 or len(weights) > 1:
        raise DataError(f"{place} has flags that disagree: {', '.join(found)}")
    return min(found.values(), default=None)


def _number(value: Any) -> float:
    """Return a number, which may be written as text; NaN if it is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan


def require_trained(row: Mapping[str, Any], names: frozenset[str] = FLAGS) -> None:
    """Refuse a row whose flags say that it is not trained.

    Raises:
        Empty: They say so.
    """
    if flag_of(row, "the row", names) == 0:
        name = next(name for name in sorted(names) if is_filled(row.get(name)))
        raise Empty(f"there is nothing to train: the row has {name}={row[name]}")
