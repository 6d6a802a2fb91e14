"""Rows become samples on disk: once for all ranks, in parallel, cached by content."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft.config import CHECKS, PACKAGE_DIR, DatasetConfig
from sft.data import artefact, packing, sources
from sft.data.audit import Counts, describe_lengths, gate
from sft.data.encode import DOCUMENT, IGNORE_INDEX, ROLES, Encoded, RowEncoder
from sft.data.readers import BadRow, Row, cache_dir
from sft.data.template import Template
from sft.errors import DataError
from sft.files import write_text

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

BATCH_ROWS = 1000  # rows a tokenizer call; large enough for its threads, small in memory
BATCH_CHARACTERS = 2_000_000  # of plain text
ALONE = 4  # batches encoded in this process before others are started: most data needs none
BLOCKS = 1000  # blocks written at once
# What changes neither tokens nor labels.
NOT_IN_KEY = {"name", "exact_match", "num_proc", "stop_above", "warn_above", "max_bad_fraction"}

logger = logging.getLogger("sft")


@dataclass
class Samples:
    """``input_ids``, ``labels`` and, of packed samples, ``seq_lengths``; and what was counted."""

    dataset: Dataset
    counts: Counts


@dataclass
class Prepared:
    """What a run trains and evaluates on.

    Attributes:
        train: To train on.
        eval: Held out.
        folder: Where the samples, ``data.json`` and ``dropped.jsonl`` are.
    """

    train: Samples
    eval: Samples | None
    folder: Path

    @property
    def parts(self) -> dict[str, Counts]:
        """Give the counts by part."""
        parts = {"train": self.train.counts}
        return parts if self.eval is None else {**parts, "eval": self.eval.counts}


def prepare(
    config: DatasetConfig,
    template: Template,
    seed: int,
    show: Callable[[dict[str, Counts], DatasetConfig], None] | None = None,
) -> Prepared:
    """Tokenise, pack and audit the data, or read what was made of the same before.

    Call it before a process group exists: one process of a machine does the work, while the others
    wait for as long as it takes.

    Args:
        config: The dataset section.
        template: What is rendered, and what of it is trained.
        seed: Of the held-out rows, and of what is random in the mixture.
        show: Is given the counts before they are held against their limits.

    Raises:
        DataError: The data cannot be read, or must not be trained on.
    """
    prepared = artefact.load(config, template.tokenizer) or _cached(config, template, seed)
    if show is not None:
        show(prepared.parts, config)
    for warning in gate(prepared.parts, config, str(prepared.folder / "dropped.jsonl")):
        logger.info("warning: %s", warning)
    return prepared


def _cached(config: DatasetConfig, template: Template, seed: int) -> Prepared:
    from filelock import FileLock

    key = _key(config, template, seed)
    folder = cache_dir() / "data" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not (folder / "data.json").is_file():
        lock = FileLock(f"{folder}.lock")  # the kernel frees it when its owner dies
        with lock:
            if not (folder / "data.json").is_file():
                partial = folder.with_name(f"{key}.partial")
                shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
                shutil.rmtree(folder, ignore_errors=True)
                partial.mkdir()
                try:
                    _make(config, template, seed, partial)
                except BaseException:
                    shutil.rmtree(partial, ignore_errors=True)
                    raise
                partial.rename(folder)
    from datasets import Dataset

    audit = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    parts = {
        name: Samples(Dataset.from_file(str(folder / f"{name}.arrow")), Counts(**counts))
        for name, counts in audit["parts"].items()
    }
    return Prepared(parts["train"], parts.get("eval"), folder)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identify a tokenizer by what it does, not by its name."""
    if tokenizer.is_fast:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        # These it changes itself, from call to call.
        text = json.dumps({**settings, "truncation": None, "padding": None})
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256((text + special).encode()).hexdigest()[:32]


