"""A sample's text in segments, and the character that keeps a user's text from being control."""

from __future__ import annotations

from typing import NamedTuple

from sft.errors import DataError

# A private-use character that is inserted into control tokens which the data holds as text, and
# removed on encoding: both halves are encoded separately, so that a user's text cannot end a turn.
TOKEN_BREAK = "\uf8f0"


class Segment(NamedTuple):
    """A part of a sample's text: whether it is trained, and its role."""

    text: str
    trained: bool
    role: str = "prompt"


class Sample(list[Segment]):
    """The segments of one sample.

    Attributes:
        prompt_differs: Whether an answer begins differently from the template's generation prompt.
    """

    prompt_differs = False


def require_no_break(text: str) -> None:
    """Refuse text that holds the character TOKEN_BREAK.

    Raises:
        DataError: The text holds it; encoding would remove it.
    """
    if TOKEN_BREAK in text:
        raise DataError("the text holds the private-use character U+F8F0, which sft reserves")


def shared_prefix(first: str, second: str) -> str:
    """Return the characters with which both texts begin."""
    pairs = enumerate(zip(first, second, strict=False))
    return first[: next((n for n, (a, b) in pairs if a != b), min(len(first), len(second)))]
