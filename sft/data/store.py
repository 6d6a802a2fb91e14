"""Encode every row of every source to disk: in parallel, in order, in bounded memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from sft.config.settings import DatasetConfig
from sft.data import sources
from sft.data.documents import DOCUMENT
from sft.data.row_encoder import Encoded, RowEncoder
from sft.data.rows import BadRow, Row
from sft.data.template import Template
from sft.data.workers import batches_of, in_parallel
from sft.errors import DataError
from sft.progress import progress


@dataclass
class Store:
    """All documents of the data: tokens on disk, one record per document in memory.

    Attributes:
        ids: Token ids, shape (tokens,).
        marks: Role and trained flag of each token, shape (tokens,).
        weights: Weight of each token in the loss, shape (tokens,); None: as the flags say.
        documents: Records of ``row_encoder.DOCUMENT``, shape (documents,).
        begins: Where each document begins in ``ids``, shape (documents,).
        files: Names that ``documents["file"]`` is an index into.
        read: For each source's name, its counts of rows.
        unused: What rows fill and no sample holds; ``documents["unused"]`` is an index into it.
    """

    ids: NDArray[np.int32]
    marks: NDArray[np.uint8]
    weights: NDArray[np.float32] | None
    documents: NDArray[Any]
    begins: NDArray[np.int64]
    files: list[str]
    read: dict[str, dict[str, Any]]
    unused: list[tuple[str, ...]]


class Dropped:
    """Records every row that is left out, with its file, line and reason."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def add(self, part: str, file: str, line: int, reason: str, text: str = "") -> None:
        """Write one record."""
        reason = reason.split("\n    fix:")[0] if text else reason
        record = {"part": part, "file": file, "line": line, "reason": reason, "row": text}
        # A file's name, which may be no UTF-8, is the only text with lone surrogates here.
        written = json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self.file.write(written.decode() + "\n")


class _Writer:
    """Appends encoded batches to the files of a folder, and counts the rows of each source."""

    def __init__(
        self, ids: IO[bytes], marks: IO[bytes], weights: IO[bytes], dropped: Dropped
    ) -> None:
        self.ids, self.marks, self.weights, self.dropped = ids, marks, weights, dropped
        self.tokens = 0
        self.weighted = False  # once a weight is between 0 and 1; until then, none is written
        self.files: dict[str, int] = {}
        self.unused: dict[tuple[str, ...], int] = {}
        self.tables: list[NDArray[Any]] = []
        self.read: dict[str, dict[str, Any]] = {}
        self.reason = ""  # why the first row that was not used was not
        self.rows = 0

    def write(
        self, source: sources.Source, number: int, batch: Sequence[Row | BadRow], done: Encoded
    ) -> None:
        """Append one batch of the source with this number.

        Raises:
            DataError: None of the source's rows so far can be used.
        """
        # Not tofile, whose error on a full disk has no errno.
        self.ids.write(np.ascontiguousarray(done.ids).data)
        self.marks.write(np.ascontiguousarray(done.marks).data)
        self._write_weights(done)
        table = done.documents
        table["file"] = [
            self.files.setdefault(batch[index].file, len(self.files)) for index in table["row"]
        ]
        if len(table):
            known = [self.unused.setdefault(names, len(self.unused)) for names in done.unused]
            table["unused"] = np.array(known)[table["unused"]]
        table["row"] += self.rows
        table["source"] = number
        self.tables.append(table)
        self.rows += len(batch)
        tally = self.read[source.name]
        tally["rows"] += len(batch)
        tally["bad"] += len(done.bad)
        tally["empty"] += len(done.empty)
        for item in [*done.bad, *done.empty]:
            self.reason = self.reason or f"{item.file}:{item.line}: {item.reason}"
            self.dropped.add(source.part, *item)
        if tally["bad"] == tally["rows"] >= 1:  # the settings are wrong, not the rows
            first = done.bad[0]
            raise DataError(
                f"none of the first {tally['bad']:,} rows of {source.path} fits the template or "
                f"dataset.format:\n    {first.file}:{first.line}: {first.reason}\n"
                "    fix: correct the rows; or choose template=, dataset.format= or "
                "dataset.columns= as the rows need"
            )

    def _write_weights(self, done: Encoded) -> None:
        """Append a batch's weights; before the first fraction, ones for all earlier tokens."""
        if done.weights is not None and not self.weighted:
            self.weighted = True
            for begin in range(0, self.tokens, 1 << 20):
                self._write_ones(min(1 << 20, self.tokens - begin))
        if done.weights is not None:
            self.weights.write(np.ascontiguousarray(done.weights).data)
        elif self.weighted:
            self._write_ones(len(done.ids))
        self.tokens += len(done.ids)

    def _write_ones(self, count: int) -> None:
        self.weights.write(np.ones(count, np.float32).data)


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
    maker = RowEncoder(template, config.sanitize, config.ignore_columns)
    with (
        (folder / "ids.bin").open("wb") as ids,
        (folder / "marks.bin").open("wb") as marks,
        (folder / "weights.bin").open("wb") as weights,
    ):
        writer = _Writer(ids, marks, weights, dropped)
        for number, source in enumerate(given):
            batches = batches_of(rows_of(source, template, config), template.config.kind == "text")
            wanted = _wanted(source, given, config, samples)
            writer.read[source.name] = {"rows": 0, "bad": 0, "empty": 0}
            made = 0.0
            total = source.estimated_rows() if wanted is None else round(wanted)
            unit = "rows" if wanted is None else "samples"
            with progress(f"tokenising {_short(source.path)}", total, unit) as bar:
                for batch, done in in_parallel(maker, batches, config.num_proc, wanted is None):
                    gained = _samples_in(done.documents, config)
                    made += gained
                    bar.update(len(batch) if wanted is None else gained)
                    writer.write(source, number, batch, done)
                    if wanted is not None and made >= wanted:
                        break
            if source.roles:
                writer.read[source.name]["roles"] = dict(source.names.counts)
    return _stored(writer, folder)


def _short(path: str) -> str:
    """Return the last name of a path, at most 40 characters of it, for the progress bar."""
    return path.rstrip("/").rpartition("/")[2][-40:] or path


def _stored(writer: _Writer, folder: Path) -> Store:
    """Map the files that were written.

    Raises:
        DataError: No document was written.
    """
    documents = np.concatenate(writer.tables) if writer.tables else np.zeros(0, DOCUMENT)
    if not len(documents):
        rows = sum(tally["rows"] for tally in writer.read.values())
        raise DataError(
            f"none of the {rows:,} rows is left: {writer.reason}\n    fix: rows with an answer"
        )
    lengths = documents["length"]
    return Store(
        np.memmap(folder / "ids.bin", np.int32, "r"),
        np.memmap(folder / "marks.bin", np.uint8, "r"),
        np.memmap(folder / "weights.bin", np.float32, "r") if writer.weighted else None,
        documents,
        np.cumsum(lengths) - lengths,
        list(writer.files),
        writer.read,
        list(writer.unused),
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


def rows_of(
    source: sources.Source, template: Template, config: DatasetConfig
) -> Iterator[Row | BadRow]:
    """Yield a source's rows; with ``dataset.eval_fraction`` a single text is split in two."""
    rows = source.rows()
    if source.held_out or not config.eval_fraction:
        yield from rows
        return
    first, second = next(rows), next(rows, None)
    if template.config.kind == "text" and second is None and isinstance(first, Row):
        if isinstance(first.values.get("text"), str):
            yield from sources.halves(first, config)
            return
    yield first
    if second is not None:
        yield second
    yield from rows
