"""Plan which slice of which document goes into which block: truncate, split, pack and chunk.

A plan is made from lengths alone; ``sft.data.blocks`` fills in the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass
class Plan:
    """Blocks that consist of slices of documents.

    Attributes:
        document: Index of each slice's document, shape (slices,).
        start: Where the slice begins in its document, shape (slices,).
        stop: Where it ends, shape (slices,).
        first: Index of each block's first slice, and the number of slices, shape (blocks + 1,).
        repeated: Tokens at the slice's start that the block before has too, shape (slices,).
    """

    document: Ints
    start: Ints
    stop: Ints
    first: Ints
    repeated: Ints

    @property
    def blocks(self) -> int:
        """Return the number of blocks."""
        return len(self.first) - 1

    def keep(self, share: float) -> Plan:
        """Return a plan with a share of the blocks, evenly spaced."""
        if share >= 1:
            return self
        numbers = np.arange(self.blocks)
        chosen = np.flatnonzero(np.floor((numbers + 1) * share) > np.floor(numbers * share))
        return self.take([np.arange(self.first[i], self.first[i + 1]) for i in chosen.tolist()])

    def take(self, blocks: list[Ints]) -> Plan:
        """Return a plan whose blocks consist of these slices."""
        order = np.concatenate(blocks) if blocks else np.zeros(0, np.int64)
        first = np.concatenate([[0], np.cumsum([len(block) for block in blocks])]).astype(np.int64)
        return Plan(
            self.document[order], self.start[order], self.stop[order], first, self.repeated[order]
        )


def whole(documents: Ints, lengths: Ints, max_length: int) -> Plan:
    """Put each document, cut to ``max_length`` tokens, into a block of its own."""
    count = len(documents)
    stops = np.minimum(lengths[documents], max_length)
    zeros = np.zeros(count, np.int64)
    return Plan(documents, zeros, stops, np.arange(count + 1), zeros)


def split(documents: Ints, lengths: Ints, max_length: int) -> Plan:
    """Split long documents into slices of ``max_length`` tokens, each a block.

    A slice begins with the last token of the slice before it, which is context only: the loss sees
    each token of a document once.
    """
    step = max_length - 1
    counts = np.maximum(1, -(-(lengths[documents] - 1) // step))
    document = np.repeat(documents, counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * step
    stop = np.minimum(start + max_length, lengths[document])
    repeated = (number > 0).astype(np.int64)
    return Plan(document, start, stop, np.arange(len(document) + 1), repeated)


def best_fit(plan: Plan, max_length: int) -> Plan:
    """Pack slices, the longest first, each into the fullest block that still has room.

    This is best-fit decreasing over the whole dataset. It leaves 0 to 2 % of the blocks empty if
    there are enough short slices.
    """
    sizes = plan.stop - plan.start
    order = np.argsort(-sizes, kind="stable")
    rooms: dict[int, list[int]] = {}  # free tokens: blocks with so many
    open_rooms = 0  # the keys of rooms as a bit set, to find the smallest that is enough
    blocks: list[list[int]] = []
    for piece, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        enough = open_rooms >> size
        if enough:
            room = (enough & -enough).bit_length() - 1 + size
            block = rooms[room].pop()
            if not rooms[room]:
                open_rooms &= ~(1 << room)
            blocks[block].append(piece)
        else:
            room, block = max_length, len(blocks)
            blocks.append([piece])
        left = room - size
        if left:
            rooms.setdefault(left, []).append(block)
            open_rooms |= 1 << left
    return plan.take([np.array(block) for block in blocks])


def wrapped(documents: Ints, lengths: Ints, max_length: int, isolated: bool) -> Plan:
    """Cut the joined documents into blocks of ``max_length``; the last may be shorter.

    A block that starts inside a document begins with the last token of the block before, which is
    context only: the loss sees each token once. If not ``isolated``, all documents count as one.
    """
    ends = np.cumsum(lengths[documents])

    def following(_: int, stop: int) -> int:
        between = isolated and ends[np.searchsorted(ends, stop)] == stop
        return stop if between else stop - 1

    return _stream(documents, lengths, max_length, following, lambda stop: stop)


def at_boundaries(
    documents: Ints,
    lengths: Ints,
    max_length: int,
    boundaries: Ints,
    whole_character: Callable[[int], int],
    once: bool,
    isolated: bool,
) -> Plan:
    """Cut windows that begin just after the last boundary token of the window before.

    Windows therefore overlap, and begin at a sentence or line. If a window has no boundary, the
    next one begins at its end. The dataset tokenizer of the reference systems does the same.

    If each token is to be trained once, a window that would begin inside a document and share no
    token with the window before begins one token earlier: without context, its first token could
    not be predicted. Of isolated documents it repeats only the one that it goes on with.

    Args:
        documents: Documents in the order in which they are joined.
        lengths: Lengths of all documents.
        max_length: Length of a window.
        boundaries: Positions of boundary tokens in the joined documents, ascending.
        whole_character: Moves a window's end back if it would split a character.
        once: Whether each token is to be trained once.
        isolated: Whether documents do not attend to each other.
    """
    ends = np.cumsum(lengths[documents])
    begins = ends - lengths[documents]

    def following(start: int, stop: int) -> int:
        index = int(np.searchsorted(boundaries, stop)) - 1
        after = int(boundaries[index]) + 1 if index >= 0 else 0
        after = after if after > start else stop
        if not once:
            return after
        # The document that the window before breaks off in; without isolation, all are one.
        begin = int(begins[np.searchsorted(ends, stop, "right")]) if isolated else 0
        return stop if begin == stop else max(begin, min(after, stop - 1))

    return _stream(documents, lengths, max_length, following, whole_character)


def _stream(
    documents: Ints,
    lengths: Ints,
    max_length: int,
    following: Callable[[int, int], int],
    ending: Callable[[int], int],
) -> Plan:
    """Cut the joined documents into windows."""
    ends = np.cumsum(lengths[documents])
    begins = ends - lengths[documents]
    total = int(ends[-1]) if len(ends) else 0
    pieces: list[tuple[int, int, int, int]] = []
    first = [0]
    start = reached = 0
    while start < total:
        stop = min(start + max_length, total)
        stop = stop if stop == total else ending(stop)
        for index in range(int(np.searchsorted(ends, start, "right")), len(documents)):
            if begins[index] >= stop:
                break
            begin = int(begins[index])
            low, high = max(start, begin), min(stop, int(ends[index]))
            repeated = min(max(reached - low, 0), high - low)
            pieces.append((int(documents[index]), low - begin, high - begin, repeated))
        first.append(len(pieces))
        reached = max(reached, stop)
        start = total if stop == total else following(start, stop)
    columns = np.array(pieces, dtype=np.int64).reshape(-1, 4).T
    first_slices = np.array(first, dtype=np.int64)
    return Plan(columns[0], columns[1], columns[2], first_slices, columns[3])


def chunks(plan: Plan, size: int) -> Iterator[tuple[int, int]]:
    """Yield (from, to) ranges of ``size`` blocks."""
    for begin in range(0, plan.blocks, size):
        yield begin, min(begin + size, plan.blocks)
