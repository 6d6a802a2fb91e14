"""Greedy answers to prompts, and how many of them are exactly right."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from sft.data.samples import Encoder
from sft.data.template import Template

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    device: torch.device,
    stop_id: int | None = None,
    **options: Any,
) -> list[str]:
    """Continue a batch of encoded prompts.

    Args:
        model: Left as it was found (its training mode too).
        tokenizer: Its EOS ends an answer.
        prompts: Token ids; of different lengths, padded on the left here.
        max_new_tokens: At most this many each.
        device: Where the model computes; offloaded parameters may lie elsewhere.
        stop_id: Another token that ends an answer, such as a chat template's end of turn.
        **options: Further arguments of ``generate``; greedy unless they say otherwise.

    Returns:
        The texts that follow the prompts, without special tokens.
    """
    width = max(map(len, prompts))
    ids = [[tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    was_training = model.training
    model.eval()
    with torch.no_grad():
        output = model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=stop_ids(model, tokenizer, stop_id),
            use_cache=True,
            # The model's own generation config may hold a penalty, which is not plain greedy.
            **{"do_sample": False, "repetition_penalty": 1.0, **options},
        )
    model.train(was_training)
    texts: list[str] = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return texts


def stop_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop_id: int | None
) -> list[int]:
    """List what ends an answer: the tokenizer's EOS, the model's own, and the template's."""
    own = model.generation_config.eos_token_id
    found = [tokenizer.eos_token_id, stop_id, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in found if token is not None})


def exact_match(
    model: PreTrainedModel,
    template: Template,
    rows: Dataset,
    batch_size: int,
    device: torch.device,
) -> dict[str, float]:
    """Answer each row's prompt greedily and compare with its completion, on all ranks together.

    Args:
        model: Any rank's model; under ZeRO-3 every rank takes part in every forward.
        template: Renders prompts and completions as in training.
        rows: Held-out rows.
        batch_size: Prompts a rank answers at once.
        device: Where this rank computes.

    Returns:
        ``exact_match`` (share), ``exact_match_rows`` and ``exact_match_seconds``.
    """
    began = time.perf_counter()
    encoder = Encoder(template.tokenizer)
    chat = template.config.kind == "chat"
    prompts = [encoder.prompt(template.render_prompt(row), chat) for row in rows]
    wanted = [encoder.prompt(template.answer(row), rendered=True) for row in rows]
    answers = [
        text.strip() for text in template.tokenizer.batch_decode(wanted, skip_special_tokens=True)
    ]
    # Two tokens more than the longest answer: what has not stopped by then is wrong anyhow.
    longest, stop_id = max(map(len, wanted)) + 2, template.stop_id()
    rank = dist.get_rank() if dist.is_initialized() else 0
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    right = torch.zeros(1, dtype=torch.int64, device=device)
    for start in range(0, len(prompts), batch_size * ranks):
        indices = list(range(start + rank, min(start + batch_size * ranks, len(prompts)), ranks))
        # A rank that has none left answers one again, uncounted: ZeRO-3 needs every rank.
        texts = complete(
            model,
            template.tokenizer,
            [prompts[index] for index in indices or [start]],
            longest,
            device,
            stop_id,
            synced_gpus=ranks > 1,
        )
        right += sum(
            text.strip() == answers[index] for index, text in zip(indices, texts, strict=False)
        )
    if dist.is_initialized():
        dist.all_reduce(right)
    return {
        "exact_match": right.item() / len(prompts),
        "exact_match_rows": len(prompts),
        "exact_match_seconds": round(time.perf_counter() - began, 3),
    }
