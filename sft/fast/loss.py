"""Compute the loss and its gradient over trained positions, one chunk of positions at a time.

The loss is the last operation, so its gradient is computed in the forward pass, from the logits of
the chunk, and nothing is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 1 << 24  # logits at once: 64 MiB in float32, whatever the vocabulary and the batch


@dataclass
class Logits:
    """What a model applies to its head's output.

    Attributes:
        scale: A factor (Cohere, Granite).
        softcap: After it, x becomes softcap * tanh(x / softcap) (Gemma); None: not applied.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Logits:
        """Read a model's config; families use different names for the scale."""
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            scale *= getattr(config, name, None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        scale *= divisor if config.model_type == "hyperclovax" else 1 / divisor
        return cls(scale, getattr(config, "final_logit_softcapping", None))


class SummedLoss(torch.autograd.Function):
    """Sum the loss over positions; the forward pass also computes the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        labels: torch.Tensor,
        logits: Logits,
        dft: bool,
        metrics: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Compute the loss.

        Args:
            ctx: Autograd's context.
            hidden: The backbone's last states, (N, width).
            weight: The head's weight, (vocabulary, width).
            bias: The head's bias, (vocabulary,), or None.
            labels: (N,).
            logits: What the model applies to the head's output.
            dft: Weight each token's loss by its probability (arXiv 2508.05629).
            metrics: Also compute entropy and is_top1.

        Returns:
            loss (scalar), log_probs, entropy and is_top1 (N,); without metrics, the last two are
            empty.
        """
        device = hidden.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        head, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        wanted = ctx.needs_input_grad
        grads = [
            torch.empty_like(hidden, dtype=dtype) if wanted[0] else None,
            torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None,
            torch.zeros_like(bias, dtype=torch.float32) if bias is not None and wanted[2] else None,
        ]
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(log_probs[: len(hidden) if metrics else 0])
        is_top1 = torch.empty_like(entropy, dtype=torch.bool)
        rows = max(1, CHUNK // len(weight))
        with torch.autocast(device.type, enabled=False):
            for begin in range(0, len(hidden), rows):
                part = slice(begin, begin + rows)
                x, target = hidden[part].to(dtype), labels[part, None]
                z = F.linear(x, head, shift).float()
                if logits.scale != 1:
                    z *= logits.scale
                if logits.softcap is not None:
                    z = z.div_(logits.softcap).tanh_()
                    slope = 1 - z.square()
                    z *= logits.softcap
                of_label = z.gather(1, target)
                largest = z.amax(1, keepdim=True)
                if metrics:
                    is_top1[part] = z.argmax(1) == target[:, 0]
                    kept = z.clone()
                p = z.sub_(largest).exp_()
                total = p.sum(1, keepdim=True)
                log_normaliser = largest + total.log()
                log_probs[part] = (of_label - log_normaliser)[:, 0]
                p /= total
                if metrics:
                    entropy[part] = log_normaliser[:, 0] - kept.mul_(p).sum(1)
                if not any(wanted):
                    continue
                # The gradient of -log p(label) with respect to z is p, minus 1 at the label.
                p.scatter_add_(1, target, torch.full_like(of_label, -1))
                if dft:
                    p *= log_probs[part, None].exp()
                if logits.softcap is not None:
                    p *= slope
                if logits.scale != 1:
                    p *= logits.scale
                gradient = p.to(dtype)
                if grads[0] is not None:
                    grads[0][part] = gradient @ head
                if grads[1] is not None:
                    grads[1].addmm_(gradient.float().t(), x.float())
                if grads[2] is not None:
                    grads[2] += gradient.float().sum(0)
        ctx.save_for_backward(*grads)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(log_probs, entropy, is_top1)
        each = -log_probs * log_probs.exp() if dft else -log_probs
        return each.sum(), log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        """Scale the gradients that the forward pass computed."""
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        found = [None if grad is None else (grad * of_loss).to(dtype) for grad, dtype in pairs]
        return (*found, None, None, None, None)