def _key(config: DatasetConfig, template: Template, seed: int) -> str:
    """Name what the samples are made from: data, tokenizer, template, options and our own code."""
    code = hashlib.sha256()
    for path in sorted((PACKAGE_DIR / "data").glob("*.py")):
        code.update(path.read_bytes())
    settings = dataclasses.asdict(config)
    uses_seed = config.eval_fraction or config.mix or config.order == "random"
    chat = template.chat is not None
    ingredients = {
        "code": code.hexdigest(),
        "sources": [source.fingerprint() for source in sources.of(config)],
        "settings": {key: settings[key] for key in sorted(settings.keys() - NOT_IN_KEY)},
        "template": dataclasses.asdict(template.config),
        "chat_template": template.tokenizer.chat_template if chat else None,
        "tokenizer": tokenizer_hash(template.tokenizer),
        "seed": seed if uses_seed else None,
    }
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@dataclass
class _Store:
    """Every document of the data: tokens on disk, one record each in memory.

    Attributes:
        ids: Token ids, shape (tokens,).
        marks: Role and trained flag of each token, shape (tokens,).
        documents: Records of ``encode.DOCUMENT``, shape (documents,).
        begins: Where each begins in ``ids``, shape (documents,).
        files: Names that ``documents["file"]`` points to.
        read: Source's name: what was read of it.
    """

    ids: NDArray[np.int32]
    marks: NDArray[np.uint8]
    documents: NDArray[Any]
    begins: NDArray[np.int64]
    files: list[str]
    read: dict[str, dict[str, Any]]


