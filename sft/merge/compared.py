"""Load the two models that the verification compares: base + adapter, and the merged model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft.config.settings import ModelConfig, QuantizationConfig
from sft.merge.attach import name_of, names_kept, resize_embedding
from sft.merge.base_files import Base
from sft.merge.placeholders import with_placeholders
from sft.merge.stored import shards
from sft.merge.stream import Weights, streamed
from sft.model.base import load_architecture, load_frozen
from sft.model.quantization import keep_training_layout

if TYPE_CHECKING:
    from sft.merge.prepare import PreparedMerge


@contextlib.contextmanager
def base_and_adapter(prepared: PreparedMerge, resident: bool) -> Iterator[Any]:
    """Yield base + adapter, loaded as a whole (resident) or read layer by layer."""
    if resident:
        stored = prepared.sources.quantization if prepared.dequantized else QuantizationConfig()
        yield reference(prepared, stored, weights_only=True)
    else:
        model = _weighed(prepared.model, prepared)
        with streamed(model, Weights(prepared.base, prepared.transforms)):
            yield model


@contextlib.contextmanager
def written(folder: Path, resident: bool, trust: bool) -> Iterator[Any]:
    """Yield the merged model, loaded as a whole (resident) or read layer by layer."""
    here = ModelConfig(name_or_path=str(folder.resolve()), trust_remote_code=trust)
    if resident:
        yield load_frozen(here, QuantizationConfig(), torch.float32)
    else:
        architecture = load_architecture(here, buffers=True)
        base = Base.read(shards(here), architecture)
        with streamed(with_placeholders(architecture).eval(), Weights(base, {})) as model:
            yield model


def reference(
    prepared: PreparedMerge, quantization: QuantizationConfig, weights_only: bool = False
) -> Any:
    """Load base and adapters as a whole, with Transformers and PEFT only.

    Args:
        prepared: The merge.
        quantization: How the base is stored.
        weights_only: Dequantise the weights, to avoid what the forward pass of quantised layers
            adds: an 8-bit layer rounds its inputs; a 4-bit layer without gradients does not round
            its weights to the precision of training.
    """
    from peft import PeftModel

    sources = prepared.sources
    quantized = quantization.load_in_4bit or quantization.load_in_8bit
    # Quantisation and PiSSA's initialisation start from the weights in the precision of training.
    derived = quantized or bool(prepared.transforms)
    base = load_frozen(sources.base, quantization, sources.dtype if derived else torch.float32)
    if quantized and weights_only:
        base = base.dequantize(torch.float32).float()
    elif quantized:
        _compute_in_float32(base)
    if weights_only and derived and sources.dtype != sources.stored_dtype:
        _restore_others(base, prepared)
    if prepared.resized:
        resize_embedding(base, sources.shapes, sources.configs)
    # The adapters were read before: see attach.
    with warnings.catch_warnings(action="ignore"), names_kept():
        model = PeftModel.from_pretrained(base, str(sources.adapters[0]), adapter_name=name_of(0))
        for index, folder in enumerate(sources.adapters[1:], 1):
            model.load_adapter(str(folder), adapter_name=name_of(index))
    return _weighed(model if quantized else model.float(), prepared)


def _weighed(model: Any, prepared: PreparedMerge) -> Any:
    """Activate all adapters, and multiply the scaling of each by its factor."""
    from peft.tuners.lora.layer import LoraLayer

    names = [name_of(index) for index in range(len(prepared.sources.adapters))]
    if len(names) > 1:
        model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in zip(names, prepared.sources.weights, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
    return model.eval()


@torch.no_grad()
def _restore_others(model: Any, prepared: PreparedMerge) -> None:
    """Set the weights outside of ``prepared.transforms`` to the values in the base's files.

    The merge reads these from the files, whose precision may be higher than training's.
    """
    stored = load_frozen(prepared.sources.base, QuantizationConfig(), torch.float32)
    values = dict(stored.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in prepared.transforms:
            parameter.data = values[name].data


def _compute_in_float32(model: Any) -> None:
    """Compute everything in float32, and leave the quantised weights unchanged."""
    import bitsandbytes

    stored = (bitsandbytes.nn.Params4bit, bitsandbytes.nn.Int8Params)
    for parameter in model.parameters():
        if not isinstance(parameter, stored):
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    keep_training_layout(model)
