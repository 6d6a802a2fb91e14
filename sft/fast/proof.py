"""Check on the model itself, before the first step, that fast and plain implementations agree."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sft.config.rules import Choice
from sft.data.collator import Collator
from sft.data.row_encoder import IGNORE_INDEX
from sft.errors import ModelError
from sft.fast.attention import UNPACKED, kernel_of
from sft.ranks import gather

logger = logging.getLogger("sft")


def prove_isolation(
    model: Any, collator: Collator, device: torch.device, vocabulary: int, may_pad: bool
) -> Choice | None:
    """Check that documents in one row do not attend to each other in this model.

    Args:
        model: The model as training wrapped it.
        collator: The collator that joins samples. It is set to pad them if the check fails and
            ``may_pad`` allows it.
        device: The model's device.
        vocabulary: The number of tokens.
        may_pad: Whether samples may be padded instead of joined.

    Returns:
        None if the check passes; else the choice that replaces ``train.padding_free``.

    Raises:
        ModelError: The check fails, and samples must be joined.
    """
    try:
        require_isolation(model, collator, device, vocabulary)
    except ModelError as error:
        if not may_pad:
            raise
        collator.padding_free = collator.documents = False
        choice = Choice("train.padding_free", False, str(error).splitlines()[0])
        logger.info("train.padding_free=false: %s", choice.reason)
        return choice
    return None


@torch.no_grad()
def require_isolation(
    model: Any, collator: Collator, device: torch.device, vocabulary: int
) -> None:
    """Require that the tokens of one document in a row do not change the output of the other.

    Two documents are packed into a row and run through the model. If the first document's tokens
    change, the output for the second (log-probabilities or logits) must stay equal to the last bit.
    It must also equal the output for the second document alone, except for rounding. All ranks must
    call this function.

    Raises:
        ModelError: The documents attend to each other.
    """
    inner = getattr(model, "module", model)
    second = [(5 * position + 3) % vocabulary for position in range(5)]

    def seen(first: list[int]) -> torch.Tensor:
        """Return the model's output for the second document, packed after the first."""
        ids = first + second
        labels = [IGNORE_INDEX] * len(first) + second
        lengths = [len(part) for part in (first, second) if part]
        batch = collator([{"input_ids": ids, "labels": labels, "seq_lengths": lengths}])
        inputs = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        # Called as in training: under ZeRO-3 a different order of layers would disturb prefetching.
        output = model(**inputs, use_cache=False, fused_lm_head=True)
        found = getattr(output, "log_probs", None)
        result: torch.Tensor = output.logits[0, len(first) : len(ids)] if found is None else found
        return result.float()

    was_training = model.training
    model.eval()
    packed = seen([7 * position % vocabulary for position in range(6)])
    changed = seen([(7 * position + 1) % vocabulary for position in range(6)])
    alone = seen([])
    model.train(was_training)

    # LLM.int8 searches all tokens for outliers, and experts get tokens of all documents. Both
    # change the order of summation.
    reorders = getattr(inner, "is_loaded_in_8bit", False) or any(
        "expert" in name for name in vars(inner.config.get_text_config())
    )
    dtype = next(p.dtype for p in inner.parameters() if p.is_floating_point())
    rounding = 16 * max(torch.finfo(dtype).eps, 2**-10)  # float32 products may use TF32
    scale = float(packed.abs().max())
    apart = float((packed.sum() - alone.sum()).abs()) / max(scale, float(alone.sum().abs()))
    between = float((packed - changed).abs().max())
    if between > (rounding * scale if reorders else 0) or not apart <= rounding:
        apart = max(between, apart)
        raise ModelError(
            f"with attn_implementation={kernel_of(inner.config)}, documents that are packed "
            f"together attend to each other in this model (outputs differ by {apart:.2g})\n"
            f"    fix: {UNPACKED}"
        )


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
    eps = max(torch.finfo(dtype).eps, torch.finfo(computed_in).eps)
    rounding = 16 * eps * max(1.0, float(scores.abs().max()))
    return float((found - expected.to(found.device)).abs().max()) / rounding
