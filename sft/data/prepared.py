"""What prepared data is: samples on disk with their counts, and the tokenizer that made them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft.data.audit import Counts

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


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
