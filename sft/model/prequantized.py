"""Bases whose files are quantised already: taken over, dequantised, or refused by name."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sft.config import lora_checks, packages
from sft.config.rules import Choice, written
from sft.config.settings import Config, QuantizationConfig
from sft.errors import ConfigError, Problem
from sft.model.quantization import stored_method, stored_values

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

ORIGINAL = "model.name_or_path=THE_MODEL_THAT_WAS_QUANTISED"
# Methods whose files Transformers dequantises while it loads them, and the package it needs.
DEQUANTIZED = {
    "mxfp4": None,
    "fp8": None,
    "mxfp8": None,
    "compressed-tensors": "compressed_tensors",
}
BITS = ("load_in_8bit", "load_in_4bit")
OF_4_BITS = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
COMPUTED_IN = "bnb_4bit_compute_dtype"  # may be set for files, too


def as_stored(config: Config, base: PreTrainedConfig) -> Config:
    """Return the run's config with the quantisation of the base's own files.

    Args:
        config: The run's config.
        base: The base model's Transformers config.

    Raises:
        ConfigError: They cannot be trained, or not with the settings that are set.
    """
    method = stored_method(base)
    if method is None or not config.model.pretrained:
        return config
    name, asked = str(config.model.name_or_path), config.quantization
    already = f"the files of {name} are quantised already ({method})"
    if method == "bitsandbytes":
        taken = dataclasses.replace(config, quantization=_taken(asked, stored_values(base) or {}))
        found = [*lora_checks.lora(taken), *lora_checks.quantization(taken)]
        if found:
            raise ConfigError(
                [Problem(one.setting, f"{one.rule}; {already}", ORIGINAL) for one in found]
            )
        return taken
    if method not in DEQUANTIZED:
        rule = f"its files are quantised by {method}, and sft cannot train on them"
        fix = f"{ORIGINAL}, and quantization=nf4 to store it in 4 bits"
        raise ConfigError([Problem(f"model.name_or_path={name}", rule, fix)])
    for bits in BITS:
        if getattr(asked, bits):
            fix = f"quantization=none, which dequantises them, or {ORIGINAL}"
            raise ConfigError([Problem(f"quantization.{bits}=true", already, fix)])
    package = DEQUANTIZED[method]
    if package is not None and not packages.installed(package):
        rule = f"{already}, and the package {package} that reads them is not installed"
        fix = f"pip install {package.replace('_', '-')}"
        raise ConfigError([Problem(f"model.name_or_path={name}", rule, fix)])
    return config


def _taken(asked: QuantizationConfig, values: dict[str, Any]) -> QuantizationConfig:
    """Return the settings with which bitsandbytes quantised the files.

    Raises:
        ConfigError: Other settings are asked for.
    """
    files: dict[str, Any] = {bits: bool(values.get(bits, values.get(f"_{bits}"))) for bits in BITS}
    extra = {COMPUTED_IN: asked.extra[COMPUTED_IN]} if COMPUTED_IN in asked.extra else {}
    if skipped := values.get("llm_int8_skip_modules"):
        extra["llm_int8_skip_modules"] = list(skipped)
    if values.get("llm_int8_threshold", 6.0) != 6.0:
        extra["llm_int8_threshold"] = values["llm_int8_threshold"]
    if files["load_in_4bit"]:
        # The defaults of Transformers for files that do not say it.
        files["bnb_4bit_quant_type"] = values.get("bnb_4bit_quant_type", "fp4")
        files["bnb_4bit_use_double_quant"] = bool(values.get("bnb_4bit_use_double_quant", False))
    found = []
    asks = [bits for bits in BITS if getattr(asked, bits)]
    for key, value in files.items() if asks else ():
        own = getattr(asked, key)
        if own == value or (key in BITS and key not in asks):
            continue
        own_values = ", ".join(written(name, item) for name, item in files.items() if item)
        rule = f"the files are quantised already, with {own_values}"
        fix = "quantization=none, which takes the quantisation of the files"
        found.append(Problem(written(f"quantization.{key}", own), rule, fix))
    for key in asked.extra.keys() - extra.keys():
        rule = "the files are quantised already, and cannot be quantised in another way"
        found.append(Problem(f"quantization.extra.{key}={asked.extra[key]}", rule, "leave it out"))
    if found:
        raise ConfigError(found)
    return QuantizationConfig(**files, extra=extra)


def choice(config: Config, architecture: PreTrainedModel, itemsize: int) -> Choice | None:
    """Describe how a base is loaded whose files are quantised; None for another.

    Args:
        config: What ``as_stored`` returned.
        architecture: The base model, with or without weights.
        itemsize: Bytes of a number in the run's precision.
    """
    method = stored_method(architecture.config)
    if method is None or not config.model.pretrained:
        return None
    if method == "bitsandbytes":
        own = config.quantization
        value = own.bnb_4bit_quant_type if own.load_in_4bit else "int8"
        return Choice("quantization", value, "the model's files are quantised so")
    size = architecture.num_parameters() * itemsize / 2**30
    reason = f"the model's {method} files are dequantised, which takes {size:.1f} GiB for weights"
    return Choice("quantization", "none", reason)


def prepare(config: PreTrainedConfig, dtype: torch.dtype, extra: dict[str, Any]) -> bool:
    """Change the quantisation in a model's config into that with which its files are loaded.

    Args:
        config: The model's config, which is changed.
        dtype: The precision of the arithmetic; without it, bitsandbytes would compute in that of
            the machine that quantised the files.
        extra: ``quantization.extra``.

    Returns:
        Whether the files are quantised.
    """
    values = stored_values(config)
    if values is None:
        return False
    method = stored_method(config)
    if method == "bitsandbytes":
        values[COMPUTED_IN] = extra.get(COMPUTED_IN, str(dtype).removeprefix("torch."))
    elif method in DEQUANTIZED:
        values["dequantize"] = True
    holder = config
    if getattr(config, "quantization_config", None) is None:
        holder = config.get_text_config(decoder=True)
    holder.quantization_config = values
    return True
