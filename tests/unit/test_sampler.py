"""Every sample once an epoch, and the same samples in a step, however ranks share them."""

import itertools

import pytest
import torch
from accelerate.data_loader import prepare_data_loader

from sft.data.sampler import Fillers, Shuffle


def steps(count: int, micro: int, ranks: int, accumulation: int, epoch: int) -> list[list[int]]:
    """List the samples of each optimizer step, as Accelerate shards them over ranks."""
    samples = [{"input_ids": [index], "labels": [index]} for index in range(count)]
    per_rank = []
    for rank in range(ranks):
        dataset = Fillers(samples, micro * ranks, pad_token_id=0)
        loader = torch.utils.data.DataLoader(
            dataset,
            batch_size=micro,
            sampler=Shuffle(dataset, seed=3),
            collate_fn=lambda batch: [s["labels"][0] for s in batch],
        )
        prepared = prepare_data_loader(
            loader, torch.device("cpu"), ranks, rank, put_on_device=False, even_batches=True
        )
        prepared.set_epoch(epoch)
        per_rank.append(list(prepared))
    assert len({len(batches) for batches in per_rank}) == 1  # no rank waits for another
    forwards = [list(itertools.chain(*batches)) for batches in zip(*per_rank, strict=True)]
    grouped = [
        list(itertools.chain(*forwards[start : start + accumulation]))
        for start in range(0, len(forwards), accumulation)
    ]
    return [sorted(label for label in step if label != -100) for step in grouped]


@pytest.mark.parametrize("count", [1, 7, 8, 23, 24, 25])
def test_steps_do_not_depend_on_ranks_or_micro_batch(count: int) -> None:
    expected = steps(count, 8, 1, 1, epoch=0)
    assert sorted(itertools.chain(*expected)) == list(range(count))
    assert len(expected) == -(-count // 8)
    for micro, ranks, accumulation in [(1, 8, 1), (2, 2, 2), (4, 2, 1), (1, 4, 2), (2, 1, 4)]:
        assert steps(count, micro, ranks, accumulation, epoch=0) == expected


def test_the_order_is_of_seed_and_epoch() -> None:
    assert steps(24, 8, 1, 1, epoch=0) == steps(24, 8, 1, 1, epoch=0)
    assert steps(24, 8, 1, 1, epoch=0) != steps(24, 8, 1, 1, epoch=1)
