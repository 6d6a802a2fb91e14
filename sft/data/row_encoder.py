"""Encode batches of rows as token ids, each with its role and whether it is trained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.data.documents import Owner, joined, near_hash
from sft.data.flags import FLAGS, require_trained
from sft.data.formats import recognise
from sft.data.rows import SHOWN, BadRow, Row
from sft.data.segment import TOKEN_BREAK, Sample, Segment
from sft.data.template import Rendered, Template
from sft.data.text_encoder import Encoder, TokenSpan
from sft.data.token_rows import COLUMNS, spans_of
from sft.data.token_rows import IGNORE_INDEX as IGNORE_INDEX
from sft.data.values import Empty, present, unused, without
from sft.errors import DataError, ModelError


@dataclass
class Encoded:
    """The documents of a batch of rows, concatenated.

    Attributes:
        ids: Token ids, shape (tokens,).
        marks: Role and trained flag of each, shape (tokens,).
        weights: Weight of each in the loss, shape (tokens,); None: as the flags say.
        documents: Records of DOCUMENT, shape (documents,); ``row`` counts from the batch's first.
        bad: Rows that do not fit, with the reason.
        empty: Rows with nothing to train.
        unused: Names that ``documents["unused"]`` is an index into, in tuples: columns, and keys
            of messages, that a row fills but no sample holds.
    """

    ids: NDArray[np.int32]
    marks: NDArray[np.uint8]
    weights: NDArray[np.float32] | None
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
        self.stop_ids = template.stop_ids if template.config.kind != "text" else None
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
                values, ignored = self.clean(row.values)
                if self._is_tokenized(values):
                    spans, left = self._tokenized(values)
                    left += ignored
                    number = names.setdefault(left, len(names))
                    ready.append((Owner(index, self._near_hash(spans), unused=number), spans))
                    continue
                done = self.template.rendered(values)
                _require_whole_characters(done.samples)
            except Empty as error:
                empty.append(BadRow(row.file, row.line, str(error), _shown(row.values)))
            except ModelError:  # no row fits a chat template that does not end
                raise
            except Exception as error:  # whatever a value does to a template, the row is bad
                bad.append(BadRow(row.file, row.line, _reason(error), _shown(row.values)))
            else:
                rendered += done.samples
                number = names.setdefault(done.unused + ignored, len(names))
                owners += self._owners(index, done, number)
        both = [*self._encoded(rows, rendered, owners, bad), *ready]
        both.sort(key=lambda item: item[0].row)
        ids, marks, weights, documents = joined(both, self.stop_ids, self.encoder.bos_ids)
        documents["line"] = [rows[owner.row].line for owner, _ in both]
        return Encoded(ids, marks, weights, documents, bad, empty, list(names))

    def _owners(self, index: int, done: Rendered, unused: int) -> list[Owner]:
        control, unrolled = self._holds_control(done.samples), len(done.samples) > 1
        return [
            Owner(
                index,
                near_hash(sample),
                control,
                unrolled,
                sample.prompt_differs,
                done.empty_answers,
                unused,
            )
            for sample in done.samples
        ]

    def _near_hash(self, spans: list[TokenSpan]) -> int:
        text = self.template.tokenizer.decode([token for ids, _, _ in spans for token in ids])
        return near_hash([Segment(str(text), False)])

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
            done = self.template.rendered(self.clean(row.values)[0], by_turn=True)
            turns = self.encoder.samples(done.samples, self.template.adds_bos, self.eos_id)
            if None in turns:
                reason = "the tokenizer merges the end of the prompt with the answer"
                bad.append(BadRow(row.file, row.line, reason, _shown(row.values)))
                continue
            for turn, spans in zip(self._owners(owner.row, done, owner.unused), turns, strict=True):
                assert spans is not None
                yield turn, spans

    def clean(self, values: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
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
        """Return whether a row's text holds a control token, which TOKEN_BREAK may mark."""
        if self.template.chat is not None or self.template.control is not None:
            return any(TOKEN_BREAK in segment.text for segments in samples for segment in segments)
        text = "".join(segment.text for segments in samples for segment in segments)
        return any(name in text for name in self.control)


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
