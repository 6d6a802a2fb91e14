"""Fill the texts of a template, which come in variants, with the columns of a row."""

from __future__ import annotations

import functools
import re
from typing import Any

from sft.config.template_settings import columns_of, parts_of
from sft.data.formats import PAIRS
from sft.data.segment import as_text
from sft.data.values import is_filled, text_of
from sft.errors import DataError

Filled = tuple[str, tuple[str, ...]]  # a text, and the columns that it used


# The columns of all formats, and what some data has beside them.
_OF_FORMATS = frozenset(("response",)).union(*PAIRS.values())


@functools.cache
def _in_order(variants: tuple[str, ...], format: str) -> list[str]:
    """Put variants that use only the columns of other formats last."""
    own = PAIRS.get(format)
    return sorted(variants, key=lambda text: own is not None and _is_foreign(text, own))


def _is_foreign(variant: str, own: frozenset[str]) -> bool:
    columns = set(columns_of(variant))
    return bool(columns) and columns <= _OF_FORMATS and columns.isdisjoint(own)


def fill(
    variants: list[str], row: dict[str, Any], format: str, control: re.Pattern[str] | None = None
) -> Filled | None:
    """Fill the first variant whose columns are all filled in the row.

    Args:
        variants: The texts of the template.
        row: The row.
        format: Its format, whose columns are preferred to those of the other formats: some data has
            the whole text, answer included, in a column of its own.
        control: Control tokens that are text in the columns; None: they are control tokens there.

    Returns:
        The text and the columns that it used; None if there is no such variant.

    Raises:
        DataError: One of its columns holds neither text nor a finite number.
    """
    for variant in _in_order(tuple(variants), format):
        names = columns_of(variant)
        values, is_text = {}, True
        for name in names:
            value = row.get(name)
            if not value and not is_filled(value):
                break
            values[name] = value
            is_text = is_text and type(value) is str
        else:
            if not is_text:
                values = {
                    name: text_of(item, f"the column {name}") for name, item in values.items()
                }
            values = {name: as_text(str(text), control) for name, text in values.items()}
            # A column's name is taken as it is: str.format would read an attribute after a dot.
            parts = (
                text if name is None else f"{text}{values[name]}"
                for text, name in parts_of(variant)
            )
            return "".join(parts), names
    return None


def require_filled(
    found: Filled | None, variants: list[str], row: dict[str, Any], what: str, template: str
) -> Filled:
    """Return a text that was filled.

    Args:
        found: What ``fill`` returned.
        variants: The texts of the template.
        row: The row.
        what: What the texts are, for the message: prompt, completion or text.
        template: The template's name.

    Raises:
        DataError: The row fills no variant.
    """
    if found is None:
        needed = " or ".join(
            " + ".join(columns_of(variant)) or repr(variant) for variant in variants
        )
        given = ", ".join(name for name, value in row.items() if is_filled(value))
        fix = f"dataset.columns.{columns_of(variants[0])[0]}=COLUMN, or a different template"
        raise DataError(
            f"template={template} cannot render a {what} of this row: it needs the columns "
            f"{needed}; the row fills {given or 'none'}\n    fix: {fix}"
        )
    return found