class _Dropped:
    """Keeps every row that is left out, with its place and the reason."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.first: list[str] = []

    def add(self, part: str, file: str, line: int, reason: str, text: str = "") -> None:
        """Note one."""
        reason = reason.split("\n    fix:")[0] if text else reason
        record = {"part": part, "file": file, "line": line, "reason": reason, "row": text}
        self.file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _make(config: DatasetConfig, template: Template, seed: int, folder: Path) -> None:
    """Prepare every part into a folder; ``data.json`` comes last."""
    given = sources.of(config)
    with (folder / "dropped.jsonl").open("w", encoding="utf-8") as file:
        dropped = _Dropped(file)
        store = _encoded(given, template, config, folder, dropped)
        held_out = _held_out(store, given, config, seed)
        parts: dict[str, Counts] = {}
        for name, mask in (("train", ~held_out), ("eval", held_out)):
            if name == "eval" and not (mask.any() or any(s.held_out for s in given)):
                continue
            part = _Part(name, store, np.flatnonzero(mask), config, template, dropped)
            part.count_read([s for s in given if s.held_out == (name == "eval")])
            plan = part.planned(seed)
            if name == "train" and config.mix:
                plan = _weighted(plan, store, given, seed)
            _write(folder / f"{name}.arrow", store, plan, part)
            part.require_something()
            parts[name] = part.counts
    if "eval" in parts:
        train = np.unique(store.documents["hash"][~held_out])
        shared = np.isin(store.documents["hash"][held_out], train)
        parts["eval"].checks["eval_in_train"] = int(shared.sum())
    for path in folder.glob("*.bin"):
        path.unlink()
    meta = {
        "tokenizer": tokenizer_hash(template.tokenizer),
        "settings": dataclasses.asdict(config),
        "template": dataclasses.asdict(template.config),
        "parts": {name: dataclasses.asdict(counts) for name, counts in parts.items()},
    }
    write_text(folder / "data.json", json.dumps(meta, indent=2) + "\n")


class _Part:
    """The documents to train on, or the held-out ones, on their way to samples."""

    def __init__(
        self,
        name: str,
        store: _Store,
        documents: NDArray[np.int64],
        config: DatasetConfig,
        template: Template,
        dropped: _Dropped,
    ) -> None:
        self.name, self.store, self.documents = name, store, documents
        self.config, self.template, self.dropped = config, template, dropped
        self.text = template.config.kind == "text"
        # Rows that no EOS ends go on with one another: they are one document.
        self.isolated = not self.text or template.config.append_eos
        self.counts = Counts(max_length=config.max_length)

    def count_read(self, given: Sequence[sources.Source]) -> None:
        """Count the rows, and what the checks find in the documents."""
        found, counts = self.store.documents[self.documents], self.counts
        counts.rows = len(np.unique(found["row"]))
        for source in given:
            read = self.store.read[source.name]
            counts.sources[source.name] = {**read, "weight": source.weight}
            counts.rows += read["bad"] + read["empty"]
            counts.bad += read["bad"]
            counts.empty += read["empty"]
        counts.dropped = counts.bad + counts.empty
        counts.unrolled = len(np.unique(found["row"][found["unrolled"]]))
        counts.lengths = describe_lengths(found["length"])
        counts.checks = dict.fromkeys(CHECKS, 0) | {
            "control_tokens": int(found["control"].sum()),
            "double_bos": int(found["double_bos"].sum()),
            "duplicates": len(found) - len(np.unique(found["hash"])),
        }
        if not self.text:
            # What generation stops at: EOS, or the token that ends an assistant's turn.
            stops = [self.template.tokenizer.eos_token_id, self.template.stop_id()]
            ends = np.isin(found["last_id"], [stop for stop in stops if stop is not None])
            counts.checks["never_stops"] = int((~ends & (found["trained"] > 0)).sum())

    def planned(self, seed: int) -> packing.Plan:
        """Decide what goes into which block."""
        config, counts, store = self.config, self.counts, self.store
        lengths = store.documents["length"]
        # Held-out documents are not packed: each is scored in a row of its own.
        strategy = config.packing if self.name == "train" or self.text else "none"
        if strategy in ("wrapped", "boundary"):
            order = self._ordered(seed)
            if strategy == "wrapped":
                plan = packing.wrapped(order, lengths, config.max_length, self.isolated)
            else:
                plan = self._at_boundaries(order)
            counts.documents = len(order)
            return plan.keep(config.sample)
        overlong = "split" if strategy == "bfd_split" else config.overlong
        documents = self._trainable(overlong)
        if overlong == "split":
            plan = packing.split(documents, lengths, config.max_length)
            plan = self._with_labels(plan)
        else:
            plan = packing.whole(documents, lengths, config.max_length)
        counts.documents = len(np.unique(plan.document))
        if strategy == "none":
            return plan.keep(config.sample)
        return packing.best_fit(plan, config.max_length).keep(config.sample)

    def _ordered(self, seed: int) -> NDArray[np.int64]:
        """Put the documents into the order in which they are joined."""
        lengths = self.store.documents["length"][self.documents]
        if self.config.order == "random":
            return np.random.default_rng(seed).permutation(self.documents)
        if self.config.order in ("shortest", "longest"):
            sign = 1 if self.config.order == "shortest" else -1
            return self.documents[np.argsort(sign * lengths, kind="stable")]
        return self.documents

    def _trainable(self, overlong: str) -> NDArray[np.int64]:
        """Leave out what is too long, or has nothing (left) to train, and count it."""
        config, counts = self.config, self.counts
        found = self.store.documents[self.documents]
        long = found["length"] > config.max_length
        counts.overlong = int(long.sum())
        nothing = found["trained"] == 0
        out = nothing.copy()
        if overlong == "error" and counts.overlong:
            first = found[long][0]
            raise DataError(
                f"{counts.overlong:,} {self.name} documents are longer than dataset.max_length="
                f"{config.max_length}, the first with {first['length']} tokens at "
                f"{self.store.files[first['file']]}:{first['line']}\n"
                f"    fix: dataset.max_length={counts.lengths['max_length_for_all']}, or "
                "dataset.overlong=split, truncate (the end is cut, EOS with it) or drop"
            )
        if overlong == "drop":
            out |= long
        if overlong == "truncate":
            first = np.array([self._first_trained(index) for index in self.documents[long]])
            lost = np.zeros(len(found), bool)
            lost[long] = first >= config.max_length
            nothing |= lost
            out |= lost
            counts.truncated = int((long & ~out).sum())
            cut = long & ~out & (found["last"] >= config.max_length)
            counts.checks["answer_cut"] = int(cut.sum())
        counts.checks["nothing_trained"] = int(nothing.sum())
        counts.dropped += int(out.sum())
        for record, empty in zip(found[out], nothing[out], strict=True):
            reason = "nothing of it is trained" if empty else f"it has {record['length']} tokens"
            file = self.store.files[record["file"]]
            self.dropped.add(self.name, file, int(record["line"]), reason)
        kept: NDArray[np.int64] = self.documents[~out]
        return kept

    def _first_trained(self, document: int) -> int:
        """Find where the first token that the loss would see stands."""
        begin = self.store.begins[document]
        marks = self.store.marks[begin : begin + self.store.documents["length"][document]]
        places = np.flatnonzero(marks[1:] & 1)  # nothing predicts the first token
        return int(places[0]) + 1 if len(places) else len(marks)

    def _with_labels(self, plan: packing.Plan) -> packing.Plan:
        """Leave out pieces of split documents that hold only a prompt."""
        begins = self.store.begins[plan.document]
        kept = [
            index
            for index, (low, high) in enumerate(
                zip((begins + plan.start + 1).tolist(), (begins + plan.stop).tolist(), strict=True)
            )
            if (self.store.marks[low:high] & 1).any()
        ]
        return plan.take([np.array([index]) for index in kept])

    def _at_boundaries(self, order: NDArray[np.int64]) -> packing.Plan:
        tokenizer, store = self.template.tokenizer, self.store
        ids = tokenizer(self.config.boundary, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise DataError(
                f"dataset.boundary={self.config.boundary!r} is {len(ids)} tokens, not one\n"
                "    fix: dataset.boundary with one token, or dataset.packing=wrapped"
            )
        lengths = store.documents["length"][order]
        stream = np.concatenate(
            [
                store.ids[begin : begin + length]
                for begin, length in zip(store.begins[order], lengths, strict=True)
            ]
        )

        def whole_character(stop: int) -> int:
            for back in range(4):  # a character has at most 4 bytes
                tail = stream[max(0, stop - back - 4) : stop - back].tolist()
                if not tokenizer.decode(tail).endswith("\ufffd"):
                    return stop - back
            return stop

        boundaries = np.flatnonzero(stream == ids[0])
        return packing.at_boundaries(
            order,
            store.documents["length"],
            self.config.max_length,
            boundaries,
            whole_character,
        )

    def require_something(self) -> None:
        """Refuse a part that trains nothing."""
        c = self.counts
        if c.trained_tokens == 0:
            raise DataError(
                f"nothing is left of the {self.name} data: {c.rows:,} rows, {c.bad:,} do not fit, "
                f"{c.dropped:,} dropped, {c.truncated:,} truncated\n"
                "    fix: dataset.max_length=2048"
            )


def _encoded(
    given: Sequence[sources.Source],
    template: Template,
    config: DatasetConfig,
    folder: Path,
    dropped: _Dropped,
) -> _Store:
    """Encode every row of every source, in order, to files in a folder."""
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
            for batch, done in _in_parallel(maker, batches, config.num_proc):
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
            read[source.name] = tally
    documents = np.concatenate(tables) if tables else np.zeros(0, DOCUMENT)
    if not len(documents):
        counts = ", ".join(f"{name}: {tally}" for name, tally in read.items())
        raise DataError(f"nothing is left of the data ({counts})\n    fix: other rows")
    lengths = documents["length"]
    return _Store(
        np.memmap(folder / "ids.bin", np.int32, "r"),
        np.memmap(folder / "marks.bin", np.uint8, "r"),
        documents,
        np.cumsum(lengths) - lengths,
        list(files),
        read,
    )


def _refuse(count: int, dropped: _Dropped, path: str) -> None:
    """Stop at once where the first rows all do not fit: the settings are wrong, not the rows."""
    raise DataError(
        f"none of the first {count:,} rows of {path} fits:\n"
        + "\n".join(f"    {line}" for line in dropped.first[:1])
    )


def _rows(
    source: sources.Source, template: Template, config: DatasetConfig
) -> Iterator[Row | BadRow]:
    """Read a source's rows; a single one that is to be held out from is cut in two."""
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
    """Group rows; of plain text, whose rows may be whole books, by their characters too."""
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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _maker = maker


