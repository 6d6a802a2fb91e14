"""Check on the model itself, before the first step, that the head agrees with the plain one."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sft.config.rules import Choice
from sft.ranks import gather

logger = logging.getLogger("sft")


def prove_head(
    model: Any, device: torch.device, vocabulary: int, mixed_precision: str
) -> Choice | None:
    """Check that the fast head agrees with the model's own logits on every rank.

    Args:
        model: The model as training wrapped it.
        device: The model's device.
        vocabulary: The number of tokens.
        mixed_precision: Accelerate's value: ``no``, ``bf16`` or ``fp16``.

    Returns:
        None if the check passes; else the choice that replaces ``model.lm_head``.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    computed_in = dtypes.get(mixed_precision, torch.float32)
    agrees = difference(model, device, vocabulary, computed_in) <= 1
    if all(gather(agrees)):
        return None
    choice = Choice("model.lm_head", "plain", "the fast LM head differs from the model's logits")
    logger.info("warning: %s: model.lm_head=plain", choice.reason)
    return choice


@torch.no_grad()
def difference(
    model: Any, device: torch.device, vocabulary: int, computed_in: torch.dtype
) -> float:
    """Compare the head with the model's own logits on one short text.

    Args:
        model: The model as training wrapped it.
        device: The model's device.
        vocabulary: The number of tokens.
        computed_in: The precision of the arithmetic, which may be lower than that of the weights.

    Returns:
        The largest difference between log-probabilities, in units of the expected rounding error.
    """
    inner = getattr(model, "module", model)
    ids = torch.tensor([[(7 * position + 3) % vocabulary for position in range(9)]], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    was_training = model.training
    model.eval()
    found = model(**inputs, labels=ids, fused_lm_head=True).log_probs.flatten().float()
    scores = model(**inputs).logits[0, :-1].float()
    model.train(was_training)
    expected = scores.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    dtype = next(p.dtype for p in inner.parameters() if p.is_floating_point())
    # A score is rounded once to 16 bits, half an eps; its sum is made in float32, in another order.
    eps = {torch.finfo(used).eps for used in (dtype, computed_in)} - {torch.finfo().eps}
    rounding = 16 * torch.finfo(torch.float32).eps + 4 * max(eps, default=0.0)
    rounding *= max(1.0, float(scores.abs().max()))
    return float((found - expected.to(found.device)).abs().max()) / rounding
