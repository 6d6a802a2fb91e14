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
class Asked:
    """What a forward pass asks of the loss.

    Attributes:
        dft: Multiply each loss by the label's probability (arXiv 2508.05629).
        metrics: Also compute entropy and is_top1.
        weights: Factors of the losses, (N,), float32; None: 1.
    """

    dft: bool
    metrics: bool
    weights: torch.Tensor | None = None

    def factors(self, log_probs: torch.Tensor, part: slice = slice(None)) -> torch.Tensor | None:
        """Return by what the losses of some positions are multiplied, (rows,); None: 1."""
        weights = None if self.weights is None else self.weights[part].to(log_probs.device)
        if not self.dft:
            return weights
        factors = log_probs.detach().exp()
        return factors if weights is None else factors * weights

    def losses(self, log_probs: torch.Tensor) -> torch.Tensor:
        """Return the loss of each label, (N,)."""
        factors = self.factors(log_probs)
        return -log_probs if factors is None else -log_probs * factors


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

    def apply_(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply both to the head's output in place; also return the derivative of the soft cap."""
        if self.scale != 1:
            z *= self.scale
        if self.softcap is None:
            return z, None
        z = z.div_(self.softcap).tanh_()
        slope = 1 - z.square()
        z *= self.softcap
        return z, slope

    def backward_(self, gradient: torch.Tensor, slope: torch.Tensor | None) -> torch.Tensor:
        """Turn the gradient of the result of ``apply_`` into that of the head's output."""
        if slope is not None:
            gradient *= slope
        if self.scale != 1:
            gradient *= self.scale
        return gradient


def _softmax_(
    z: torch.Tensor, target: torch.Tensor, with_entropy: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Replace logits, (rows, vocabulary), by their probabilities.

    Args:
        z: The logits, which are overwritten.
        target: The labels, (rows, 1).
        with_entropy: Also compute the entropy, which needs a copy of the logits.

    Returns:
        The probabilities, (rows, vocabulary); the labels' log-probabilities, (rows,); the entropy
        in nats, (rows,), or None.
    """
    of_label = z.gather(1, target)
    largest = z.amax(1, keepdim=True)
    unchanged = z.clone() if with_entropy else None
    p = z.sub_(largest).exp_()
    total = p.sum(1, keepdim=True)
    log_normaliser = largest + total.log()
    p /= total
    log_probs = (of_label - log_normaliser)[:, 0]
    if unchanged is None:
        return p, log_probs, None
    return p, log_probs, log_normaliser[:, 0] - unchanged.mul_(p).sum(1)


def _add_gradients(
    grads: list[torch.Tensor | None],
    part: slice,
    gradient: torch.Tensor,
    x: torch.Tensor,
    head: torch.Tensor,
    index: torch.Tensor | None,
) -> None:
    """Add a chunk's gradients to those of the states, the head's weight, its bias and single rows.

    Args:
        grads: The four gradients; None for one that is not needed.
        part: The chunk's rows of the states.
        gradient: The gradient of the head's output, (rows, vocabulary).
        x: The chunk's states, (rows, width).
        head: The head's weight, (vocabulary, width).
        index: The indices of single rows that are trained, (rows,), or None.
    """
    of_states, of_weight, of_bias, of_rows = grads
    if of_states is not None:
        of_states[part] = gradient @ head
    if of_weight is not None:
        of_weight.addmm_(gradient.float().t(), x.float())
    if of_bias is not None:
        of_bias += gradient.float().sum(0)
    if of_rows is not None:
        of_rows.addmm_(gradient[:, index].float().t(), x.float())


def _zeros(given: torch.Tensor | None, wanted: bool) -> torch.Tensor | None:
    """Return float32 zeros in a weight's shape, if it is given and its gradient is wanted."""
    return torch.zeros_like(given, dtype=torch.float32) if given is not None and wanted else None


def with_rows(
    weight: torch.Tensor, index: torch.Tensor | None, values: torch.Tensor | None
) -> torch.Tensor:
    """Return a weight with the values of single rows, or the weight itself."""
    if index is None or values is None:
        return weight
    return weight.index_copy(0, index, values.to(weight.dtype))


def _of_logits_(
    p: torch.Tensor, target: torch.Tensor, factors: torch.Tensor | None
) -> torch.Tensor:
    """Turn probabilities, (rows, vocabulary), into the gradient of the losses by the logits.

    That of -log p(label) is p, minus 1 at the label.
    """
    p.scatter_add_(1, target, p.new_full(target.shape, -1))
    return p if factors is None else p.mul_(factors[:, None])


class SummedLoss(torch.autograd.Function):
    """Sum the loss over positions; the forward pass also computes the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        index: torch.Tensor | None,
        values: torch.Tensor | None,
        labels: torch.Tensor,
        logits: Logits,
        asked: Asked,
    ) -> tuple[torch.Tensor, ...]:
        """Compute the loss.

        Args:
            ctx: Autograd's context.
            hidden: The backbone's last states, (N, width).
            weight: The head's weight, (vocabulary, width).
            bias: The head's bias, (vocabulary,), or None.
            index: The indices of single rows of the weight that are trained, (rows,), or None.
            values: The values of these rows, (rows, width), which replace those of the weight.
            labels: (N,).
            logits: What the model applies to the head's output.
            asked: Factors of the losses, and whether to compute entropy and is_top1.

        Returns:
            loss (scalar); log_probs, entropy, is_top1 (N,): the last two are empty without metrics.
        """
        device = hidden.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        head, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
        head = with_rows(head, index, values)
        wanted = ctx.needs_input_grad
        grads = [
            torch.empty_like(hidden, dtype=dtype) if wanted[0] else None,
            *(_zeros(weight, wanted[1]), _zeros(bias, wanted[2]), _zeros(values, wanted[4])),
        ]
        log_probs = hidden.new_empty(len(hidden), dtype=torch.float32)
        entropy = torch.empty_like(log_probs[: len(hidden) if asked.metrics else 0])
        is_top1 = torch.empty_like(entropy, dtype=torch.bool)
        rows = max(1, CHUNK // len(weight))
        with torch.autocast(device.type, enabled=False):
            for begin in range(0, len(hidden), rows):
                part = slice(begin, begin + rows)
                x, target = hidden[part].to(dtype), labels[part, None]
                z, slope = logits.apply_(F.linear(x, head, shift).float())
                if asked.metrics:
                    is_top1[part] = z.argmax(1) == target[:, 0]
                p, log_probs[part], spread = _softmax_(z, target, with_entropy=asked.metrics)
                if spread is not None:
                    entropy[part] = spread
                if any(wanted):
                    p = _of_logits_(p, target, asked.factors(log_probs[part], part))
                    gradient = logits.backward_(p, slope).to(dtype)
                    _add_gradients(grads, part, gradient, x, head, index)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if it is None else it.dtype for it in (hidden, weight, bias, values)]
        ctx.mark_non_differentiable(log_probs, entropy, is_top1)
        return asked.losses(log_probs).sum(), log_probs, entropy, is_top1

    @staticmethod
    def backward(ctx: Any, of_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        """Scale the gradients that the forward pass computed."""
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        found = [None if grad is None else (grad * of_loss).to(dtype) for grad, dtype in pairs]
        return (*found[:3], None, found[3], None, None, None)