def _work(batch: list[Row | BadRow]) -> Encoded:
    assert _maker is not None
    return _maker(batch)


def _in_parallel(
    maker: RowEncoder, batches: Iterator[list[Row | BadRow]], num_proc: int | None
) -> Iterator[tuple[list[Row | BadRow], Encoded]]:
    """Encode batches, in order; the first in this process, more of them in others beside it."""
    for batch in itertools.islice(batches, ALONE):
        yield batch, maker(batch)
    processes = num_proc or len(os.sched_getaffinity(0))
    following = next(batches, None)
    if following is None or processes == 1:
        for batch in itertools.chain([] if following is None else [following], batches):
            yield batch, maker(batch)
        return
    # Forked, so that the tokenizer is there already; no thread of ours is running yet.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, context, _begin_worker, (maker,)) as pool:
        running: collections.deque[tuple[list[Row | BadRow], Future[Encoded]]]
        running = collections.deque()
        for batch in itertools.chain([following], batches):
            running.append((batch, pool.submit(_work, batch)))
            if len(running) > 2 * processes:  # so that memory stays bounded
                first, done = running.popleft()
                yield first, done.result()
        for first, done in running:
            yield first, done.result()


def _held_out(
    store: _Store, given: Sequence[sources.Source], config: DatasetConfig, seed: int
) -> NDArray[np.bool_]:
    """Mark the held-out documents: those of a source of their own, or of a share of the rows."""
    documents = store.documents
    separate = np.array([source.held_out for source in given])
    if not config.eval_fraction:
        apart: NDArray[np.bool_] = separate[documents["source"]]
        return apart
    rows = np.unique(documents["row"])
    count = max(1, round(len(rows) * config.eval_fraction))
    if count >= len(rows):
        raise DataError(
            f"{len(rows)} rows with dataset.eval_fraction={config.eval_fraction} leave none to "
            "train on\n    fix: dataset.eval_fraction=0"
        )
    # Two halves of one text (see sources.halves): its end is held out.
    halves = store.read[given[0].name]["rows"] == 2 and len(given) == 1
    chosen = rows[-1:] if halves else np.random.default_rng(seed).permutation(rows)[:count]
    return np.isin(documents["row"], chosen)


