"""LoRA on a linear layer with fewer passes over its activations than PEFT makes.

PEFT converts the layer's input to the adapter's float32, autocast converts it back, and PEFT then
scales and adds the adapter's output: six tensors of the layer's size are written and read again.
Here the adapter's second product is added in place to the layer's output, and the input is saved
for the backward pass unconverted, once for all layers that share it.
"""

from __future__ import annotations

import logging
import re
import types
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn

    from sft.config.settings import Config

logger = logging.getLogger("sft")


class Adapted(torch.autograd.Function):
    """Compute y + s (x A^T) B^T in the precision of y, summed in float32 and rounded once."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        """Add to y in place; y is (..., out), x is (..., in), A is (r, in), B is (out, r)."""
        kinds = x.dtype, a.dtype, b.dtype
        x, a, b = (tensor.to(y.dtype) for tensor in (x, a, b))
        low = x.flatten(0, -2) @ a.t()
        # Detached, y is not a view; autograd would copy the gradient of a view. If a different
        # operation has saved y for its backward pass, PyTorch raises an error there.
        y = y.detach()
        y.view(-1, y.shape[-1]).addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(x, a, b, low)
        ctx.kinds, ctx.scaling = kinds, scaling
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of y, x, A and B."""
        x, a, b, low = ctx.saved_tensors
        kind_x, kind_a, kind_b = ctx.kinds
        flat = gradient.flatten(0, -2)
        # With beta=0 the first argument gives only the shape.
        of_low = torch.addmm(low, flat, b, beta=0, alpha=ctx.scaling)
        of_x = (of_low @ a).view_as(x).to(kind_x) if ctx.needs_input_grad[1] else None
        of_a = (of_low.t() @ x.flatten(0, -2)).to(kind_a)
        of_b = torch.addmm(b, flat.t(), low, beta=0, alpha=ctx.scaling).to(kind_b)
        return gradient, of_x, of_a, of_b, None


def left_to_peft(config: Config, stage: int) -> str:
    """Return why PEFT computes the adapters of a run; "" if this module does.

    Args:
        config: The run's config.
        stage: The ZeRO stage.
    """
    if not config.lora.enabled:
        return "there is no adapter"
    if stage == 3:
        return "ZeRO stage 3 gathers a module's weights only when the module is called"
    if config.lora.use_dora or config.lora.extra.get("lora_bias"):
        return "DoRA and lora_bias add more than a product of two matrices"
    extra = config.train.extra
    # TrainingArguments turns compilation on if one of these is set.
    named = ("torch_compile_backend", "torch_compile_mode")
    if extra.get("torch_compile") or any(extra.get(name) is not None for name in named):
        return "torch.compile fuses PEFT's operations itself"
    return ""


def leave_out_unusual(lora: LoraConfig | None, architecture: nn.Module) -> None:
    """Exclude linear layers from an adapter whose forward pass is not that of a linear layer.

    Llama-4's router is a linear layer that returns a tuple, and DeepSeek-V4's grouped layer takes
    one input for each group. PEFT adds its product to the output of either, which fails.

    Args:
        lora: PEFT's config, which is changed; None if no adapter is trained.
        architecture: The model on the meta device.
    """
    if lora is None:
        return
    found = [path for path, module in architecture.named_modules() if _is_unusual(module)]
    names = sorted({path.rpartition(".")[2] for path in found})
    if names:
        given = lora.exclude_modules or []
        if not isinstance(given, str):
            given = "|".join(rf"(.*\.)?{re.escape(name)}" for name in sorted(given))
        # Whole paths, because usual layers may have the same name; one entry for all layers.
        ours = "|".join(sorted({re.sub(r"\.\d+\.", r"[.]\\d+[.]", path) for path in found}))
        lora.exclude_modules = f"{given}|{ours}" if given else ours
        logger.info(
            "lora.target_modules: %s left out, whose output is not that of a linear layer",
            ", ".join(names),
        )


def _is_unusual(module: nn.Module) -> bool:
    """Return whether a linear layer of its own class gives more or other than a linear layer."""
    if not isinstance(module, torch.nn.Linear) or type(module).forward is torch.nn.Linear.forward:
        return False
    try:
        given = torch.empty(2, module.in_features, device="meta", dtype=module.weight.dtype)
        output = module(given)
    except (RuntimeError, IndexError, ValueError, TypeError):
        return True
    return not (isinstance(output, torch.Tensor) and output.shape == (2, module.out_features))


def install(model: nn.Module) -> int:
    """Compute plain LoRA on linear layers with ``Adapted``; return the number of layers."""
    layers = [layer for layer in model.modules() if type(layer) is Linear]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


def _forward(layer: Linear, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    name = layer.active_adapters[0]
    plain = (
        len(layer.active_adapters) == 1
        and name in layer.lora_A
        and name not in layer.lora_variant  # DoRA and others
        and layer.lora_B[name].bias is None
        and not (args or kwargs or layer.disable_adapters or layer.merged)
    )
    if not plain:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    result: torch.Tensor = Adapted.apply(  # type: ignore[no-untyped-call]
        layer.base_layer(x).contiguous(),
        layer.lora_dropout[name](x),
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
    )
    return result
