"""A sample's text in segments, and the character that keeps a user's text from being control."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A private-use character that is inserted into control tokens which the data holds as text, and
# removed on encoding: both halves are encoded separately, so that a user's text cannot end a turn.
TOKEN_BREAK = "\uf8f0"


class Segment(NamedTuple):
    """A part of a sample's text.

    Attributes:
        text: The text.
        trained: The weight of its tokens in the loss: false: they are not trained; true: 1.
        role: Its role.
    """

    text: str
    trained: float
    role: str = "prompt"


class Sample(list[Segment]):
    """The segments of one sample.

    Attributes:
        prompt_differs: Whether an answer begins differently from the template's generation prompt.
    """

    prompt_differs = False


def control_of(tokenizer: PreTrainedTokenizerBase, source: str) -> re.Pattern[str]:
    """Match a control token: a special token, or an added token that a template writes.

    Args:
        tokenizer: The tokenizer.
        source: All that the template may write of itself.
    """
    names = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        # Some tokenizers have runs of spaces and HTML tags as added tokens, which are text.
        if token.special or (token.content.strip() and token.content in source)
    ]
    # Longest first, so that no token matches as the beginning of a longer one.
    names.sort(key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def as_text(text: str, control: re.Pattern[str] | None) -> str:
    """Insert TOKEN_BREAK into the control tokens, if any are given, that a text of the data holds.

    Raises:
        DataError: The text holds TOKEN_BREAK.
    """
    require_no_break(text)
    if control is None:
        return text
    return control.sub(lambda found: found[0][0] + TOKEN_BREAK + found[0][1:], text)


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
