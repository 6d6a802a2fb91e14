"""Parameters that ZeRO-3 has split among the ranks. Only this file reads their ds_* attributes.

DeepSpeed replaces the data of such a parameter by an empty tensor and adds ``ds_id``, ``ds_shape``
(the full shape) and ``ds_tensor`` (this rank's share, flat and padded).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def is_sharded(parameter: torch.Tensor) -> bool:
    """Return whether ZeRO-3 has split this parameter among the ranks."""
    return hasattr(parameter, "ds_id")


def any_sharded(model: torch.nn.Module) -> bool:
    """Return whether ZeRO-3 has split any parameter of a model among the ranks."""
    return any(map(is_sharded, model.parameters()))


def shape_of(parameter: Any) -> torch.Size:
    """Return the shape of the whole parameter."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def share_of(parameter: Any) -> torch.Tensor:
    """Return the data of a parameter on this rank: all of it, or its flat and padded share."""
    share: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return share


def whole_copy(parameter: torch.Tensor) -> torch.Tensor | None:
    """Copy a whole parameter to the CPU on rank 0; None on other ranks. All ranks must call it."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True) if dist.get_rank() == 0 else None


def fill(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Set a whole parameter, sharded or not, to a value that all ranks have."""
    if not is_sharded(parameter):
        parameter.data.copy_(value)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if dist.get_rank() == 0:
            parameter.data.copy_(value)


def cut_share(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Cut this rank's flat and padded share out of a value of the whole parameter's shape."""
    share = share_of(parameter)
    size = share.numel()
    padding = size * dist.get_world_size() - value.numel()
    flat = torch.nn.functional.pad(value.flatten(), (0, padding))
    return flat.narrow(0, size * dist.get_rank(), size).to(share.device)
