"""Loads a model's weights as they are stored, or quantises them while they load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft import process
from sft.config.settings import ModelConfig, QuantizationConfig
from sft.errors import ModelError
from sft.model import config_checks, prequantized
from sft.model.quantization import (
    flatten_inputs,
    quantization_config,
    stored_method,
    unquantized,
)
from sft.model.source import source

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def whole(model: ModelConfig, **options: Any) -> PreTrainedModel:
    """Load weights, and raise if one is missing: Transformers would initialise it at random."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import is_deepspeed_zero3_enabled

    quantised = stored_method(options["config"]) is not None
    loaded, info = AutoModelForCausalLM.from_pretrained(
        **source(model), use_safetensors=True, output_loading_info=True, **options
    )
    lacking = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if lacking:
        raise ModelError(
            f"the weights of {model.name_or_path} lack {len(lacking)} tensors that its config "
            f"names, such as {lacking[0]}\n    fix: download or save the model again"
        )
    if "quantization_config" not in options and (name := unquantized(loaded)):
        raise ModelError(
            f"the config of {model.name_or_path} says that its files are quantised by "
            f"{stored_method(loaded.config)}, but they hold the weights of {name} unquantised\n"
            "    fix: remove quantization_config from its config.json, or download it again"
        )
    if quantised and getattr(loaded, "hf_quantizer", None) is None:
        vars(loaded).pop("_weight_conversions", None)  # saving would quantise the weights again
    # ZeRO-3 has sharded the weights already, and DeepSpeed converts them.
    if quantised and options["dtype"] != "auto" and not is_deepspeed_zero3_enabled():
        _convert(loaded, options["dtype"])
    if getattr(loaded, "is_loaded_in_8bit", False):
        flatten_inputs(loaded)
    config_checks.require_stop_tokens(model, loaded.generation_config)
    return loaded


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Convert what Transformers leaves in the precision of files that are quantised.

    These are the weights that are not quantised, and what 4-bit weights are dequantised to.
    """
    from torch import nn

    kept = model._get_dtype_plan(dtype)  # names of weights that stay in float32
    for name, parameter in model.named_parameters():
        ordinary = type(parameter) is nn.Parameter and parameter.is_floating_point()
        if ordinary and not any(part in name for part in kept):
            parameter.data = parameter.data.to(dtype)
        elif (state := getattr(parameter, "quant_state", None)) is not None:
            state.dtype = dtype


def stored_as(
    config: PreTrainedConfig, quantization: QuantizationConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that say how the weights are stored.

    Args:
        config: The model's config, which is changed.
        quantization: How training stores its weights.
        dtype: The precision of the arithmetic with quantised weights.
    """
    if prequantized.prepare(config, dtype, quantization.extra):
        held = quantization.load_in_4bit or quantization.load_in_8bit
        return {"config": config} | ({"device_map": device_map()} if held else {})
    quantized = quantization_config(quantization, dtype)
    if quantized is None:
        return {"config": config}
    return {"config": config, "quantization_config": quantized, "device_map": device_map()}


def device_map() -> dict[str, Any]:
    """Map the whole model to this rank's device; bitsandbytes cannot move it later."""
    import torch

    return {"": process.local_rank() if torch.cuda.is_available() else "cpu"}
