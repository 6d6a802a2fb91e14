"""Order samples by the seed alone, on any number of ranks; an epoch visits each sample once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from sft.data.row_encoder import IGNORE_INDEX


class Fillers(torch.utils.data.Dataset[dict[str, Any]]):
    """A dataset, extended by fillers without trained tokens to whole batches on all ranks.

    Fillers add nothing to the loss, which is the mean over trained tokens.
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
    """Yields all samples in an order drawn from the seed and the epoch, then the fillers."""

    def __init__(self, dataset: Fillers, seed: int) -> None:
        self.count, self.length = len(dataset.samples), len(dataset)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that orders the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        yield from order_of(self.count, self.seed, self.epoch)
        yield from range(self.count, self.length)


def order_of(count: int, seed: int, epoch: int) -> list[int]:
    """Return the order of an epoch's samples."""
    order: list[int] = np.random.default_rng((seed, epoch)).permutation(count).tolist()
    return order


def samples_of(
    step: int,
    micro_batches: Sequence[int],
    *,
    count: int,
    seed: int,
    micro: int,
    accumulation: int,
    rank: int,
    ranks: int,
) -> list[int]:
    """List the samples that a rank saw in micro-batches of an optimizer step, without fillers.

    Micro-batches are assigned to the ranks in turn.

    Args:
        step: Optimizer step, counted from 1.
        micro_batches: Indices of the step's micro-batches on this rank, from 0.
        count: Samples in an epoch.
        seed: Seed of the order.
        micro: Samples in a micro-batch.
        accumulation: Micro-batches in a step.
        rank: The rank.
        ranks: The world size.
    """
    epoch, place = divmod(step - 1, math.ceil(count / (micro * accumulation * ranks)))
    order = order_of(count, seed, epoch)
    batches = [(place * accumulation + number) * ranks + rank for number in micro_batches]
    return [sample for batch in batches for sample in order[batch * micro : (batch + 1) * micro]]


def eval_batches(samples: Any, size: int, rank: int, ranks: int) -> Iterator[list[dict[str, Any]]]:
    """Yield a rank's batches, as many on each rank: under ZeRO-3 all ranks join every forward pass.

    Samples are assigned to the ranks in turn. A rank that has none left repeats the last sample
    with no trained token, which adds nothing to a sum over trained tokens.

    Args:
        samples: Dataset with ``input_ids`` and ``labels``.
        size: Samples of a rank's batch, at most.
        rank: The rank.
        ranks: The world size.
    """
    for start in range(0, len(samples), size * ranks):
        indices = range(start + rank, min(start + size * ranks, len(samples)), ranks)
        batch = [samples[index] for index in indices]
        if not batch:
            last = samples[len(samples) - 1]["input_ids"]
            batch = [{"input_ids": last, "labels": [IGNORE_INDEX] * len(last)}]
        yield batch
