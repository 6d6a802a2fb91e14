"""The base model's weights in 8 or 4 bits, as bitsandbytes stores them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sft.config.settings import Config, QuantizationConfig
from sft.errors import ModelError, Problem
from sft.model.tokens import is_tied

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from sft.model.tokenizer import NewTokens


def quantization_config(quantization: QuantizationConfig, compute_dtype: torch.dtype) -> Any:
    """Make Transformers' BitsAndBytesConfig; None if nothing is quantised.

    Raises:
        ModelError: Transformers refuses the settings.
    """
    from transformers import BitsAndBytesConfig

    if not (quantization.load_in_4bit or quantization.load_in_8bit):
        return None
    try:
        return BitsAndBytesConfig(
            load_in_8bit=quantization.load_in_8bit,
            load_in_4bit=quantization.load_in_4bit,
            bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
            **{"bnb_4bit_compute_dtype": compute_dtype, **copy.deepcopy(quantization.extra)},
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise ModelError(
            f"quantization.extra={quantization.extra}: Transformers refuses these settings: "
            f"{error}\n"
            "    fix: correct quantization.extra, or the sft.json of the adapter that has it"
        ) from error


def head_problems(config: Config, model: PreTrainedModel, new: NewTokens) -> Iterator[Problem]:
    """Yield the list of modules without quantisation that leaves out the head.

    Our loss and TRL's compute with the head's weight itself. A weight that the embedding shares, or
    to which rows are added, cannot be stored in fewer bits.

    Args:
        config: The run's config, with the quantisation of the base's own files.
        model: The architecture.
        new: The new tokens.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    key, own, head = "llm_int8_skip_modules", config.quantization, model.get_output_embeddings()
    skipped = own.extra.get(key)
    if skipped is None or not (own.load_in_4bit or own.load_in_8bit):
        return
    path = next((path for path, module in model.named_modules() if module is head), None)
    kept = [*skipped, *(model._keep_in_fp32_modules or ())]
    if path is None or not should_convert_module(path, kept):
        return
    apart = "rows of model.new_tokens are added to it" if new else "the embedding shares it"
    if new or is_tied(model):
        rule, plain = f"leaves {path} quantised, although {apart}", ""
    elif config.model.lm_head == "plain":
        return
    else:
        rule = f"leaves {path} quantised, whose loss only model.lm_head=plain computes"
        plain = "model.lm_head=plain, or "
    written = f"quantization.extra.{key}=[{','.join(skipped)}]"
    fix = f"quantization.extra.{key}=[{','.join([*skipped, path])}]"
    if stored_method(model.config) is not None:  # so its files say it
        fix = f"{plain}model.name_or_path=THE_MODEL_THAT_WAS_QUANTISED"
    yield Problem(written, rule, fix)


def stored_method(config: PreTrainedConfig) -> str | None:
    """Return how a model's own files are quantised, such as mxfp4 or fp8; None if they are not."""
    values = stored_values(config)
    if values is None:
        return None
    # Files that Transformers saved before it named the method are of bitsandbytes.
    named = any(values.get(f"load_in_{bits}bit") for bits in (4, 8))
    method = values.get("quant_method", "bitsandbytes" if named else "unknown method")
    return str(getattr(method, "value", method))


def unknown_method(config: PreTrainedConfig) -> str | None:
    """Return how a model's own files are quantised if Transformers does not know it; else None.

    It would log a warning, and load the quantised numbers as if they were the weights.
    """
    from transformers.quantizers import AutoHfQuantizer

    values = stored_values(config)
    try:
        known = values is None or AutoHfQuantizer.supports_quant_method(values)
    except ValueError:  # no method is named
        known = False
    return None if known else stored_method(config)


def stored_values(config: PreTrainedConfig) -> dict[str, Any] | None:
    """Return ``quantization_config`` of a model's config; None if it has none."""
    parts = (config, config.get_text_config(decoder=True))
    found = next(filter(None, (getattr(it, "quantization_config", None) for it in parts)), None)
    return dict(found if isinstance(found, dict) else vars(found)) if found else None


def unquantized(model: PreTrainedModel) -> str | None:
    """Return a layer that bitsandbytes computes although its weight was not stored quantised.

    Its first forward pass would fail, because the weight lacks what dequantising needs.
    """
    if stored_method(model.config) != "bitsandbytes":
        return None
    import bitsandbytes
    from torch import nn

    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    for name, module in model.named_modules():
        if isinstance(module, kinds) and type(module.weight) is nn.Parameter:
            return str(name)
    return None


def keep_training_layout(model: PreTrainedModel) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights for CPU inference in an eval pass.

    On CPUs with AVX512-BF16 it repacks them, and gradients after the eval pass are wrong.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def flatten_inputs(model: PreTrainedModel) -> None:
    """Let bitsandbytes compute 8-bit layers whose inputs have more than three dimensions.

    Its kernel for CPUs fails on them; DeepSeek-V3's compressed keys and values have four.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.forward = functools.partial(_flat, module.forward)


def _flat(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return forward(x) if x.ndim <= 3 else forward(x.flatten(0, -2)).view(*x.shape[:-1], -1)
