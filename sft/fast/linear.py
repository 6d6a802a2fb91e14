"""Frozen linear layers on a CPU: pack their weights once into oneDNN's layout.

PyTorch computes float32 products with MKL, which on an AMD processor with AVX-512 reached less than
half the speed of oneDNN (100 against 240 GFLOP/s per core); with AVX2 only, MKL was faster by a
tenth (benchmarks/RESULTS.md).
"""

from __future__ import annotations

import functools
import types
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import ParamWrapper

from sft.config.rules import AS_SET, Choice
from sft.errors import ConfigError, Problem
from sft.hardware import available

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.config.settings import Config

ROWS = 1024  # number of tokens for which oneDNN chooses its layout; other numbers work too
SHARE = 0.5  # the share of free memory that packed weights may take


class Product(torch.autograd.Function):
    """Compute x W^T + b for packed W; the gradient of x is a product with packed W^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        transposed: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute the product; x is (..., in), the result is (..., out)."""
        ctx.transposed = transposed
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Compute the gradient of x."""
        return product(gradient, ctx.transposed, None), None, None, None


def product(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply by a packed weight: x W^T + b, for x of (..., in)."""
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x.contiguous(), packed, bias, "none", [], ""
    )
    return result


def choose(config: Config, architecture: PreTrainedModel, precision: str, stage: int) -> Choice:
    """Choose ``model.frozen_linear``: how frozen linear layers are computed.

    Args:
        config: The run's config.
        architecture: The model, with or without weights.
        precision: fp32, bf16 or fp16.
        stage: The ZeRO stage.

    Raises:
        ConfigError: ``packed`` is set, and the layers cannot be packed.
    """
    name = "model.frozen_linear"
    asked = config.model.frozen_linear
    quantization = config.quantization
    reasons = {
        "there is a GPU": torch.cuda.is_available(),
        "there is no adapter": not config.lora.enabled,
        "the weights are quantised": quantization.load_in_4bit or quantization.load_in_8bit,
        f"precision is {precision}": precision != "fp32",
        "under ZeRO stage 3 no rank holds a whole layer": stage == 3,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if asked == "packed" and reason:
        rule = f"is for frozen float32 layers on a CPU: {reason}"
        raise ConfigError([Problem(f"{name}=packed", rule, f"{name}=auto")])
    if asked != "auto":
        return Choice(name, asked, AS_SET)
    if reason or not amd_with_avx512():
        return Choice(name, "plain", reason or "MKL is as fast on this processor")
    if extra_bytes(architecture) > SHARE * available():
        return Choice(name, "plain", "packed weights would take over half of the free memory")
    return Choice(name, "packed", "oneDNN is faster on this processor")


def extra_bytes(architecture: PreTrainedModel) -> int:
    """Return the memory of packed weights in bytes, at most: two copies of every weight."""
    return 2 * 4 * int(architecture.num_parameters())


def frozen(model: Any) -> list[torch.nn.Linear]:
    """List the base's frozen linear layers, without the LM head, whose weight the loss uses."""
    head = model.get_output_embeddings()
    left = {head, getattr(head, "original_module", None)}  # PEFT's modules_to_save wraps it
    # PEFT adds a ParamWrapper's change to the layer's weight, which a packed copy would not show.
    left |= {item.get_base_layer() for item in model.modules() if isinstance(item, ParamWrapper)}
    return [
        layer
        for name, layer in model.named_modules()
        if type(layer) is torch.nn.Linear
        and layer not in left
        # Loading a checkpoint replaces the weights of LoRA layers: a packed copy would be stale.
        and ".lora_" not in name
        and layer.weight.dtype == torch.float32
        and not layer.weight.requires_grad
        and (layer.bias is None or not layer.bias.requires_grad)
    ]


def install(model: Any) -> int:
    """Pack the frozen layers, which takes two more copies of them; return their number."""
    layers = frozen(model)
    for layer in layers:
        packed = pack(layer.weight.detach())
        layer.forward = types.MethodType(functools.partial(_forward, packed), layer)  # type: ignore[method-assign]
    return len(layers)


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy a weight, and its transpose for the backward pass, into oneDNN's layout."""
    reorder: Any = torch.ops.mkldnn._reorder_linear_weight
    return reorder(weight, ROWS), reorder(weight.t().contiguous(), ROWS)


def _forward(
    packed: tuple[torch.Tensor, torch.Tensor], layer: torch.nn.Linear, x: torch.Tensor
) -> torch.Tensor:
    if x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, layer.weight, layer.bias)
    result: torch.Tensor = Product.apply(x, *packed, layer.bias)  # type: ignore[no-untyped-call]
    return result


def amd_with_avx512() -> bool:
    """Return whether this is an AMD processor with AVX-512, which MKL does not use there."""
    can = torch.cpu.get_capabilities()
    return "AMD" in can.get("cpu_name", "") and bool(can.get("avx512_f"))
