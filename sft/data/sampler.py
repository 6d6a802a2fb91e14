"""Every sample once an epoch, in an order of the seed alone, on any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from sft.data.encode import IGNORE_INDEX


class Fillers(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset followed by samples in which nothing is trained, up to whole batches on all ranks.

    They add nothing to the loss, which is the mean over trained tokens.
    """

    def __init__(self, samples: Any, multiple: int, pad_token_id: int) -> None:
        self.samples = samples
        self.length = math.ceil(len(samples) / multiple) * multiple
        self.filler = {"input_ids": [pad_token_id] * 2, "labels": [IGNORE_INDEX] * 2}

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = (
            self.samples[index] if index < len(self.samples) else dict(self.filler)
        )
        return sample


class Shuffle(torch.utils.data.Sampler[int]):
    """All samples in an order of the seed and the epoch, then the fillers."""

    def __init__(self, dataset: Fillers, seed: int) -> None:
        self.count, self.length = len(dataset.samples), len(dataset)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; the Trainer calls it, on resuming too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        yield from order.tolist()
        yield from range(self.count, self.length)
