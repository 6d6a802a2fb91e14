"""The LM head and the loss in one: only trained positions, a few at a time, gradient included.

The full logits of a batch, (tokens, vocabulary), never exist. Since nothing follows the loss, its
gradient is formed while a chunk's logits are at hand, so that nothing is computed twice.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers.utils import ModelOutput
from trl.trainer.utils import add_fused_lm_head, maybe_gather_lm_head_ctx

from sft.data.encode import IGNORE_INDEX
from sft.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTConfig

CHUNK = 1 << 24  # logits at once: 64 MiB in float32, whatever the vocabulary and the batch


@dataclass
class HeadOutput(ModelOutput):  # type: ignore[misc]
    """What the loss and its metrics need; N is the number of trained positions.

    Attributes:
        loss: Summed over the N positions, scalar.
        log_probs: Of the labels, without gradient; shape (N,), or of the batch, zero elsewhere.
        label_mask: Which are trained, of the same shape.
        entropy: Of the predictions in nats, of the same shape; None unless asked for.
        is_top1: Whether the label is the likeliest token, likewise.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


@dataclass
class Logits:
    """What a model does to its head's output.

    Attributes:
        scale: It is multiplied by this (Cohere, Granite).
        softcap: Then x becomes softcap * tanh(x / softcap) (Gemma); None: it stays.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> Logits:
        """Read a model's config: each family has a name of its own for it."""
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            scale *= getattr(config, name, None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        scale *= divisor if config.model_type == "hyperclovax" else 1 / divisor
        return cls(scale, getattr(config, "final_logit_softcapping", None))


class SummedLoss(torch.autograd.Function):
    """Sum the loss over positions; its gradient is formed in the forward pass."""

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
        """Score the labels.

        Args:
            ctx: Autograd's.
            hidden: The backbone's last states, (N, width).
            weight: The head's, (vocabulary, width).
            bias: The head's, (vocabulary,), or None.
            labels: (N,).
            logits: What becomes of the head's output.
            dft: Weigh each token's loss by its probability (arXiv 2508.05629).
            metrics: Also give entropy and is_top1.

        Returns:
            loss (scalar), log_probs, entropy and is_top1 (N,); the last two empty unless asked for.
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
                # The gradient of -log p(label) on z is p, less one at the label.
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
        """Scale what the forward pass formed."""
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        found = [None if grad is None else (grad * of_loss).to(dtype) for grad, dtype in pairs]
        return (*found, None, None, None, None)


def install(model: PreTrainedModel, kind: str) -> None:
    """Let ``model(..., labels=..., fused_lm_head=True)`` give a HeadOutput.

    Called otherwise, the model does what it did; ``fused_lm_head`` is TRL's name.

    Args:
        model: The base model, to which TRL has given its head.
        kind: ``chunked``: as above; ``trl``: TRL's kernel; ``plain``: from the model's own logits.
    """
    before = getattr(model.forward, "before", model.forward)  # not a head that we installed
    model.forward = before
    add_fused_lm_head(model)
    without_metrics = model.forward
    logits = Logits.of(model.config.get_text_config())

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        head_metrics: bool = False,
        head_dft: bool = False,
        labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return before(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        assert labels is not None
        if kind == "trl":
            score = before if head_metrics else without_metrics
            found = score(*args, labels=labels, fused_lm_head=True, **kwargs)
            return _summed(found, head_dft)
        labels = labels[:, 1:]
        trained = labels != IGNORE_INDEX
        if kind == "plain":
            scores = before(*args, **kwargs).logits[:, :-1][trained].float()
            return _scored(scores, labels[trained], head_dft, head_metrics)
        states = self.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        head = self.get_output_embeddings()
        states, labels, trained = (x.to(head.weight.device) for x in (states, labels, trained))
        with maybe_gather_lm_head_ctx(head.weight, head.bias):
            weights: tuple[Any, ...] = (head.weight, head.bias)
            if not torch.is_grad_enabled():  # else its gradient would be formed all the same
                weights = tuple(None if w is None else w.detach() for w in weights)
            loss, log_probs, entropy, is_top1 = SummedLoss.apply(  # type: ignore[no-untyped-call]
                states[trained],
                *weights,
                labels[trained],
                logits,
                head_dft,
                head_metrics,
            )
        return HeadOutput(
            loss=loss,
            log_probs=log_probs,
            label_mask=trained[trained],
            entropy=entropy if head_metrics else None,
            is_top1=is_top1 if head_metrics else None,
        )

    forward.before = before  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _summed(found: Any, dft: bool) -> HeadOutput:
    """Sum what TRL's kernel gives for each position, zero where nothing is trained."""
    weights = found.log_probs.detach().exp() if dft else 1
    return HeadOutput(
        loss=-(found.log_probs * weights).sum(),
        log_probs=found.log_probs.detach(),
        label_mask=found.label_mask,
        entropy=found.entropy,
        is_top1=found.is_top1,
    )


def _scored(scores: torch.Tensor, labels: torch.Tensor, dft: bool, metrics: bool) -> HeadOutput:
    """Give the same from logits, (N, vocabulary), as anyone would write it."""
    every = scores.log_softmax(-1)
    log_probs = every.gather(1, labels[:, None])[:, 0]
    each = -log_probs * log_probs.detach().exp() if dft else -log_probs
    every = every.detach()
    return HeadOutput(
        loss=each.sum(),
        log_probs=log_probs.detach(),
        label_mask=torch.ones_like(labels, dtype=torch.bool),
        entropy=-(every.exp() * every).sum(-1) if metrics else None,
        is_top1=every.argmax(-1) == labels if metrics else None,
    )


def choose(asked: str, architecture: PreTrainedModel, args: SFTConfig) -> tuple[str, str]:
    """Choose the head, and say why.

    Args:
        asked: ``model.lm_head``.
        architecture: The model, weights or none.
        args: TRL's.

    Raises:
        ConfigError: Experts are balanced by a loss of their own, which only TRL's head adds.
    """
    text = architecture.config.get_text_config()
    # As SFTTrainer decides it.
    balances = hasattr(text, "output_router_logits") and args.router_aux_loss_coef != 0
    if balances and asked in ("chunked", "plain"):
        rule = "the loss that balances this model's experts is added by TRL's head"
        fix = "model.lm_head=auto, or train.extra.router_aux_loss_coef=0"
        raise ConfigError([Problem(f"model.lm_head={asked}", rule, fix)])
    if balances:
        return "trl", "it adds the loss that balances the experts"
    if asked != "auto":
        return asked, "as asked"
    if args.device.type == "cpu":
        return "chunked", "on a CPU"
    return "trl", "Triton"
