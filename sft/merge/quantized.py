"""Quantise and dequantise a base's weights, which gives the numbers that training computed with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sft.config.settings import QuantizationConfig
from sft.merge.layout import Transform
from sft.model.quantization import quantization_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def dequantizers(
    architecture: PreTrainedModel, quantization: QuantizationConfig, dtype: torch.dtype
) -> dict[str, Transform]:
    """Make a function for each weight that training stored in 4 or 8 bits.

    Args:
        architecture: On the meta device; its linear layers are replaced as loading does it.
        quantization: The quantisation of the training run.
        dtype: The precision in which training loaded the weights.

    Returns:
        By the parameter's name, a function that quantises and dequantises the weight; empty if
        nothing was quantised.
    """
    settings = quantization_config(quantization, dtype)
    if settings is None:
        return {}
    import bitsandbytes
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(settings)
    quantizer.preprocess_model(model=architecture, device_map={"": "cpu"}, dtype=dtype)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    return {
        f"{name}.weight": _through(module, dtype)
        for name, module in architecture.named_modules()
        if isinstance(module, kinds)
    }


def _through(module: Any, dtype: torch.dtype) -> Transform:
    import bitsandbytes
    from transformers.pytorch_utils import Conv1D

    empty = module.weight
    options = dict(empty.__dict__)
    transposed = issubclass(module.source_cls, Conv1D)

    def through(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.to(dtype)
        weight = weight.T.contiguous() if transposed else weight
        stored = type(empty)(weight, requires_grad=False, **options).to("cpu")
        if isinstance(stored, bitsandbytes.nn.Params4bit):
            result = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state)
        else:
            result = bitsandbytes.functional.int8_vectorwise_dequant(stored.data, stored.SCB)
        dequantized: torch.Tensor = result.T if transposed else result
        return dequantized

    return through
