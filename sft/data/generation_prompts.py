"""Show beside a sample the prompt that generation makes of the same row, and where both differ."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from sft.config.settings import DatasetConfig
from sft.data import sources
from sft.data.prepared import Prepared
from sft.data.preview import Prompt, parts_of
from sft.data.row_encoder import RowEncoder
from sft.data.rows import Row
from sft.data.store import rows_of
from sft.data.template import Template
from sft.data.token_rows import IGNORE_INDEX
from sft.errors import DataError

MAX_ROWS = 200_000  # rows that are read again to find those of the samples


def prompts_of(
    samples: Sequence[Mapping[str, Any]],
    prepared: Prepared,
    template: Template,
    config: DatasetConfig,
    seed: int,
) -> list[list[Prompt | None]]:
    """Make the generation prompt of each document of each sample.

    Args:
        samples: Samples to train on.
        prepared: What they belong to, made from ``config`` and not loaded from an artefact.
        template: Renders the rows.
        config: The dataset section.
        seed: The run's seed.

    Returns:
        For each sample a prompt for each of its documents; None where there is none to show: plain
        text, which generation continues, token ids, later parts of a document that was split, and
        rows that stand after ``MAX_ROWS`` others.
    """
    if template.config.kind == "text":
        return [[None] * len(sample.get("seq_lengths", [0])) for sample in samples]
    wanted = {number for sample in samples for number in sample["rows"]}
    rows = _rows(wanted, prepared, template, config, seed)
    maker = RowEncoder(template, config.sanitize, config.ignore_columns)
    return [
        [
            _prompt(rows.get(number), ids, labels, maker)
            for number, (ids, labels) in zip(sample["rows"], parts_of(sample), strict=True)
        ]
        for sample in samples
    ]


def _rows(
    wanted: Collection[int],
    prepared: Prepared,
    template: Template,
    config: DatasetConfig,
    seed: int,
) -> dict[int, Row]:
    """Read rows by number, which counts from 1 in reading order."""
    found: dict[int, Row] = {}
    number = 0
    for source in sources.of(config, seed):
        counts = prepared.parts[source.part]
        count = counts.sources[source.name]["rows"]  # a streamed source is not read to its end
        for row in itertools.islice(rows_of(source, template, config), count):
            number += 1
            if number in wanted and isinstance(row, Row):
                found[number] = row
            if len(found) == len(wanted) or number == MAX_ROWS:
                return found
    return found


def _prompt(row: Row | None, ids: list[int], labels: list[int], maker: RowEncoder) -> Prompt | None:
    """Make the prompt of a row, and compare it with one of the row's documents."""
    template = maker.template
    if row is None or ("input_ids" in row.values and template.format in ("auto", "tokenized")):
        return None
    done = maker([row])
    ends = np.cumsum(done.documents["length"])
    documents = [part.tolist() for part in np.split(done.ids, ends[:-1])]
    same = [number for number, document in enumerate(documents) if document[: len(ids)] == ids]
    if not same:
        return None
    if len(documents) - 1 not in same:
        return Prompt([], "that of the row's last answer, which is a sample of its own")
    try:
        prompt = template.render_prompt(maker.clean(row.values)[0])
    except DataError as error:
        return Prompt([], f"none, because the row is refused: {str(error).splitlines()[0]}")
    asked = maker.encoder.prompt(prompt, bos=template.adds_bos)
    return Prompt(asked, _compared(asked, ids, labels, template))


def _compared(asked: list[int], ids: list[int], labels: list[int], template: Template) -> str:
    """Say how a prompt compares with a document's tokens and labels."""
    pairs = zip(asked, ids, strict=False)
    same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    if same < len(asked):
        if same == len(ids):
            return f"{len(asked):,} tokens, of which the sample has the first {same:,}"
        theirs, ours = (template.tokenizer.decode([one[same]]) for one in (ids, asked))
        return (
            f"{len(asked):,} tokens; after {same:,} of them training goes on with {theirs!r} "
            f"instead of {ours!r}"
        )
    after = labels[max(same, 1) :]  # nothing predicts the first token
    between = sum(1 for _ in itertools.takewhile(lambda label: label == IGNORE_INDEX, after))
    text = f"{len(asked):,} tokens, as in training"
    if between == len(after):
        return f"{text}, where nothing after them is trained"
    return f"{text}, where the next {between:,} tokens are not trained" if between else text
