"""An architecture whose weights take no memory, and the names of its parameters under PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOTHING = torch.zeros(())


def with_placeholders(architecture: PreTrainedModel) -> PreTrainedModel:
    """Replace meta weights by CPU tensors that expand one shared scalar: real shapes, no memory."""
    architecture.tie_weights()
    # Keeps the original parameters alive: the keys are their id(), which Python would reuse.
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in architecture.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(_NOTHING.expand(parameter.shape), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), (empty, parameter))[0]
    return architecture


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Return whether a weight is still a placeholder, because nothing was loaded for it."""
    return tensor.data_ptr() == _NOTHING.data_ptr() or (
        tensor.untyped_storage().nbytes() < tensor.nbytes
    )


def base_name(path: str) -> str:
    """Convert the path of a module or parameter of a PEFT model to the base's."""
    wrappers = {"base_layer", "original_module", "token_adapter"}
    return ".".join(part for part in path.split(".") if part not in wrappers)
