"""Count the held-out prompts whose greedy answer is exactly the right one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from sft.inference.answers import complete, rounds, takes_padding, texts_of
from sft.inference.prompts import last_answer
from sft.inference.stops import all_stop_ids
from sft.progress import progress

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Dataset,
    batch_size: int,
    device: torch.device,
    stop_ids: Sequence[int],
) -> dict[str, float]:
    """Answer each sample's prompt greedily and compare with its answer, on all ranks together.

    The answer is the last trained span of a sample, and the prompt is all that precedes it, with
    the token ids of training.

    Args:
        model: This rank's model; under ZeRO-3 every rank takes part in every forward.
        tokenizer: The samples' tokenizer.
        samples: Held-out samples, one document each.
        batch_size: Prompts per batch on each rank.
        device: Where this rank computes.
        stop_ids: Tokens that end an answer, besides EOS.

    Returns:
        ``exact_match`` (share), ``exact_match_rows`` and ``exact_match_seconds``.
    """
    began = time.perf_counter()
    prompts, wanted = zip(
        *(last_answer(sample["input_ids"], sample["labels"]) for sample in samples), strict=True
    )
    stops = all_stop_ids(model.generation_config, tokenizer, stop_ids)
    answers = [text.strip() for text in texts_of(tokenizer, wanted, stops)]
    # Allow two tokens more than the longest answer: an answer that is longer is wrong anyway.
    longest = max(map(len, wanted)) + 2
    if not takes_padding(model, tokenizer, device):
        batch_size = 1  # every rank must generate as often as the others
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    right = torch.zeros(1, dtype=torch.int64, device=device)
    with progress("answering held-out prompts", len(prompts), "prompts") as bar:
        for start, indices in rounds(len(prompts), batch_size):
            # A rank with none left repeats a prompt without counting it: ZeRO-3 needs every rank.
            texts = complete(
                model,
                tokenizer,
                [prompts[index] for index in indices or [start]],
                longest,
                device,
                stop_ids,
                synced_gpus=dist.is_initialized(),
            )
            right += sum(
                text.strip() == answers[index] for index, text in zip(indices, texts, strict=False)
            )
            bar.update(min(batch_size * ranks, len(prompts) - start))
    if dist.is_initialized():
        dist.all_reduce(right)
    return {
        "exact_match": right.item() / len(prompts),
        "exact_match_rows": len(prompts),
        "exact_match_seconds": round(time.perf_counter() - began, 3),
    }
