"""Plan every tensor of the merged model, before anything is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from sft.config.settings import ModelConfig
from sft.inference.card import TOKENIZER
from sft.merge.adapter_files import restarts
from sft.merge.adapters import changes
from sft.merge.attach import attach, resize_embedding
from sft.merge.base_files import Base
from sft.merge.change import Change
from sft.merge.layout import Layout, Transform, plan
from sft.merge.placeholders import base_name, with_placeholders
from sft.merge.quantized import dequantizers
from sft.merge.sources import Sources
from sft.merge.stored import shards

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class PreparedMerge:
    """A merge that can be written.

    Attributes:
        sources: The adapters and the base.
        base: The base's files.
        model: The base's architecture without weights, with the adapters on it.
        transforms: The functions that are applied to whole matrices, by parameter.
        layout: The files to write.
        dequantized: The base is quantised as in training and dequantised before the merge.
        resized: The rows of the adapter's embedding, if the base has a different number.
        tokenizer: The adapter's; the base's if the adapter has none.
    """

    sources: Sources
    base: Base
    model: PeftModel
    transforms: dict[str, Transform]
    layout: Layout
    dequantized: bool
    resized: int | None
    tokenizer: PreTrainedTokenizerBase

    @property
    def must_be_resident(self) -> bool:
        """Return whether the base must be loaded as a whole for the comparison.

        Layers cannot be read one at a time if loading rearranges rows or the embedding is resized;
        for PiSSA and OLoRA each reading would repeat the initialisation.
        """
        restarted = any(map(restarts, self.sources.configs))
        return bool(self.base.rearranged) or restarted or self.resized is not None


def prepare(
    sources: Sources, dequantized: bool, dtype: torch.dtype | None, shard_size: int | None
) -> PreparedMerge:
    """Plan every tensor of the merged model.

    Args:
        sources: The adapters and the base.
        dequantized: Quantise the base as in training and dequantise it before the merge.
        dtype: The precision of the result; None: the base's own.
        shard_size: The largest size of a file in bytes; None: the same files as the base.

    Raises:
        MergeError: The adapter does not fit the base, or cannot be written into it.
    """
    from sft.model.base import load_architecture
    from sft.model.tokenizer import load_tokenizer

    architecture = load_architecture(sources.base, buffers=True)
    base = Base.read(shards(sources.base), architecture)
    names = _stored_names(architecture)
    resized = resize_embedding(architecture, sources.shapes, sources.configs)
    model = attach(with_placeholders(architecture), sources.adapters, sources.configs)
    found = changes(model, sources.weights, sources.configs, base.partners)
    if resized is not None:
        _append_rows(found, base, model.get_base_model())
    transforms: dict[str, Transform] = {}
    if dequantized:
        transforms |= dequantizers(
            load_architecture(sources.base), sources.quantization, sources.dtype
        )
    for name, change in found.items():
        if change.restart is not None:
            transforms[name] = _restart(transforms.get(name), change.restart, sources.dtype)
    layout = plan(base, found, transforms, dtype, shard_size, names)
    trust = sources.base.trust_remote_code
    own = ModelConfig(name_or_path=str(sources.adapters[0]), trust_remote_code=trust)
    brings = (sources.adapters[0] / TOKENIZER).is_file()
    tokenizer = load_tokenizer(own if brings else sources.base)
    return PreparedMerge(sources, base, model, transforms, layout, dequantized, resized, tokenizer)


def _append_rows(found: dict[str, Change], base: Base, model: PreTrainedModel) -> None:
    """Replace the parameters that have more rows than the base's by these and the new rows.

    Args:
        found: The changes, which are added to.
        base: The base's files.
        model: The architecture with the new rows, whose adapter has values for them.
    """
    for name, parameter in model.named_parameters(remove_duplicate=False):
        name = base_name(name)
        before = base.shapes.get(name)
        change = found.get(name, Change())
        if before is None or parameter.shape[0] <= before[0] or change.replaced is not None:
            continue
        stored = next(filter(None, map(base.stored, base.partners(name))))
        old = stored.read(0, stored.rows).view(before)
        # As model.tokens.grow sets the head's bias; the adapter has the new rows of a weight.
        mean = old.double().mean() if old.ndim == 1 else torch.zeros(())
        new = old.new_empty(parameter.shape)
        new[: len(old)], new[len(old) :] = old, mean
        if change.tokens is not None:
            rows, values = change.tokens
            new = new.to(torch.promote_types(new.dtype, values.dtype))
            new[rows] = values.to(new.dtype)
        found[name] = Change(replaced=new)


def _restart(before: Transform | None, restart: Transform, dtype: torch.dtype) -> Transform:
    def run(weight: torch.Tensor) -> torch.Tensor:
        return restart((before(weight) if before else weight).to(dtype))

    return run


def _stored_names(architecture: PreTrainedModel) -> Callable[[str], str]:
    """Return a function that converts a parameter's name to the one in the architecture's files."""
    from transformers.core_model_loading import revert_weight_conversion

    def name_of(parameter: str) -> str:
        named: dict[str, Any] = revert_weight_conversion(
            architecture, {parameter: torch.zeros((), device="meta")}
        )
        return next(iter(named))

    return name_of
