"""Prepared data: samples on disk, their counts, and the hash of their tokenizer."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
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
        eval: Held-out samples; None if there are none.
        folder: Folder of the samples, ``data.json`` and ``dropped.jsonl``.
    """

    train: Samples
    eval: Samples | None
    folder: Path

    @property
    def parts(self) -> dict[str, Counts]:
        """Return the counts by part."""
        parts = {"train": self.train.counts}
        return parts if self.eval is None else {**parts, "eval": self.eval.counts}

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
