"""Group rows into batches and encode these in order, in worker processes if there are many."""

from __future__ import annotations

import collections
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from sft import process
from sft.data.row_encoder import Encoded, RowEncoder
from sft.data.rows import BadRow, Row
from sft.errors import DataError

BATCH_ROWS = 1000  # rows per tokenizer call: enough for its threads, and small in memory
BATCH_CHARACTERS = 2_000_000  # in a batch of plain text
ALONE = 2  # batches encoded in this process before workers start: most data has no more


def batches_of(rows: Iterator[Row | BadRow], text: bool) -> Iterator[list[Row | BadRow]]:
    """Group rows; plain text, whose rows may be whole books, also by its characters."""
    batch: list[Row | BadRow] = []
    size = 0
    for row in rows:
        batch.append(row)
        if text and isinstance(row, Row):
            size += len(str(row.values.get("text", "")))
        if len(batch) == BATCH_ROWS or size > BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


_maker: RowEncoder | None = None


def _begin_worker(maker: RowEncoder) -> None:
    global _maker
    # Otherwise a worker whose run was killed would wait for its next batch for ever.
    process.end_with_parent(signal.SIGKILL)
    # Ctrl-C reaches all processes of a terminal; the run itself then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers already use all cores
    _maker = maker


def _work(batch: list[Row | BadRow]) -> Encoded:
    assert _maker is not None
    return _maker(batch)


def in_parallel(
    maker: RowEncoder, batches: Iterator[list[Row | BadRow]], num_proc: int | None, ahead: bool
) -> Iterator[tuple[list[Row | BadRow], Encoded]]:
    """Encode batches, in order: in this process if they are few, else in workers.

    Args:
        maker: Encodes a batch.
        batches: Batches of rows.
        num_proc: Number of workers; None: one per core.
        ahead: Read ``ALONE`` + 1 batches before the first is encoded, to know whether they are few.
            Otherwise encode ``ALONE`` batches first, because reading may stop after these.
    """
    alone = ALONE
    if ahead:
        first = list(itertools.islice(batches, ALONE + 1))
        batches = itertools.chain(first, batches)
        alone = 0 if len(first) > ALONE else ALONE
    for batch in itertools.islice(batches, alone):
        yield batch, maker(batch)
    following = next(batches, None)
    if following is None:
        return
    batches = itertools.chain([following], batches)
    maker.encoder.accelerate()
    processes = num_proc or len(os.sched_getaffinity(0))
    if processes == 1:
        for batch in batches:
            yield batch, maker(batch)
        return
    # Fork, so that workers inherit the tokenizer; sft has started no threads yet.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, _begin_worker, (maker,))
    running: collections.deque[tuple[list[Row | BadRow], Future[Encoded]]] = collections.deque()
    try:
        for batch in batches:
            running.append((batch, pool.submit(_work, batch)))
            if len(running) > 2 * processes:  # so that memory stays bounded
                oldest, done = running.popleft()
                yield oldest, done.result()
        for oldest, done in running:
            yield oldest, done.result()
    except BrokenProcessPool as error:
        raise DataError(
            f"one of {processes} processes that tokenise was killed, most likely for lack of memory"
            "\n    fix: dataset.num_proc=1"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)  # a caller that stops early does not wait for the rest
