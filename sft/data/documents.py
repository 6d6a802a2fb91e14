"""Concatenate the tokens of documents, and make a record of what each has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.data.segment import TOKEN_BREAK, Segment
from sft.data.text_encoder import TokenSpan

# The roles of tokens. A token's mark is twice the index of its role, plus 1 if it is trained.
ROLES = ("prompt", "completion", "text", "system", "user", "assistant", "tool", "all")
MARKS = {(role, flag): 2 * number + flag for number, role in enumerate(ROLES) for flag in (0, 1)}
# What ``near_hash`` leaves out. str.split would find all white space, in four times as long.
WHITE_SPACE = b" \t\n\r\v\f"
OTHERS = (TOKEN_BREAK, "\u00a0", "\u3000")  # no-break space, ideographic space
# The record of one document.
DOCUMENT = np.dtype(
    [
        ("length", np.int64),  # tokens
        ("trained", np.int64),  # trained tokens
        ("last", np.int64),  # position of the last trained token; -1: none
        ("never_stops", np.bool_),  # a trained answer lacks the token that ends it
        ("hash", np.uint64),  # of its token ids
        ("near_hash", np.uint64),  # of its text in lower case, without white space
        ("row", np.int64),  # number of its row, in reading order
        ("line", np.int64),  # line of its file in which that row begins
        ("file", np.int32),  # index into the list of files
        ("source", np.int32),  # index into the list of sources
        ("control", np.bool_),  # its text holds a control token
        ("double_bos", np.bool_),
        ("unrolled", np.bool_),  # its row became several documents
        ("prompt_differs", np.bool_),  # an answer does not begin after the generation prompt
        ("empty_answers", np.bool_),  # an answer is not trained, because it is empty
        ("unused", np.int32),  # index into the list of what rows fill and no sample holds
    ]
)


class Owner(NamedTuple):
    """What a document has of its row; the names are those of DOCUMENT's fields."""

    row: int
    near_hash: int = 0
    control: bool = False
    unrolled: bool = False
    prompt_differs: bool = False
    empty_answers: bool = False
    unused: int = 0


def near_hash(segments: Sequence[Segment]) -> int:
    """Hash the text of a document in lower case, without white space.

    Any white space counts as none: after normalisation, a text with a line break at the end of its
    prompt equals one without.
    """
    text = "".join(segment.text for segment in segments).lower()
    if not text.isascii():
        for char in OTHERS:
            text = text.replace(char, "")
    return xxhash.xxh3_64_intdigest(text.encode().translate(None, WHITE_SPACE))


def joined(
    samples: Sequence[tuple[Owner, list[TokenSpan]]],
    stop_ids: Sequence[int] | None,
    bos_ids: Sequence[int],
) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.float32] | None, NDArray[Any]]:
    """Concatenate documents, and make the record of each.

    Args:
        samples: The spans of each document, and its owner.
        stop_ids: Tokens that end an answer; None for plain text, which nothing ends.
        bos_ids: What the tokenizer puts before a document.

    Returns:
        Token ids, marks and weights in the loss, shape (tokens,), and records of DOCUMENT, shape
        (documents,). The weights are None where all are 0 or 1, as the marks say.
    """
    spans = [span for _, sample in samples for span in sample]
    sizes = np.fromiter((len(ids) for ids, _, _ in spans), np.int64, len(spans))
    flat = itertools.chain.from_iterable(ids for ids, _, _ in spans)
    ids = np.fromiter(flat, np.int32, int(sizes.sum()))
    kinds = (MARKS[role, bool(trained)] for _, trained, role in spans)
    marks = np.repeat(np.fromiter(kinds, np.uint8, len(spans)), sizes)
    weights = None
    if any(0 < trained < 1 for _, trained, _ in spans):
        each = np.fromiter((trained for _, trained, _ in spans), np.float32, len(spans))
        weights = np.repeat(each, sizes)

    documents = np.zeros(len(samples), DOCUMENT)
    if not samples:
        return ids, marks, weights, documents
    counts = np.fromiter((len(sample) for _, sample in samples), np.int64, len(samples))
    firsts = np.cumsum(counts) - counts
    documents["length"] = np.add.reduceat(sizes, firsts)
    begins = np.cumsum(documents["length"]) - documents["length"]
    trained = marks & 1
    documents["trained"] = np.add.reduceat(trained, begins, dtype=np.int64)
    places = np.where(trained, np.arange(len(ids)), -1)
    last = np.maximum.reduceat(places, begins)
    if stop_ids is not None:
        documents["never_stops"] = _never_stops(ids, marks, begins, stop_ids)
    documents["last"] = np.where(last >= 0, last - begins, -1)
    ends = (begins + documents["length"]).tolist()
    pairs = zip(begins.tolist(), ends, strict=True)
    documents["hash"] = [xxhash.xxh3_64_intdigest(ids[a:b].tobytes()) for a, b in pairs]
    for name in Owner.__annotations__:
        documents[name] = [getattr(owner, name) for owner, _ in samples]
    if len(bos_ids) == 1 and len(ids) > 1:
        after = ids[np.minimum(begins + 1, len(ids) - 1)]
        bos = bos_ids[0]
        both = (ids[begins] == bos) & (after == bos) & (documents["length"] > 1)
        documents["double_bos"] = both
    return ids, marks, weights, documents


def _never_stops(
    ids: NDArray[np.int32],
    marks: NDArray[np.uint8],
    begins: NDArray[np.int64],
    stop_ids: Sequence[int],
) -> NDArray[np.bool_]:
    """Return for each document whether one of its trained spans lacks its last token.

    Of a document that is trained as a whole, an end of turn may stand anywhere.
    """
    stops = np.isin(ids, stop_ids)
    trained = (marks & 1).astype(bool)
    following = np.append(trained[1:], False)
    following[begins[1:] - 1] = False
    missing = np.logical_or.reduceat(trained & ~following & ~stops, begins)
    whole = marks[begins] == MARKS["all", 1]
    return np.where(whole, ~np.logical_or.reduceat(stops, begins), missing)
