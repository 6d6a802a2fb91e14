"""Samples on which base + adapter and the merged model are compared: held out by the run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sft.config.plain import from_json, parse_json, read_lines
from sft.data.row_encoder import IGNORE_INDEX
from sft.errors import MergeError
from sft.files import write_text

if TYPE_CHECKING:
    from sft.data.prepared import Prepared

FILE = "probes.jsonl"  # in the run's folder, not in the adapter's, which users publish
COUNT = 8
LENGTH = 128  # tokens of each
SCORES = 1 << 24  # logits of one model that are stored: 64 MiB


@dataclass
class Probes:
    """Token ids to compare on.

    Attributes:
        ids: Shape (samples, longest), padded on the right.
        mask: Same shape: 1 at tokens, 0 at padding.
        labels: Same shape: the next token; -100 where it is not trained.
        prompts: The tokens before the first trained token of each sample.
        origin: A description for the report.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    prompts: list[list[int]]
    origin: str

    def positions(self, vocabulary: int) -> torch.Tensor:
        """Choose the positions whose logits are compared, trained ones first.

        Returns:
            A boolean mask in the shape of ``ids``.
        """
        room = max(16, SCORES // vocabulary)
        chosen = torch.zeros_like(self.mask, dtype=torch.bool)
        for candidates in (self.labels != IGNORE_INDEX, self.mask.bool()):
            spare = (candidates & ~chosen).nonzero()
            step = max(1, -(-len(spare) // max(1, room - int(chosen.sum()))))
            if room > int(chosen.sum()):
                row, column = spare[::step].T
                chosen[row, column] = True
        return chosen

    def answered(self, answers: list[list[int]]) -> Probes:
        """Append answers to the first prompts; only the answers' tokens are labels."""
        rows = [(prompt, answer) for prompt, answer in zip(self.prompts, answers, strict=False)]
        pad = 0  # masked
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids, mask, labels = [], [], []
        for prompt, answer in rows:
            length = len(prompt) + len(answer)
            ids.append([*prompt, *answer] + [pad] * (longest - length))
            mask.append([1] * length + [0] * (longest - length))
            blank = [IGNORE_INDEX] * (len(prompt) - 1)
            labels.append(blank + answer + [IGNORE_INDEX] * (longest - length + 1))
        return Probes(
            torch.tensor(ids), torch.tensor(mask), torch.tensor(labels), [], "greedy answers"
        )

    def __add__(self, other: Probes) -> Probes:
        """Concatenate two sets of samples."""
        width = max(self.ids.shape[1], other.ids.shape[1])

        def both(one: torch.Tensor, two: torch.Tensor, fill: int) -> torch.Tensor:
            return torch.cat([F.pad(t, (0, width - t.shape[1]), value=fill) for t in (one, two)])

        return Probes(
            both(self.ids, other.ids, 0),
            both(self.mask, other.mask, 0),
            both(self.labels, other.labels, IGNORE_INDEX),
            self.prompts + other.prompts,
            self.origin,
        )


def keep(prepared: Prepared, path: Path) -> None:
    """Write the samples that verify a later merge: held out, or trained if none are held out."""
    part = next(iter(prepared.held_out.values()), prepared.train)
    origin = "held-out samples" if prepared.held_out else "training samples"
    lines = []
    for index in range(min(COUNT, len(part.dataset))):
        sample = part.dataset[index]
        ids, labels = _window(sample)
        lines.append({"origin": origin, "input_ids": ids, "labels": labels})
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _window(sample: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Cut a window of ``LENGTH`` tokens around the first trained token of the first document."""
    length = (sample.get("seq_lengths") or [len(sample["input_ids"])])[0]
    ids, labels = sample["input_ids"][:length], sample["labels"][:length]
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), 0)
    stop = min(length, max(LENGTH, first + LENGTH // 2))
    start = max(0, stop - LENGTH)
    return ids[start:stop], labels[start:stop]


@dataclass
class Line:
    """A line of the file."""

    origin: str
    input_ids: list[int]
    labels: list[int]


def load(adapter: Path, vocabulary: int, rows: int) -> Probes:
    """Read the samples from the run's folder around the adapter's; draw random ones if it has none.

    Args:
        adapter: The adapter's folder.
        vocabulary: The number of token ids to draw from.
        rows: Those of the model's embedding; larger token ids do not exist.

    Raises:
        MergeError: The file is damaged, or holds samples of another model.
    """
    path = adapter.parent / FILE
    if path.is_file():
        lines = _read(path, rows)
        samples = [(line.input_ids, line.labels) for line in lines]
        origin = f"{len(samples)} {lines[0].origin} of the run"
    else:
        drawn = torch.randint(0, vocabulary, (4, 64), generator=torch.Generator().manual_seed(0))
        samples = [(ids, [IGNORE_INDEX] * len(ids)) for ids in drawn.tolist()]
        origin = "4 x 64 random tokens, because the adapter is not in a run's folder"
    longest = max(len(ids) for ids, _ in samples)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (longest - len(row)) for row in rows])

    return Probes(
        ids=padded([ids for ids, _ in samples], 0),
        mask=padded([[1] * len(ids) for ids, _ in samples], 0),
        labels=padded([[*labels[1:], IGNORE_INDEX] for _, labels in samples], IGNORE_INDEX),
        prompts=[_prompt(ids, labels) for ids, labels in samples],
        origin=origin,
    )


def _read(path: Path, rows: int) -> list[Line]:
    """Read the samples that ``keep`` wrote."""
    number = 0
    try:
        lines = []
        for text in read_lines(path):
            number += 1
            line = from_json(Line, parse_json(text))
            if not 1 <= len(line.input_ids) == len(line.labels) <= LENGTH:
                raise ValueError(f"input_ids and labels must have the same 1 to {LENGTH} entries")
            if not all(0 <= token < rows for token in line.input_ids):
                raise ValueError(f"a token id is not from 0 to {rows - 1}, as the model has them")
            if not all(0 <= label < rows or label == IGNORE_INDEX for label in line.labels):
                raise ValueError(f"a label is neither {IGNORE_INDEX} nor a token id")
            lines.append(line)
        if not 1 <= len(lines) <= COUNT:
            raise ValueError(f"it has {len(lines)} lines, not 1 to {COUNT}")
    except ValueError as error:
        raise MergeError(
            f"{path}:{number} is damaged: {error}\n    fix: restore the file, or delete it: the "
            "merge is then verified on random tokens"
        ) from error
    return lines


def _prompt(ids: list[int], labels: list[int]) -> list[int]:
    first = next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(ids))
    return ids[: max(1, first)]
