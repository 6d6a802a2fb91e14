"""Rendered rows become samples: ``input_ids`` and ``labels``, at most ``max_length`` long."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.config import DatasetConfig
from sft.data.template import Segment, Template
from sft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
BATCH_ROWS = 1000  # rows a tokenizer call; large enough for its threads, small in memory


@dataclass
class Counts:
    """What became of the rows; tokens are those of the samples that are kept."""

    rows: int = 0
    samples: int = 0
    dropped: int = 0
    truncated: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    longest: int = 0
    largest_id: int = 0


@dataclass
class Samples:
    """Tokenised samples (columns ``input_ids`` and ``labels``) and what became of the rows."""

    dataset: Dataset
    counts: Counts


class Encoder:
    """Encodes segments one by one, as generation does: a prompt's ids never depend on the answer.

    A tokenizer that would merge across the seam of prompt and completion thus cannot: the ids of
    the prompt are the same in training and in generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        plain = self._encode(["a"])[0]
        special = tokenizer("a")["input_ids"]
        self.bos_ids: list[int] = special[: special.index(plain[0])] if plain else []
        # SentencePiece puts a space before the first word of a text; not inside one.
        first = tokenizer.convert_ids_to_tokens(plain)[0]
        self._lead = "\n" if first.startswith("\u2581") else ""
        self._lead_length = len(self._encode([self._lead])[0]) if self._lead else 0

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def prompt(self, text: str, rendered: bool) -> list[int]:
        """Encode what generation starts from; a rendered chat holds its BOS already."""
        return ([] if rendered else list(self.bos_ids)) + self._encode([text])[0]

    def samples(
        self, rows: Sequence[list[Segment]], bos: bool, eos_id: int | None
    ) -> Iterator[tuple[list[int], list[int]]]:
        """Yield (input_ids, labels) of each row, both of shape (tokens,).

        Args:
            rows: Each row's segments.
            bos: Whether to begin with what the tokenizer begins a text with.
            eos_id: Trained after the last segment, unless it is there already.
        """
        texts = [
            segment.text if index == 0 else self._lead + segment.text
            for row in rows
            for index, segment in enumerate(row)
        ]
        encoded = iter(self._encode(texts))
        for row in rows:
            input_ids = list(self.bos_ids) if bos else []
            labels = [IGNORE_INDEX] * len(input_ids)
            for index, segment in enumerate(row):
                ids = next(encoded)[self._lead_length if index else 0 :]
                input_ids += ids
                labels += ids if segment.trained else [IGNORE_INDEX] * len(ids)
            if eos_id is not None and input_ids[-1:] != [eos_id]:
                input_ids.append(eos_id)
                labels.append(eos_id)
            yield input_ids, labels


def build(rows: Dataset, template: Template, config: DatasetConfig, name: str) -> Samples:
    """Turn rows into samples.

    Args:
        rows: Columns as the template wants them.
        template: What is rendered, and what of it is trained.
        config: ``max_length`` and what to do with longer samples.
        name: ``train`` or ``eval``, for messages.

    Raises:
        DataError: A row does not fit the template, a sample is too long under
            ``overlong=error``, or nothing is left.
    """
    from datasets import Dataset

    counts = Counts(rows=len(rows))
    encoded = _encoded(rows, template, counts, name)
    kept = (
        _blocks(encoded, config.max_length)
        if template.config.kind == "text"
        else _fitted(encoded, config, counts, name)
    )
    samples: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for input_ids, labels in kept:
        samples["input_ids"].append(input_ids)
        samples["labels"].append(labels)
        counts.tokens += len(input_ids)
        counts.trained_tokens += len(labels) - labels.count(IGNORE_INDEX)
        counts.longest = max(counts.longest, len(input_ids))
        counts.largest_id = max(counts.largest_id, *input_ids)
    counts.samples = len(samples["input_ids"])
    if counts.trained_tokens == 0:
        raise DataError(
            f"nothing is left of the {name} data: {counts.rows} rows, {counts.dropped} dropped, "
            f"{counts.truncated} truncated\n    fix: dataset.max_length=2048"
        )
    return Samples(Dataset.from_dict(samples), counts)


def _encoded(
    rows: Dataset, template: Template, counts: Counts, name: str
) -> Iterator[tuple[list[int], list[int]]]:
    """Encode the rows; one with an empty completion or text has nothing to train: dropped."""
    encoder = Encoder(template.tokenizer)
    chat = template.config.kind == "chat"
    eos_id = template.tokenizer.eos_token_id if template.config.append_eos and not chat else None
    position = 0
    for batch in _batched(rows):
        rendered = []
        for row in batch:
            position += 1
            if template.is_empty(row):
                counts.dropped += 1
                continue
            try:
                rendered.append(template.render(row))
            except DataError as error:
                # Held-out rows were shuffled away, so a number alone would not find the row.
                shown = textwrap.shorten(json.dumps(row, ensure_ascii=False, default=str), 120)
                raise DataError(f"{name} row {position}, {shown}\n    {error}") from None
        # A rendered chat holds its BOS. Plain text is one stream: no BOS before each row of it.
        if rendered:
            yield from encoder.samples(rendered, template.config.kind == "completion", eos_id)


def _batched(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        yield batch


def _fitted(
    encoded: Iterable[tuple[list[int], list[int]]],
    config: DatasetConfig,
    counts: Counts,
    name: str,
) -> Iterator[tuple[list[int], list[int]]]:
    """Apply ``overlong`` to each sample; one whose trained part is cut away whole is dropped."""
    for index, (input_ids, labels) in enumerate(encoded):
        if len(input_ids) > config.max_length:
            if config.overlong == "error":
                raise DataError(
                    f"{name} row {index + 1} has {len(input_ids)} tokens, "
                    f"dataset.max_length={config.max_length}\n"
                    f"    fix: dataset.max_length={len(input_ids)}, or "
                    "dataset.overlong=truncate (the end is cut, EOS with it) or drop"
                )
            if config.overlong == "drop":
                counts.dropped += 1
                continue
            input_ids, labels = input_ids[: config.max_length], labels[: config.max_length]
            if labels.count(IGNORE_INDEX) == len(labels):
                counts.dropped += 1
                continue
            counts.truncated += 1
        yield input_ids, labels


def _blocks(
    encoded: Iterable[tuple[list[int], list[int]]], length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Cut the joined documents into blocks of ``length`` tokens; the last may be shorter.

    A block of one token would train nothing (there is none to predict it from) and is left out.
    """
    stream: list[int] = []
    for input_ids, _ in encoded:
        stream += input_ids
        whole = len(stream) - len(stream) % length
        for start in range(0, whole, length):
            yield stream[start : start + length], stream[start : start + length]
        stream = stream[whole:]
    if len(stream) > 1:
        yield stream, stream


def marked(sample: dict[str, list[int]], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a sample, with its trained stretches between ⟦ and ⟧."""
    text = ""
    pairs = zip(sample["input_ids"], sample["labels"], strict=True)
    for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        decoded = tokenizer.decode([token for token, _ in group])
        text += f"⟦{decoded}⟧" if trained else decoded
    return text
