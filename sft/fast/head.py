"""Compute the LM head and the loss together, on trained positions only.

The full logits of a batch, (tokens, vocabulary), are never in memory.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput
from trl.kernels import ChunkedLogProbFunction
from trl.trainer.utils import maybe_gather_lm_head_ctx

from sft.config.rules import AS_SET, Choice
from sft.data.collator import trained_places
from sft.errors import ConfigError, Problem
from sft.fast.balance import COEFFICIENT, balances
from sft.fast.loss import Asked, Logits, SummedLoss, with_rows
from sft.fast.rows import split

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.config.settings import Config

TILE = 32768  # vocabulary entries at once, as in TRL's trainer


@dataclass
class HeadOutput(ModelOutput):  # type: ignore[misc]
    """The loss and the values for its metrics; N is the number of trained positions.

    Attributes:
        loss: The sum over the N positions, scalar.
        log_probs: The log-probabilities of the labels, without gradient, (N,).
        label_mask: Ones, (N,); in TRL's own output it marks the trained positions of the batch.
        entropy: The entropy of the predictions in nats, (N,); None without ``head_metrics``.
        is_top1: Whether the label is the top token, (N,); None without ``head_metrics``.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    label_mask: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


def install(model: PreTrainedModel, kind: str) -> None:
    """Make ``model(..., labels=..., fused_lm_head=True)`` return a HeadOutput.

    Without ``fused_lm_head``, which is TRL's name, the model is unchanged. If the collator gives
    ``loss_positions``, the GPU need not be waited for to find the trained labels.

    Args:
        model: The base model, whose forward TRL has already replaced.
        kind: ``chunked``: ``SummedLoss``; ``trl``: TRL's kernel; ``plain``: the model's own logits.
    """
    before = getattr(model.forward, "before", model.forward)  # without an earlier install's head
    logits = Logits.of(model.config.get_text_config())
    score = _by_trl if kind == "trl" else _by_chunks

    @functools.wraps(type(model).forward)
    def forward(
        self: PreTrainedModel,
        *args: Any,
        fused_lm_head: bool = False,
        head_metrics: bool = False,
        head_dft: bool = False,
        labels: torch.Tensor | None = None,
        loss_positions: torch.Tensor | None = None,
        loss_weights: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return before(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        assert labels is not None
        if loss_positions is None:
            loss_positions = trained_places(labels)
        labels = labels.flatten()[loss_positions]
        weights = None if loss_weights is None else loss_weights.view(torch.float32)
        asked = Asked(head_dft, head_metrics, weights)
        if kind == "plain":
            scores = before(*args, **kwargs).logits
            scores = scores.flatten(0, 1)[(loss_positions - 1).to(scores.device)].float()
            return _scored(scores, labels.to(scores.device), asked)
        # Llama-4's text model is its own base_model, because its prefix names no module of it.
        backbone = self.base_model if self.base_model is not self else self.model
        states = backbone(*args, **kwargs).last_hidden_state
        states = states.flatten(0, 1)[(loss_positions - 1).to(states.device)]
        head, rows, values = split(self.get_output_embeddings())
        states, labels = states.to(head.weight.device), labels.to(head.weight.device)
        with maybe_gather_lm_head_ctx(head.weight, head.bias, values):
            trained = (head.weight, head.bias, rows, values)
            return score(states, trained, labels, logits, asked)

    forward.before = before  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def _by_chunks(
    states: torch.Tensor,
    trained: tuple[Any, ...],
    labels: torch.Tensor,
    logits: Logits,
    asked: Asked,
) -> HeadOutput:
    """Compute the loss of the labels, (N,), from the backbone's states, (N, width).

    ``trained`` is the head's weight and bias, and the indices and the values of single trained
    rows, or None.
    """
    if not torch.is_grad_enabled():  # otherwise SummedLoss would compute their gradients
        trained = tuple(None if weight is None else weight.detach() for weight in trained)
    loss, log_probs, entropy, is_top1 = SummedLoss.apply(  # type: ignore[no-untyped-call]
        states, *trained, labels, logits, asked
    )
    return HeadOutput(
        loss=loss,
        log_probs=log_probs,
        label_mask=torch.ones_like(labels, dtype=torch.bool),
        entropy=entropy if asked.metrics else None,
        is_top1=is_top1 if asked.metrics else None,
    )


def _by_trl(
    states: torch.Tensor,
    trained: tuple[Any, ...],
    labels: torch.Tensor,
    logits: Logits,
    asked: Asked,
) -> HeadOutput:
    """Compute the same with TRL's kernel, which uses Triton on a GPU."""
    weight, bias, rows, values = trained
    weight = with_rows(weight, rows, values)
    wanted = ("entropy", "is_top1") if asked.metrics else ()
    log_probs, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        states, weight, bias, labels, 1.0, TILE, logits.softcap, logits.scale, wanted
    )
    return HeadOutput(
        loss=asked.losses(log_probs).sum(),
        log_probs=log_probs.detach(),
        label_mask=torch.ones_like(labels, dtype=torch.bool),
        entropy=None if entropy is None else entropy.detach(),
        is_top1=is_top1,
    )


def _scored(scores: torch.Tensor, labels: torch.Tensor, asked: Asked) -> HeadOutput:
    """Compute the same from logits, (N, vocabulary), with plain PyTorch functions."""
    every = scores.log_softmax(-1)
    log_probs = every.gather(1, labels[:, None])[:, 0]
    every = every.detach()
    return HeadOutput(
        loss=asked.losses(log_probs).sum(),
        log_probs=log_probs.detach(),
        label_mask=torch.ones_like(labels, dtype=torch.bool),
        entropy=-(every.exp() * every).sum(-1) if asked.metrics else None,
        is_top1=every.argmax(-1) == labels if asked.metrics else None,
    )


def choose(
    config: Config, architecture: PreTrainedModel, weighted: bool = False, split_rows: bool = False
) -> Choice:
    """Choose ``model.lm_head``: how the loss is computed.

    Args:
        config: The run's config.
        architecture: The model, with or without weights.
        weighted: Whether tokens of the data have weights between 0 and 1.
        split_rows: Whether single rows are trained that ZeRO-3 splits among the ranks.

    Raises:
        ConfigError: Only TRL's head adds the loss that balances experts, without weights and
            without such rows.
    """
    name, asked = "model.lm_head", config.model.lm_head
    gathers = "TRL's head cannot gather single trained rows, which zero=stage3 splits"
    if balances(config, architecture):
        if weighted:
            rule = "the loss that balances this model's experts is not computed with weights"
            fix = f"train.extra.{COEFFICIENT}=0, or dataset.ignore_columns=[messages.weight]"
            raise ConfigError([Problem("messages with a weight between 0 and 1", rule, fix)])
        if split_rows:
            rule = f"{gathers}, and only TRL's adds the loss that balances the experts"
            raise ConfigError([Problem("zero=stage3", rule, "zero=stage2")])
        if asked in ("chunked", "plain"):
            rule = "only TRL's head adds the loss that balances this model's experts"
            fix = f"{name}=auto, or train.extra.{COEFFICIENT}=0"
            raise ConfigError([Problem(f"{name}={asked}", rule, fix)])
        reason = "only TRL's head adds the loss that balances the experts"
        return Choice(name, "trl", AS_SET if asked == "trl" else reason)
    if asked == "trl" and split_rows:
        raise ConfigError([Problem(f"{name}=trl", gathers, f"{name}=chunked")])
    if asked != "auto":
        return Choice(name, asked, AS_SET)
    if split_rows:
        return Choice(name, "chunked", gathers)
    if torch.cuda.is_available():
        return Choice(name, "trl", "TRL's Triton kernel runs on this GPU")
    return Choice(name, "chunked", "there is no GPU for TRL's Triton kernel")
