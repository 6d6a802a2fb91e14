"""Compute single trained rows of an embedding and of the head beside the frozen rows.

PEFT copies the whole weight in each forward pass, and adds the gradient of a whole weight to its
own. Its layer also reads the frozen weight without calling the layer that owns it, so that ZeRO-3
does not gather it. Here the frozen layer is called, and the trained rows replace its results.
"""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import TrainableTokensWrapper

if TYPE_CHECKING:
    from torch import nn


def values_of_base() -> None:
    """Let PEFT read the first values of trained rows under ZeRO-3 on any device.

    Its own function allocates them on a CUDA device.
    """

    def collect(layer: Any, weight: torch.Tensor, rows: list[int], embed_dim: int) -> torch.Tensor:
        with gather_params_ctx([weight], modifier_rank=None):
            return weight[rows].clone()

    TrainableTokensLayer._collect_token_weights = collect


def install(model: nn.Module, partitioned: bool) -> None:
    """Compute the trained rows of all embeddings and heads of a PEFT model.

    Args:
        model: The model.
        partitioned: Whether ZeRO-3 will split the trained rows among the ranks.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            # TRL's head reads it; PEFT's wrapper has the attribute ``weight`` only.
            module.__dict__["bias"] = getattr(module.original_module, "bias", None)
        if not isinstance(module, TrainableTokensLayer):
            continue
        module.forward = types.MethodType(_forward, module)
        if partitioned:
            import deepspeed

            # They belong to a ParameterDict, which is not called either.
            for values in module.trainable_tokens_delta.values():
                deepspeed.zero.register_external_parameter(module, values)


def trained_rows(model: nn.Module) -> list[nn.Parameter]:
    """List the values of single trained rows, one for each weight that has such rows."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, TrainableTokensLayer):
            found |= {id(values): values for values in module.trainable_tokens_delta.values()}
    return list(found.values())


def split(head: Any) -> tuple[Any, torch.Tensor | None, torch.Tensor | None]:
    """Split a head into its frozen layer, the indices of its trained rows, and their values.

    Returns:
        The layer; shapes (rows,) and (rows, width), or None if no single rows are trained.
    """
    if not isinstance(head, TrainableTokensWrapper):
        return head, None, None
    layer = head.token_adapter
    if not _active(layer):
        return layer.base_layer, None, None
    return layer.base_layer, *_rows(layer)


def _active(layer: TrainableTokensLayer) -> bool:
    return len(layer.active_adapters) == 1 and not (layer.disable_adapters or layer.merged)


def _rows(layer: TrainableTokensLayer) -> tuple[torch.Tensor, torch.Tensor]:
    name = layer.active_adapters[0]
    values = layer.trainable_tokens_delta[name]
    return torch.tensor(layer.token_indices[name], device=values.device), values


def _forward(layer: TrainableTokensLayer, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    if not _active(layer) or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    result: torch.Tensor = layer.base_layer(x)
    index, values = _rows(layer)
    values = values.to(result.dtype)
    if not isinstance(layer.base_layer, torch.nn.Embedding):
        bias = layer.base_layer.bias
        own = F.linear(x, values, None if bias is None else bias[index])
        return result.index_copy(-1, index, own.to(result.dtype))
    order = index.argsort()
    place = torch.searchsorted(index[order], x).clamp(max=len(index) - 1)
    place = order[place]
    own = F.embedding(place, values)
    scale = layer._get_embed_scale()
    if scale is not None:
        own = own * scale.to(own.dtype)
    return torch.where((index[place] == x)[..., None], own, result)
