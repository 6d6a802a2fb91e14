"""Choose the attention kernel, and whether the rows of a micro-batch are joined into one row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers.utils.import_utils import (
    KERNELS_MAX_VERSION,
    KERNELS_MIN_VERSION,
    is_kernels_available,
)

from sft.config.rules import AS_SET, Choice, typed
from sft.errors import ConfigError, Problem
from sft.fast import mixers
from sft.fast.attention import HUB, NAME, UNPACKED, is_flash, register

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.config.settings import Config

# These models build the causal mask without positions, so stock kernels do not separate documents.
LEAKS = {"biogpt", "bloom", "falcon", "mpt", "opt", "xglm"}


def choose(
    config: Config, architecture: PreTrainedModel, precision: str, packed: bool
) -> tuple[Choice, Choice]:
    """Choose ``model.attn_implementation`` and ``train.padding_free``.

    Args:
        config: The run's config.
        architecture: The model, with or without weights.
        precision: fp32, bf16 or fp16.
        packed: Whether a sample holds several documents.

    Returns:
        The kernel, None for the architecture's own; whether a micro-batch is joined into one row.

    Raises:
        ConfigError: Documents in one row would attend to each other.
    """
    kind = architecture.config.model_type
    if kind in mixers.REFUSED:
        rule = f"the architecture {kind} is not supported: {mixers.REFUSED[kind]}"
        fix = "model.name_or_path of a model of a different architecture"
        raise ConfigError([Problem(f"model.name_or_path={config.model.name_or_path}", rule, fix)])
    asked, joined = config.model.attn_implementation, config.train.padding_free
    why = AS_SET
    if joined == "auto":
        why = unjoinable(architecture, asked, precision)
        joined = not why
        why = why or "attention separates the joined rows"
    used = resolve(architecture, asked, packed or joined)
    if packed and not joined and mixers.mixers(architecture):
        if config.train.padding_free is False:
            rule = "kernels that separate documents in states and convolutions take one row"
            raise ConfigError(
                [
                    Problem(
                        "train.padding_free=false", rule, f"train.padding_free=auto, or {UNPACKED}"
                    )
                ]
            )
        joined, why = True, "samples hold several documents, and the kernels take one row"
    if asked != "auto":
        reason = AS_SET
    elif joined:
        reason = "rows are joined without padding"
    elif packed:
        reason = "samples hold several documents, which this attention separates"
    else:
        reason = "rows are padded; null is the architecture's own attention"
    return (
        Choice("model.attn_implementation", used, reason),
        Choice("train.padding_free", joined, why),
    )


def resolve(architecture: PreTrainedModel, asked: str | None, several: bool) -> str | None:
    """Resolve ``model.attn_implementation`` to a kernel; None is the architecture's own.

    Args:
        architecture: The model, with or without weights.
        asked: ``model.attn_implementation``.
        several: Whether a row holds several documents.

    Raises:
        ConfigError: Documents in one row would attend to each other.
    """
    register()
    kind = architecture.config.model_type
    ours = takes_ours(architecture)
    if several and (reason := mixers.lacking(architecture)):
        rule = f"documents in one row would change each other in {kind}: {reason}"
        fix = f"{UNPACKED} and train.padding_free=auto"
        raise ConfigError([Problem("dataset.packing or train.padding_free=true", rule, fix)])
    if asked == NAME and not ours:
        raise ConfigError(
            [
                Problem(
                    f"model.attn_implementation={NAME}",
                    f"the architecture {kind} has its own attention, which cannot be replaced",
                    "model.attn_implementation=auto",
                )
            ]
        )
    if HUB in (asked or "") and not is_kernels_available():
        rule = f"needs the package kernels, from {KERNELS_MIN_VERSION} to {KERNELS_MAX_VERSION}"
        fix = f"pip install kernels=={KERNELS_MIN_VERSION}"
        raise ConfigError([Problem(f"model.attn_implementation={asked}", rule, fix)])
    if asked == "auto":
        asked = NAME if several and ours else None
    if several and kind in LEAKS and asked != NAME and not is_flash(asked):
        raise ConfigError(
            [
                Problem(
                    f"dataset.packing with model.attn_implementation={asked or 'null'}",
                    f"documents that are packed together would attend to each other in {kind}",
                    f"model.attn_implementation={NAME}, or {UNPACKED}" if ours else UNPACKED,
                )
            ]
        )
    return asked


def unjoinable(architecture: PreTrainedModel, asked: str | None, precision: str) -> str:
    """Return why samples are not joined into one row by default; "" if they are.

    Joined samples must not attend to each other, so the kernel must know where each begins. On a
    GPU, PyTorch's ``varlen_attn`` must support the model, because a loop over documents would leave
    the GPU idle.

    Args:
        architecture: The model, with or without weights.
        asked: ``model.attn_implementation``.
        precision: fp32, bf16 or fp16.
    """
    if is_flash(asked):
        return ""
    if asked not in ("auto", NAME):
        return f"model.attn_implementation={typed(asked)} cannot separate joined rows"
    if reason := mixers.lacking(architecture):
        return reason
    if not takes_ours(architecture):
        if mixers.mixers(architecture) and architecture._supports_sdpa and asked == "auto":
            return ""  # sdpa separates documents by their positions, and kernels by the boundaries
        kind = architecture.config.model_type
        return f"{kind} has its own attention, which cannot separate joined rows"
    if not torch.cuda.is_available():
        return ""
    text = architecture.config.get_text_config()
    names = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
    heads = mixers.largest(text, "num_attention_heads", "n_head") or 1
    size = mixers.largest(text, "head_dim") or text.hidden_size // heads
    lacks = {
        "precision=fp32": precision == "fp32",
        "attention dropout": any(getattr(text, name, None) for name in names),
        f"heads of size {size}": size % 8 != 0 or size > 256,
        "this GPU": torch.cuda.get_device_capability() < (8, 0),
    }
    reason = next((what for what, holds in lacks.items() if holds), "")
    return reason and f"PyTorch's attention over documents does not support {reason}"


def takes_ours(architecture: PreTrainedModel) -> bool:
    """Return whether ``packed_attention`` can replace a model's attention."""
    text = architecture.config.get_text_config()
    return (
        bool(getattr(architecture, "_supports_attention_backend", False))
        and bool(getattr(architecture, "_supports_sdpa", False))  # no sinks, no capped scores
        and getattr(text, "attn_logit_softcapping", None) is None
        and getattr(text, "index_topk", None) is None  # DeepSeek V3.2's indexer reads the mask
    )


def keeps_scores(architecture: PreTrainedModel, used: str | None) -> bool:
    """Return whether attention stores its scores for the backward pass: only eager does.

    Args:
        architecture: The model, with or without weights.
        used: The attention kernel; None for the architecture's own, which is eager without sdpa.
    """
    return used == "eager" or not architecture._supports_sdpa
