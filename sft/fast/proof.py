"""Before the first step: on this very model, the fast way is the plain way."""

from __future__ import annotations

import logging
from typing import Any

import torch

from sft.data.collator import Collator
from sft.data.encode import IGNORE_INDEX
from sft.errors import ModelError
from sft.fast.attention import UNPACKED, kernel_of
from sft.ranks import gather

logger = logging.getLogger("sft")


def prove_isolation(
    model: Any, collator: Collator, device: torch.device, vocabulary: int, may_pad: bool
) -> None:
    """Show that documents in one row do not see each other in this very model.

    Args:
        model: As training wrapped it.
        collator: Joins samples. Where they see each other, it pads samples from now on.
        device: Where the model is.
        vocabulary: Tokens that it knows.
        may_pad: Samples need not be joined.

    Raises:
        ModelError: Samples must be joined, and see each other.
    """
    try:
        require_isolation(model, collator, device, vocabulary)
    except ModelError as error:
        if not may_pad:
            raise
        logger.info("samples are padded: %s", str(error).splitlines()[0])
        collator.padding_free = collator.documents = False


@torch.no_grad()
def require_isolation(
    model: Any, collator: Collator, device: torch.device, vocabulary: int
) -> None:
    """Require that what one document of a pack says changes nothing in the others.

    Two documents are packed into a row and run through the model itself. With other tokens in the
    first, what the model makes of the second (the log-probabilities of its tokens, or its logits)
    must be the same to the last bit; and, but for rounding, what it makes of the second alone.
    Every rank takes part.

    Raises:
        ModelError: It is not, so that training would leak.
    """
    inner = getattr(model, "module", model)
    second = [(5 * place + 3) % vocabulary for place in range(5)]

    def seen(first: list[int]) -> torch.Tensor:
        """Give what the model makes of the second document behind the first."""
        ids = first + second
        labels = [IGNORE_INDEX] * len(first) + second
        lengths = [len(part) for part in (first, second) if part]
        batch = collator([{"input_ids": ids, "labels": labels, "seq_lengths": lengths}])
        inputs = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        # As in training: under ZeRO-3 another way through the model would upset its prefetching.
        output = model(**inputs, use_cache=False, fused_lm_head=True)
        found = getattr(output, "log_probs", None)
        result: torch.Tensor = output.logits[0, len(first) : len(ids)] if found is None else found
        return result.float()

    was_training = model.training
    model.eval()
    packed = seen([7 * place % vocabulary for place in range(6)])
    changed = seen([(7 * place + 1) % vocabulary for place in range(6)])
    alone = seen([])
    model.train(was_training)

    # LLM.int8 looks for outliers in all tokens, and experts are given those of all documents: the
    # same sums in another order.
    reorders = getattr(inner, "is_loaded_in_8bit", False) or any(
        "expert" in name for name in vars(inner.config.get_text_config())
    )
    dtype = next(p.dtype for p in inner.parameters() if p.is_floating_point())
    rounding = 16 * max(torch.finfo(dtype).eps, 2**-10)  # float32 products may be TF32's
    scale = float(packed.abs().max())
    apart = float((packed.sum() - alone.sum()).abs()) / max(scale, float(alone.sum().abs()))
    between = float((packed - changed).abs().max())
    if between > (rounding * scale if reorders else 0) or not apart <= rounding:
        apart = max(between, apart)
        raise ModelError(
            f"with attn_implementation={kernel_of(inner.config)}, documents that are packed "
            f"together see each other in this model (outputs differ by {apart:.2g})\n"
            f"    fix: {UNPACKED}"
        )


def head_agrees(model: Any, device: torch.device, vocabulary: int, mixed_precision: str) -> bool:
    """Return whether our head computes, on every rank, what the model's own logits say.

    Args:
        model: As training wrapped it.
        device: Where it is.
        vocabulary: Tokens that it knows.
        mixed_precision: Accelerate's: ``no``, ``bf16`` or ``fp16``.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    computed_in = dtypes.get(mixed_precision, torch.float32)
    agrees = difference(model, device, vocabulary, computed_in) <= 1
    if all(gather(agrees)):
        return True
    logger.info("warning: the LM head differs from the model's logits; model.lm_head=plain")
    return False


@torch.no_grad()
def difference(
    model: Any, device: torch.device, vocabulary: int, computed_in: torch.dtype
) -> float:
    """Compare the head with the model's own logits, on one short text.

    Args:
        model: As training wrapped it.
        device: Where it is.
        vocabulary: Tokens that it knows.
        computed_in: The precision of its arithmetic, where weights have a higher one.

    Returns:
        The largest difference of a log-probability, in units of what the precision rounds away.
    """
    inner = getattr(model, "module", model)
    ids = torch.tensor([[(7 * place + 3) % vocabulary for place in range(9)]], device=device)
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
