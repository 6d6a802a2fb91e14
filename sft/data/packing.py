"""Which stretch of which document goes into which block: overlong documents, packing, chunking.

Nothing here touches tokens: a plan is made from lengths, and filled in by ``sft.data.prepare``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass
class Plan:
    """Blocks made of pieces of documents.

    Attributes:
        document: Index of each piece's document, shape (pieces,).
        start: Where the piece begins in its document, shape (pieces,).
        stop: Where it ends, shape (pieces,).
        first: Index of each block's first piece, and the number of pieces, shape (blocks + 1,).
    """

    document: Ints
    start: Ints
    stop: Ints
    first: Ints

    @property
    def blocks(self) -> int:
        """Count the blocks."""
        return len(self.first) - 1

    def keep(self, share: float) -> Plan:
        """Keep a share of the blocks, evenly spaced."""
        if share >= 1:
            return self
        numbers = np.arange(self.blocks)
        chosen = np.flatnonzero(np.floor((numbers + 1) * share) > np.floor(numbers * share))
        return self.take([np.arange(self.first[i], self.first[i + 1]) for i in chosen.tolist()])

    def take(self, blocks: list[Ints]) -> Plan:
        """Make blocks of these pieces."""
        order = np.concatenate(blocks) if blocks else np.zeros(0, np.int64)
        first = np.concatenate([[0], np.cumsum([len(block) for block in blocks])]).astype(np.int64)
        return Plan(self.document[order], self.start[order], self.stop[order], first)


def whole(documents: Ints, lengths: Ints, max_length: int) -> Plan:
    """Put each document, up to ``max_length`` of it, into a block of its own."""
    count = len(documents)
    stops = np.minimum(lengths[documents], max_length)
    return Plan(documents, np.zeros(count, np.int64), stops, np.arange(count + 1))


def split(documents: Ints, lengths: Ints, max_length: int) -> Plan:
    """Cut long documents into pieces of ``max_length``, each a block.

    A piece begins with the last token of the one before it: as context only, so that the loss sees
    each token of a document once.
    """
    step = max_length - 1
    counts = np.maximum(1, -(-(lengths[documents] - 1) // step))
    document = np.repeat(documents, counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * step
    stop = np.minimum(start + max_length, lengths[document])
    return Plan(document, start, stop, np.arange(len(document) + 1))


def best_fit(plan: Plan, max_length: int) -> Plan:
    """Pack pieces, the longest first, each into the fullest block that still has room.

    Best-fit decreasing over the whole dataset; it leaves some 0 to 2 % of the room empty where
    there are short pieces to fill it with.
    """
    sizes = plan.stop - plan.start
    order = np.argsort(-sizes, kind="stable")
    rooms: dict[int, list[int]] = {}  # room left: blocks that have it
    open_rooms = 0  # the same as a bit set, to find the least room that is enough
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

    A block that goes on with a document begins with the last token of the block before: as context
    only, so that the loss sees each token once. Documents that are not ``isolated`` are one.
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
) -> Plan:
    """Cut windows that begin just after the last boundary token of the window before.

    Windows thus overlap, and begin at a sentence or line where there is one; a window without a
    boundary is followed at its end. As in the dataset tokenizer of the reference systems.

    Args:
        documents: In stream order.
        lengths: Of all documents.
        max_length: Of a window.
        boundaries: Positions of boundary tokens in the stream, ascending.
        whole_character: Moves a window's end back where it would split a character.
    """

    def following(start: int, stop: int) -> int:
        index = int(np.searchsorted(boundaries, stop)) - 1
        after = int(boundaries[index]) + 1 if index >= 0 else 0
        return after if after > start else stop

    return _stream(documents, lengths, max_length, following, whole_character)


def _stream(
    documents: Ints,
    lengths: Ints,
    max_length: int,
    following: Callable[[int, int], int],
    ending: Callable[[int], int],
) -> Plan:
    """Cut the stream of the joined documents into windows."""
    ends = np.cumsum(lengths[documents])
    begins = ends - lengths[documents]
    total = int(ends[-1]) if len(ends) else 0
    pieces: list[tuple[int, int, int]] = []
    first = [0]
    start = 0
    while start < total:
        stop = min(start + max_length, total)
        stop = stop if stop == total else ending(stop)
        for index in range(int(np.searchsorted(ends, start, "right")), len(documents)):
            if begins[index] >= stop:
                break
            begin = int(begins[index])
            low, high = max(start, begin), min(stop, int(ends[index]))
            pieces.append((int(documents[index]), low - begin, high - begin))
        first.append(len(pieces))
        start = total if stop == total else following(start, stop)
    columns = np.array(pieces, dtype=np.int64).reshape(-1, 3).T
    return Plan(columns[0], columns[1], columns[2], np.array(first, dtype=np.int64))


def chunks(plan: Plan, size: int) -> Iterator[tuple[int, int]]:
    """Yield (from, to) ranges of ``size`` blocks."""
    for begin in range(0, plan.blocks, size):
        yield begin, min(begin + size, plan.blocks)