def _weighted(
    plan: packing.Plan, store: _Store, given: Sequence[sources.Source], seed: int
) -> packing.Plan:
    """Repeat each source's blocks as often as its weight says; a part of them for a fraction."""
    sources_of = store.documents["source"][plan.document[plan.first[:-1]]]
    generator = np.random.default_rng(seed)
    chosen: list[NDArray[np.int64]] = []
    for number, source in enumerate(given):
        blocks = np.flatnonzero(sources_of == number)
        times, part = divmod(source.weight, 1)
        chosen += [blocks] * int(times)
        extra = generator.permutation(blocks)[: round(part * len(blocks))]
        chosen.append(np.sort(extra))
    order = np.concatenate(chosen)
    return plan.take([np.arange(plan.first[i], plan.first[i + 1]) for i in order.tolist()])


def _write(path: Path, store: _Store, plan: packing.Plan, part: _Part) -> None:
    """Write the blocks as an Arrow file, and count their tokens."""
    counts, config = part.counts, part.config
    packed = part.isolated and bool((np.diff(plan.first) > 1).any())
    names = ["input_ids", "labels", *(["seq_lengths"] if packed else [])]
    kind = pa.list_(pa.int32())
    roles = np.zeros(2 * len(ROLES), np.int64)
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema([(name, kind) for name in names])) as writer,
    ):
        for low, high in packing.chunks(plan, BLOCKS):
            pieces = slice(plan.first[low], plan.first[high])
            sizes = plan.stop[pieces] - plan.start[pieces]
            begins = store.begins[plan.document[pieces]] + plan.start[pieces]
            spans = list(zip(begins.tolist(), (begins + sizes).tolist(), strict=True))
            ids = np.concatenate([store.ids[a:b] for a, b in spans])
            marks = np.concatenate([store.marks[a:b] for a, b in spans])
            firsts = np.cumsum(sizes) - sizes
            offsets = plan.first[low : high + 1] - plan.first[low]
            edges = np.concatenate([firsts, [len(ids)]])[offsets]
            labels = np.where(marks & 1, ids, IGNORE_INDEX).astype(np.int32)
            # Nothing precedes the first token of a document, so nothing can predict it.
            labels[firsts if part.isolated else edges[:-1]] = IGNORE_INDEX
            columns = [_lists(ids, edges), _lists(labels, edges)]
            if packed:
                columns.append(_lists(sizes.astype(np.int32), offsets))
            writer.write_batch(pa.record_batch(columns, names))
            seen = labels != IGNORE_INDEX
            counts.samples += high - low
            counts.tokens += len(ids)
            counts.trained_tokens += int(seen.sum())
            counts.longest = max(counts.longest, int(np.diff(edges).max()))
            counts.largest_id = max(counts.largest_id, int(ids.max()))
            roles += np.bincount(2 * (marks // 2) + seen, minlength=len(roles))
    counts.roles = {
        role: {"tokens": int(pair.sum()), "trained": int(pair[1])}
        for role, pair in zip(ROLES, roles.reshape(-1, 2), strict=True)
        if pair.sum()
    }
    if packed or (part.text and config.packing != "none"):
        counts.efficiency = counts.tokens / max(1, counts.samples * config.max_length)


def _lists(values: NDArray[np.int32], edges: NDArray[np.int64]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(edges, pa.int32()), pa.array(values))
