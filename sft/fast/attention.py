"""Attention over rows of several documents, each of which attends to itself only."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, masking_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from sft.errors import ModelError

NAME = "packed"
FLASH = ("flash_attention_2", "flash_attention_3")
HUB = "/"  # in the name of a kernel of the hub; Transformers calls it as flash attention
UNPACKED = "dataset.packing=none"  # the fix if documents cannot be kept apart


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend causally within each document; without ``cu_seq_lens_q``, call sdpa.

    Args:
        module: The model's attention module.
        query: (batch, heads, length, head_dim).
        key: (batch, key heads, length, head_dim); query heads may share a key head.
        value: Same shape as key.
        attention_mask: The mask in generation; None with documents.
        dropout: The dropout rate of the attention weights.
        scaling: The factor of the scores; None: 1 / sqrt(head_dim).
        cu_seq_lens_q: The bounds of documents in the batch * length tokens, beginning with 0.
        max_length_q: The length of the longest document.
        sliding_window: The number of tokens that a token attends to, itself included.
        **kwargs: Arguments for other kernels.

    Returns:
        (batch, length, heads, head_dim), and None instead of the attention weights.

    Raises:
        ModelError: The model needs a feature that this kernel does not have.
    """
    _refuse(attention_mask is not None and cu_seq_lens_q is not None, kwargs)
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            *(module, query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    batch, _, length, _ = query.shape
    if max_length_q is not None and _has_varlen(query, value) and not dropout:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        joined = _varlen(q, k, v, cu_seq_lens_q, max_length_q, scaling, sliding_window)
        return joined.view(batch, length, query.shape[1], -1), None
    # (heads, batch * length, head_dim): a document never continues in the next row of the batch.
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (query, key, value))
    joined = _one_by_one(q, k, v, cu_seq_lens_q.tolist(), dropout, scaling, sliding_window)
    # (heads, batch * length, head_dim) -> (batch, length, heads, head_dim)
    output = joined.view(len(joined), batch, length, -1).permute(1, 2, 0, 3)
    return output.contiguous(), None


def _refuse(mask_and_documents: bool, options: Mapping[str, Any]) -> None:
    """Raise if the model needs a feature that this kernel does not have."""
    if mask_and_documents:
        raise ModelError(
            f"attn_implementation={NAME} cannot apply the model's own mask to documents\n"
            "    fix: model.attn_implementation=sdpa"
        )
    for name in ("softcap", "s_aux"):
        if options.get(name) is not None:
            raise ModelError(
                f"attn_implementation={NAME} has no {name}, which this model needs\n"
                "    fix: model.attn_implementation=eager (or flex_attention)"
            )


def _one_by_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: list[int],
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Call PyTorch's sdpa for each document; tensors are (heads, tokens, head_dim)."""
    parts = []
    for begin, end in itertools.pairwise(bounds):
        window = None
        if sliding_window is not None and end - begin > sliding_window:
            place = torch.arange(end - begin, device=query.device)
            distance = place[:, None] - place[None, :]
            window = (distance >= 0) & (distance < sliding_window)
        q, k, v = (x[None, :, begin:end] for x in (query, key, value))
        parts.append(
            F.scaled_dot_product_attention(
                *(q, k, v),
                attn_mask=window,
                dropout_p=dropout,
                is_causal=window is None,
                scale=scaling,
                enable_gqa=query.shape[0] != key.shape[0],
            )[0]
        )
    return torch.cat(parts, dim=1)


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    sliding_window: int | None,
) -> torch.Tensor:
    """Call PyTorch's ``varlen_attn``; tensors are (tokens, heads, head_dim)."""
    from torch.nn.attention import varlen

    takes = _parameters(varlen.varlen_attn)
    options: dict[str, Any] = {}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:  # PyTorch 2.11; autograd sums the gradients of the copies
            shared = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    if "num_splits" in takes:
        # If the keys were split, one document's length would change the rounding of the others.
        # PyTorch 2.11 does not have the argument; its kernel splits only paged keys, and shared
        # heads if every document is one token (flash_api.cpp, mha_varlen_fwd): neither occurs here.
        options["num_splits"] = 1
    joined = varlen.varlen_attn(
        *(query, key, value, bounds, bounds, longest, longest),
        scale=scaling,
        # Tokens that a token attends to on its left, without itself, and on its right.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **options,
    )
    assert isinstance(joined, torch.Tensor)
    return joined


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    """List a function's parameters: ``varlen_attn`` has more of them since PyTorch 2.11."""
    return frozenset(inspect.signature(function).parameters)


def _has_varlen(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Return whether ``varlen_attn`` supports the tensors: 16 bits, on Ampere or a later GPU."""
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def is_flash(name: str | None) -> bool:
    """Return whether a kernel finds the documents of a row by their positions."""
    return name in FLASH or HUB in (name or "")


def kernel_of(config: Any) -> str | None:
    """Return the name of the attention kernel that a model was loaded with."""
    name: str | None = getattr(config, "_attn_implementation", None)
    return name


_stock_preprocess = masking_utils._preprocess_mask_arguments


@functools.wraps(_stock_preprocess)
def _preprocess(
    config: Any, inputs_embeds: Any, attention_mask: Any, *args: Any, **kwargs: Any
) -> Any:
    """Skip making a mask for documents, which have no attention mask; generation has one.

    Otherwise Transformers would search the positions for documents in every forward pass, which
    waits for the GPU.
    """
    if kernel_of(config) == NAME and attention_mask is None:
        return True, None, None, None, None, None, None
    return _stock_preprocess(config, inputs_embeds, attention_mask, *args, **kwargs)


def register() -> None:
    """Register ``attn_implementation="packed"`` with Transformers."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    masking_utils._preprocess_mask_arguments = _preprocess
