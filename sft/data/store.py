"""Encode every row of every source to disk: in parallel, in order, in bounded memory."""

from __future__ import annotations

import collections
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from sft.config.settings import DatasetConfig
from sft.data import sources
from sft.data.readers import BadRow, Row
from sft.data.row_encoder import DOCUMENT, Encoded, RowEncoder
from sft.data.template import Template
from sft.errors import DataError

BATCH_ROWS = 1000  # rows per tokenizer call: enough for its threads, and small in memory
BATCH_CHARACTERS = 2_000_000  # in a batch of plain text
ALONE = 2  # batches encoded in this process before workers start: most data has no more


@dataclass
class Store:
    """All documents of the data: tokens on disk, one record per document in memory.

    Attributes:
        ids: Token ids, shape (tokens,).
        marks: Role and trained flag of each token, shape (tokens,).
        documents: Records of ``row_encoder.DOCUMENT``, shape (documents,).
        begins: Where each document begins in ``ids``, shape (documents,).
        files: Names that ``documents["file"]`` is an index into.
        read: For each source's name, its counts of rows.
    """

    ids: NDArray[np.int32]
    marks: NDArray[np.uint8]
    documents: NDArray[Any]
    begins: NDArray[np.int64]
    files: list[str]
    read: dict[str, dict[str, Any]]


class Dropped:
    """Records every row that is left out, with its file, line and reason."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.first: list[str] = []

    def add(self, part: str, file: str, line: int, reason: str, text: str = "") -> None:
        """Write one record."""
        reason = reason.split("\n    fix:")[0] if text else reason
        record = {"part": part, "file": file, "line": line, "reason": reason, "row": text}
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")


def encoded(
    given: Sequence[sources.Source],
    template: Template,
    config: DatasetConfig,
    folder: Path,
    dropped: Dropped,
    samples: int | None = None,
) -> Store:
    """Encode the rows of every source, in order, to files in a folder.

    Args:
        given: The sources.
        template: Renders the rows.
        config: The dataset section.
        folder: Folder of the files.
        dropped: Records every row that is left out.
        samples: Stop once there are enough rows for this many samples; None: encode all.
    """
    maker = RowEncoder(template, config.sanitize)
    files: dict[str, int] = {}
    tables: list[NDArray[Any]] = []
    read: dict[str, dict[str, Any]] = {}
    row = 0
    with (folder / "ids.bin").open("wb") as ids, (folder / "marks.bin").open("wb") as marks:
        for number, source in enumerate(given):
            tally = {"rows": 0, "bad": 0, "empty": 0}
            part = "eval" if source.held_out else "train"
            batches = _batches(_rows(source, template, config), template.config.kind == "text")
            wanted = _wanted(source, given, config, samples)
            made = 0.0
            bar = tqdm(
                desc=f"tokenising {source.path}",
                total=source.estimated_rows() if wanted is None else round(wanted),
                unit=" rows" if wanted is None else " samples",
                delay=2,  # seconds without a bar
                disable=not sys.stderr.isatty(),
            )
            for batch, done in _in_parallel(maker, batches, config.num_proc, wanted is None):
                gained = _samples_in(done.documents, config)
                made += gained
                bar.update(len(batch) if wanted is None else round(gained))
                done.ids.tofile(ids)
                done.marks.tofile(marks)
                table = done.documents
                table["file"] = [
                    files.setdefault(batch[index].file, len(files)) for index in table["row"]
                ]
                table["row"] += row
                table["source"] = number
                tables.append(table)
                row += len(batch)
                tally["rows"] += len(batch)
                tally["bad"] += len(done.bad)
                tally["empty"] += len(done.empty)
                for item in [*done.bad, *done.empty]:
                    dropped.add(part, *item)
                if done.bad and len(dropped.first) < 3:
                    dropped.first += [f"{b.file}:{b.line}: {b.reason}" for b in done.bad[:3]]
                if tally["bad"] == tally["rows"] >= 1:
                    _refuse(tally["bad"], dropped, source.path)
                if wanted is not None and made >= wanted:
                    break
            bar.close()
            read[source.name] = tally
    documents = np.concatenate(tables) if tables else np.zeros(0, DOCUMENT)
    if not len(documents):
        counts = ", ".join(f"{name}: {tally}" for name, tally in read.items())
        raise DataError(f"no document is left of the data ({counts})\n    fix: other rows")
    lengths = documents["length"]
    return Store(
        np.memmap(folder / "ids.bin", np.int32, "r"),
        np.memmap(folder / "marks.bin", np.uint8, "r"),
        documents,
        np.cumsum(lengths) - lengths,
        list(files),
        read,
    )


def _wanted(
    source: sources.Source,
    given: Sequence[sources.Source],
    config: DatasetConfig,
    samples: int | None,
) -> float | None:
    """Return how many samples a source must supply, by its weight; None: encode all rows."""
    if samples is None or source.held_out:
        return None
    weights = sum(other.weight for other in given if not other.held_out)
    return samples * source.weight / weights / config.sample / (1 - config.eval_fraction)


def _samples_in(documents: NDArray[Any], config: DatasetConfig) -> float:
    """Return a lower bound of the samples that documents become."""
    lengths = documents["length"][documents["trained"] > 0]
    if config.overlong == "drop":
        lengths = lengths[lengths <= config.max_length]
    if config.packing == "none":
        return float(len(lengths))
    if config.overlong == "truncate":
        lengths = np.minimum(lengths, config.max_length)
    return float(lengths.sum() / config.max_length)


def _refuse(count: int, dropped: Dropped, path: str) -> None:
    """Stop early if none of the first rows fits: the settings are wrong, not the rows."""
    raise DataError(
        f"none of the first {count:,} rows of {path} fits the template or dataset.format:\n"
        + "\n".join(f"    {line}" for line in dropped.first[:1])
    )


def _rows(
    source: sources.Source, template: Template, config: DatasetConfig
) -> Iterator[Row | BadRow]:
    """Yield a source's rows; with ``dataset.eval_fraction`` a single row is split in two."""
    rows = source.rows()
    if source.held_out or not config.eval_fraction:
        yield from rows
        return
    first, second = next(rows), next(rows, None)
    if second is None and isinstance(first, Row):
        yield from sources.halves(first, template.config, config)
        return
    yield first
    if second is not None:
        yield second
    yield from rows


def _batches(rows: Iterator[Row | BadRow], text: bool) -> Iterator[list[Row | BadRow]]:
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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers already use all cores
    _maker = maker


def _work(batch: list[Row | BadRow]) -> Encoded:
    assert _maker is not None
    return _maker(batch)


def _in_parallel(
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
    try:
        running: collections.deque[tuple[list[Row | BadRow], Future[Encoded]]]
        running = collections.deque()
        for batch in batches:
            running.append((batch, pool.submit(_work, batch)))
            if len(running) > 2 * processes:  # so that memory stays bounded
                oldest, done = running.popleft()
                yield oldest, done.result()
        for oldest, done in running:
            yield oldest, done.result()
    finally:
        pool.shutdown(cancel_futures=True)  # a caller that stops early does not wait for the rest
