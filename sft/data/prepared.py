"""Prepared data: samples on disk, their counts, and the hash of their tokenizer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sft.config.plain import read_json
from sft.data.audit import Counts
from sft.files import damage_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

INVENTORY = "files.json"  # written last: sizes and hashes of all other files


@dataclass
class Samples:
    """Samples and their counts.

    Each has ``input_ids``, ``labels``, ``rows`` (numbers, from 1), if packed ``seq_lengths``, and
    ``weights`` (of the tokens in the loss) if some are between 0 and 1.
    """

    dataset: Dataset
    counts: Counts


@dataclass
class Prepared:
    """What a run trains and evaluates on.

    Attributes:
        train: Samples to train on.
        eval: The main held-out samples; None if there are none.
        folder: Folder of the samples, ``data.json`` and ``dropped.jsonl``.
        sets: The samples of each set in ``dataset.eval``, by ``eval_NAME``.
    """

    train: Samples
    eval: Samples | None
    folder: Path
    sets: dict[str, Samples] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: dict[str, Samples], folder: Path) -> Prepared:
        """Make it of the samples by part: ``train``, ``eval``, and ``eval_NAME`` of each set."""
        sets = {name: part for name, part in parts.items() if name not in ("train", "eval")}
        return cls(parts["train"], parts.get("eval"), folder, sets)

    @property
    def held_out(self) -> dict[str, Samples]:
        """Return all held-out samples by part, the main ones first."""
        return {"eval": self.eval, **self.sets} if self.eval is not None else self.sets

    @property
    def parts(self) -> dict[str, Counts]:
        """Return the counts by part."""
        held_out = {name: samples.counts for name, samples in self.held_out.items()}
        return {"train": self.train.counts, **held_out}

    @property
    def largest_id(self) -> int:
        """Return the largest token id of all samples."""
        return max(part.largest_id for part in self.parts.values())


def damage(folder: Path) -> str | None:
    """Compare all files of a folder of prepared data with its inventory.

    XXH3 reads 11 GiB a second from memory, so that every start can hash all of them.

    Returns:
        Why the folder cannot be used, such as the first file that is damaged; None: it can.
    """
    if not (folder / INVENTORY).is_file():
        return f"{INVENTORY} is missing"
    try:
        listed = read_json(folder / INVENTORY)
    except ValueError:
        return f"{INVENTORY} is damaged"
    return damage_of(folder, listed)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identify a tokenizer by what it does, not by its name."""
    if tokenizer.is_fast:
        settings = json.loads(tokenizer.backend_tokenizer.to_str())
        # A call of the tokenizer may change these two.
        text = json.dumps({**settings, "truncation": None, "padding": None})
    else:
        text = json.dumps(sorted(tokenizer.get_vocab().items()))
    special = json.dumps(tokenizer.special_tokens_map, sort_keys=True, default=str)
    return hashlib.sha256((text + special).encode()).hexdigest()[:32]
