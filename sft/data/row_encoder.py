"""Encode batches of rows as token ids, each with its role and whether it is trained."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.data.formats import recognise
from sft.data.rows import SHOWN, BadRow, Row
from sft.data.segment import TOKEN_BREAK, Sample
from sft.data.template import Rendered, Template
from sft.data.text_encoder import Encoder, TokenSpan
from sft.data.token_rows import COLUMNS, spans_of
from sft.data.token_rows import IGNORE_INDEX as IGNORE_INDEX
from sft.data.values import FLAGS, Empty, present, require_trained, unused, without
from sft.errors import DataError

# The roles of tokens. A token's mark is twice the index of its role, plus 1 if it is trained.
ROLES = ("prompt", "completion", "text", "system", "user", "assistant", "tool", "all")
MARKS = {(role, flag): 2 * number + flag for number, role in enumerate(ROLES) for flag in (0, 1)}
# The record of one document.
DOCUMENT = np.dtype(
    [
        ("length", np.int64),  # tokens
        ("trained", np.int64),  # trained tokens
        ("last", np.int64),  # position of the last trained token; -1: none
        ("never_stops", np.bool_),  # a trained answer lacks the token that ends it
        ("hash", np.uint64),  # of its token ids
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
    control: bool = False
    unrolled: bool = False
    prompt_differs: bool = False
    empty_answers: bool = False
    unused: int = 0


@dataclass
class Encoded:
    """The documents of a batch of rows, concatenated.

    Attributes:
        ids: Token ids, shape (tokens,).
        marks: Role and trained flag of each, shape (tokens,).
        documents: Records of DOCUMENT, shape (documents,); ``row`` counts from the batch's first.
        bad: Rows that do not fit, with the reason.
        empty: Rows with nothing to train.
        unused: Names that ``documents["unused"]`` is an index into, in tuples: columns, and keys
            of messages, that a row fills but no sample holds.
    """

    ids: NDArray[np.int32]
    marks: NDArray[np.uint8]
    documents: NDArray[Any]
    bad: list[BadRow]
    empty: list[BadRow]
    unused: list[tuple[str, ...]]


class RowEncoder:
    """Encodes batches of rows; each worker process has a copy."""

    def __init__(
        self, template: Template, sanitize: bool = False, ignored: Sequence[str] = ()
    ) -> None:
        self.template = template
        self.sanitize = sanitize
        self.ignored = ignored
        self.vocabulary = len(template.tokenizer)
        self.encoder = Encoder(template.tokenizer)
        chat = template.config.kind == "chat"
        ends = template.config.append_eos and not chat
        self.eos_id = template.tokenizer.eos_token_id if ends else None
        # Nothing ends a plain text for generation.
        self.stop_ids = template.stop_ids if template.config.kind != "text" else []
        tokens = template.tokenizer.added_tokens_decoder.values()
        self.control = tuple(token.content for token in tokens if token.special)

    def __call__(self, rows: Sequence[Row | BadRow]) -> Encoded:
        """Encode a batch."""
        rendered: list[Sample] = []
        owners: list[Owner] = []
        ready: list[tuple[Owner, list[TokenSpan]]] = []
        bad: list[BadRow] = []
        empty: list[BadRow] = []
        names: dict[tuple[str, ...], int] = {}
        for index, row in enumerate(rows):
            if isinstance(row, BadRow):
                bad.append(row)
                continue
            try:
                values, ignored = self._clean(row.values)
                if self._is_tokenized(values):
                    spans, left = self._tokenized(values)
                    left += ignored
                    ready.append((Owner(index, unused=names.setdefault(left, len(names))), spans))
                    continue
                done = self.template.rendered(values)
                _require_whole_characters(done.samples)
            except Empty as error:
                empty.append(BadRow(row.file, row.line, str(error), _shown(row.values)))
            except Exception as error:  # whatever a value does to a template, the row is bad
                bad.append(BadRow(row.file, row.line, _reason(error), _shown(row.values)))
            else:
                rendered += done.samples
                number = names.setdefault(done.unused + ignored, len(names))
                owners += self._owners(index, done, number)
        both = [*self._encoded(rows, rendered, owners, bad), *ready]
        both.sort(key=lambda item: item[0].row)
        ids, marks, documents = self._joined(both)
        documents["line"] = [rows[owner.row].line for owner, _ in both]
        return Encoded(ids, marks, documents, bad, empty, list(names))

    def _owners(self, index: int, done: Rendered, unused: int) -> list[Owner]:
        control, unrolled = self._holds_control(done.samples), len(done.samples) > 1
        return [
            Owner(index, control, unrolled, sample.prompt_differs, done.empty_answers, unused)
            for sample in done.samples
        ]

    def _encoded(
        self,
        rows: Sequence[Row | BadRow],
        rendered: list[Sample],
        owners: list[Owner],
        bad: list[BadRow],
    ) -> Iterator[tuple[Owner, list[TokenSpan]]]:
        """Yield the spans of samples; render a row by turn if one sample would merge two turns."""
        if not rendered:
            return
        encoded = self.encoder.samples(rendered, self.template.adds_bos, self.eos_id)
        for owner, spans in zip(owners, encoded, strict=True):
            if spans is not None:
                yield owner, spans
                continue
            row = rows[owner.row]
            assert isinstance(row, Row)
            done = self.template.rendered(self._clean(row.values)[0], by_turn=True)
            turns = self.encoder.samples(done.samples, self.template.adds_bos, self.eos_id)
            if None in turns:
                reason = "the tokenizer merges the end of the prompt with the answer"
                bad.append(BadRow(row.file, row.line, reason, _shown(row.values)))
                continue
            for turn, spans in zip(self._owners(owner.row, done, owner.unused), turns, strict=True):
                assert spans is not None
                yield turn, spans

    def _clean(self, values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Return a row without ignored columns, and the names of those that it filled."""
        ignored: tuple[str, ...] = ()
        if self.ignored:
            values, ignored = without(values, self.ignored)
        if self.sanitize:
            values = {k: sanitized(v) if isinstance(v, str) else v for k, v in values.items()}
        return values, ignored

    def _tokenized(self, values: dict[str, Any]) -> tuple[list[TokenSpan], tuple[str, ...]]:
        """Return a tokenised row's ids, and the names of what it fills and is not used."""
        values = present(values)
        require_trained(values)
        names = [name for name in values if name not in COLUMNS and name not in FLAGS]
        left = unused(values, names, str(self.template.config.name), tokens=True)
        return spans_of(values, self.vocabulary), left

    def _is_tokenized(self, values: dict[str, Any]) -> bool:
        format = self.template.format
        ready = "input_ids" in values and recognise(present(values)) == "tokenized"
        return format == "tokenized" or (format == "auto" and ready)

    def _holds_control(self, samples: list[Sample]) -> bool:
        """Return whether a row's text holds a control token, which TOKEN_BREAK marks in a chat."""
        if self.template.chat is not None:
            return any(TOKEN_BREAK in segment.text for segments in samples for segment in segments)
        text = "".join(segment.text for segments in samples for segment in segments)
        return any(name in text for name in self.control)

    def _joined(
        self, samples: Sequence[tuple[Owner, list[TokenSpan]]]
    ) -> tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[Any]]:
        """Concatenate documents, and make the record of each."""
        spans = [span for _, sample in samples for span in sample]
        sizes = np.fromiter((len(ids) for ids, _, _ in spans), np.int64, len(spans))
        flat = itertools.chain.from_iterable(ids for ids, _, _ in spans)
        ids = np.fromiter(flat, np.int32, int(sizes.sum()))
        kinds = (MARKS[role, trained] for _, trained, role in spans)
        marks = np.repeat(np.fromiter(kinds, np.uint8, len(spans)), sizes)

        documents = np.zeros(len(samples), DOCUMENT)
        if not samples:
            return ids, marks, documents
        counts = np.fromiter((len(sample) for _, sample in samples), np.int64, len(samples))
        firsts = np.cumsum(counts) - counts
        documents["length"] = np.add.reduceat(sizes, firsts)
        begins = np.cumsum(documents["length"]) - documents["length"]
        trained = marks & 1
        documents["trained"] = np.add.reduceat(trained, begins, dtype=np.int64)
        places = np.where(trained, np.arange(len(ids)), -1)
        last = np.maximum.reduceat(places, begins)
        if self.template.config.kind != "text":
            documents["never_stops"] = self._never_stops(ids, marks, begins)
        documents["last"] = np.where(last >= 0, last - begins, -1)
        ends = (begins + documents["length"]).tolist()
        pairs = zip(begins.tolist(), ends, strict=True)
        documents["hash"] = [xxhash.xxh3_64_intdigest(ids[a:b].tobytes()) for a, b in pairs]
        for name in Owner.__annotations__:
            documents[name] = [getattr(owner, name) for owner, _ in samples]
        if len(self.encoder.bos_ids) == 1 and len(ids) > 1:
            after = ids[np.minimum(begins + 1, len(ids) - 1)]
            bos = self.encoder.bos_ids[0]
            both = (ids[begins] == bos) & (after == bos) & (documents["length"] > 1)
            documents["double_bos"] = both
        return ids, marks, documents

    def _never_stops(
        self, ids: NDArray[np.int32], marks: NDArray[np.uint8], begins: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Return for each document whether one of its trained spans lacks its last token.

        Of a document that is trained as a whole, an end of turn may stand anywhere.
        """
        stops = np.isin(ids, self.stop_ids)
        trained = (marks & 1).astype(bool)
        following = np.append(trained[1:], False)
        following[begins[1:] - 1] = False
        missing = np.logical_or.reduceat(trained & ~following & ~stops, begins)
        whole = marks[begins] == MARKS["all", 1]
        return np.where(whole, ~np.logical_or.reduceat(stops, begins), missing)


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


def _shown(values: dict[str, Any]) -> str:
    text = json.dumps(values, ensure_ascii=False, default=str)[:SHOWN]
    return text.encode("utf-8", "backslashreplace").decode()


def _require_whole_characters(samples: list[Sample]) -> None:
    """Refuse a lone surrogate, which JSON can write but UTF-8 cannot."""
    for segment in (segment for segments in samples for segment in segments):
        try:
            segment.text.encode()
        except UnicodeEncodeError as error:
            half = ascii(segment.text[error.start])
            raise DataError(f"the text holds {half}, which is half of a surrogate pair") from None


def sanitized(text: str) -> str:
    """Drop carriage returns, blank lines and repeated spaces; decode an escaped newline."""
    text = text.replace("\r", "").replace("\\n", "\n").replace("\t", " ")
    lines = (re.sub(" +", " ", line).strip(" ") for line in text.split("\n"))
    return re.sub("\n{2,}", "\n", "\n".join(lines))
