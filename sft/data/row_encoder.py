"""Encode batches of rows as token ids, each with its role and whether it is trained."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from sft.data.formats import recognise
from sft.data.readers import SHOWN, BadRow, Row
from sft.data.segment import TOKEN_BREAK, Segment
from sft.data.template import Template
from sft.data.text_encoder import Encoder, TokenSpan
from sft.data.token_rows import COLUMNS, spans_of
from sft.data.token_rows import IGNORE_INDEX as IGNORE_INDEX
from sft.data.values import FLAGS, Empty, present, require_trained, unused, without
from sft.errors import DataError

# What a row of any shape may raise while it is read; none of them may end the run.
BAD = (DataError, AttributeError, LookupError, TypeError, ArithmeticError, ValueError)
# The roles of tokens. A token's mark is twice the index of its role, plus 1 if it is trained.
ROLES = ("prompt", "completion", "text", "system", "user", "assistant", "tool", "all")
MARKS = {(role, flag): 2 * number + flag for number, role in enumerate(ROLES) for flag in (0, 1)}
# The record of one document.
DOCUMENT = np.dtype(
    [
        ("length", np.int64),  # tokens
        ("trained", np.int64),  # trained tokens
        ("last", np.int64),  # position of the last trained token; -1: none
        ("last_id", np.int32),  # id of that token
        ("hash", np.uint64),  # of its token ids
        ("row", np.int64),  # number of its row, in reading order
        ("line", np.int64),  # line of its file in which that row begins
        ("file", np.int32),  # index into the list of files
        ("source", np.int32),  # index into the list of sources
        ("control", np.bool_),  # its text holds a control token
        ("double_bos", np.bool_),
        ("unrolled", np.bool_),  # its row became several documents
        ("empty_answers", np.bool_),  # an answer is not trained, because it is empty
        ("unused", np.int32),  # index into the list of what rows fill and no sample holds
    ]
)


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


class _Owner(NamedTuple):
    """The row of a document, as in DOCUMENT."""

    row: int
    control: bool
    unrolled: bool
    empty_answers: bool
    unused: int


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
        # A chat template writes BOS itself; rows of plain text are joined without BOS between them.
        self.bos = template.config.kind == "completion"
        tokens = template.tokenizer.added_tokens_decoder.values()
        self.control = tuple(token.content for token in tokens if token.special)

    def __call__(self, rows: Sequence[Row | BadRow]) -> Encoded:
        """Encode a batch."""
        rendered: list[list[Segment]] = []
        owners: list[_Owner] = []
        ready: list[tuple[_Owner, list[TokenSpan]]] = []
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
                    owner = _Owner(index, False, False, False, names.setdefault(left, len(names)))
                    ready.append((owner, spans))
                    continue
                done = self.template.rendered(values)
                _require_whole_characters(done.samples)
            except Empty as error:
                empty.append(BadRow(row.file, row.line, str(error), _shown(row.values)))
            except BAD as error:
                bad.append(BadRow(row.file, row.line, _reason(error), _shown(row.values)))
            else:
                rendered += done.samples
                owner = _Owner(
                    index,
                    self._holds_control(done.samples),
                    len(done.samples) > 1,
                    done.empty_answers,
                    names.setdefault(done.unused + ignored, len(names)),
                )
                owners += [owner] * len(done.samples)
        encoded = self.encoder.samples(rendered, self.bos, self.eos_id) if rendered else []
        both = sorted([*zip(owners, encoded, strict=True), *ready], key=lambda item: item[0].row)
        ids, marks, documents = self._joined(both)
        documents["line"] = [rows[owner.row].line for owner, _ in both]
        return Encoded(ids, marks, documents, bad, empty, list(names))

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

    def _holds_control(self, samples: list[list[Segment]]) -> bool:
        """Return whether a row's text holds a control token, which TOKEN_BREAK marks in a chat."""
        if self.template.chat is not None:
            return any(TOKEN_BREAK in segment.text for segments in samples for segment in segments)
        text = "".join(segment.text for segments in samples for segment in segments)
        return any(name in text for name in self.control)

    def _joined(
        self, samples: Sequence[tuple[_Owner, list[TokenSpan]]]
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
        documents["last_id"] = np.where(last >= 0, ids[last], -1)
        documents["last"] = np.where(last >= 0, last - begins, -1)
        ends = (begins + documents["length"]).tolist()
        pairs = zip(begins.tolist(), ends, strict=True)
        documents["hash"] = [xxhash.xxh3_64_intdigest(ids[a:b].tobytes()) for a, b in pairs]
        owners = zip(*(owner for owner, _ in samples), strict=True)
        for name, column in zip(_Owner._fields, owners, strict=True):
            documents[name] = column
        if len(self.encoder.bos_ids) == 1 and len(ids) > 1:
            after = ids[np.minimum(begins + 1, len(ids) - 1)]
            bos = self.encoder.bos_ids[0]
            both = (ids[begins] == bos) & (after == bos) & (documents["length"] > 1)
            documents["double_bos"] = both
        return ids, marks, documents


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


def _shown(values: dict[str, Any]) -> str:
    text = json.dumps(values, ensure_ascii=False, default=str)[:SHOWN]
    return text.encode("utf-8", "backslashreplace").decode()


def _require_whole_characters(samples: list[list[Segment]]) -> None:
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
