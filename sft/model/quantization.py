"""The base model's weights in 8 or 4 bits, as bitsandbytes stores them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from sft.config.settings import QuantizationConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def quantization_config(quantization: QuantizationConfig, compute_dtype: torch.dtype) -> Any:
    """Make Transformers' BitsAndBytesConfig; None if nothing is quantised."""
    from transformers import BitsAndBytesConfig

    if not (quantization.load_in_4bit or quantization.load_in_8bit):
        return None
    return BitsAndBytesConfig(
        load_in_8bit=quantization.load_in_8bit,
        load_in_4bit=quantization.load_in_4bit,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        **{"bnb_4bit_compute_dtype": compute_dtype, **copy.deepcopy(quantization.extra)},
    )


def stored_method(config: PreTrainedConfig) -> str | None:
    """Return how a model's own files are quantised, such as mxfp4 or fp8; None if they are not."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    values = settings if isinstance(settings, dict) else vars(settings)
    method = values.get("quant_method", "unknown method")
    return str(getattr(method, "value", method))


def keep_training_layout(model: PreTrainedModel) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights for CPU inference in an eval pass.

    On CPUs with AVX512-BF16 it repacks them, and gradients after the eval pass are wrong.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
