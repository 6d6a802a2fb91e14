"""Find the base and check and plan the whole merge before anything is written."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft.config.settings import ModelConfig, QuantizationConfig
from sft.errors import MergeError
from sft.inference.card import ADAPTER_SETTINGS, Card, base_of, read_card
from sft.merge import adapters as adapters
from sft.merge.base_files import Base, shards
from sft.merge.layout import Layout, Whole, plan
from sft.merge.quantized import dequantizers

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER = "tokenizer_config.json"
# Settings of adapters that can be neither scaled nor added to other adapters.
WHOLE_ONLY = ("use_dora", "modules_to_save", "trainable_token_indices")


@dataclass
class Sources:
    """The adapters and the base of a merge.

    Attributes:
        adapters: The folders of the adapters.
        weights: The factor of each adapter.
        configs: PEFT's config of each adapter.
        shapes: The shapes of each adapter's tensors, by name.
        card: The card that sft.train wrote beside the first adapter; None: it has none.
        trained_on: The commit or hash of the base of each adapter that records it.
        base: The base model.
        quantization: How training stored the base.
        dtype: The precision in which training loaded the base.
        stored_dtype: The precision of the base's files, according to its config.
    """

    adapters: list[Path]
    weights: list[float]
    configs: list[LoraConfig]
    shapes: list[dict[str, tuple[int, ...]]]
    card: Card | None
    trained_on: list[str]
    base: ModelConfig
    quantization: QuantizationConfig
    dtype: torch.dtype
    stored_dtype: torch.dtype


def find(folders: Sequence[Path], weights: Sequence[float], asked: str | None) -> Sources:
    """Read the adapters, and find their base.

    Raises:
        MergeError: An adapter is missing, damaged, empty or of a kind that cannot be merged.
        ModelError: The adapter does not name a base, or the base cannot be reached.
    """
    from transformers import AutoConfig

    from sft.model.base import commit_of, loading, source
    from sft.model.precision import dtype_of

    for folder in folders:
        if not (folder / ADAPTER_SETTINGS).is_file():
            raise MergeError(
                f"there is no adapter in {folder}\n    fix: run=FOLDER of a finished LoRA run, or "
                "adapter=FOLDER with adapter_config.json"
            )
    cards = [read_card(folder) for folder in folders]
    bases = [base_of(folder, card, asked) for folder, card in zip(folders, cards, strict=True)]
    card = cards[0]
    bases = [_as_trained(base, card) for base in bases]
    names = {str(base.name_or_path) for base in bases}
    if len(names) > 1:
        raise MergeError(
            f"the adapters were trained on different bases: {', '.join(sorted(names))}\n"
            "    fix: base=MODEL that fits all of them"
        )
    shapes = [adapters.check_file(folder) for folder in folders]
    configs = [adapters.read_config(folder) for folder in folders]
    if len(folders) > 1 or list(weights) != [1.0]:
        _check_sum(folders, configs, cards)
    base = bases[0]
    with loading("config", base):
        config = AutoConfig.from_pretrained(**source(base))
    if commit := commit_of(base):  # so that all files are read from the same commit
        base = dataclasses.replace(base, revision=commit)
    if getattr(config, "quantization_config", None) is not None:
        raise MergeError(
            f"the files of {base.name_or_path} are already quantised\n"
            "    fix: base=THE_MODEL_THAT_WAS_QUANTISED"
        )
    stored = config.dtype or torch.float32
    precision = card.identity.get("precision") if card else None
    return Sources(
        adapters=list(folders),
        weights=list(weights),
        configs=configs,
        shapes=shapes,
        card=card,
        trained_on=[card.identity["base"] for card in cards if card and "base" in card.identity],
        base=base,
        quantization=card.quantization if card else QuantizationConfig(),
        dtype=dtype_of(precision) if precision else stored,
        stored_dtype=stored,
    )


def _as_trained(base: ModelConfig, card: Card | None) -> ModelConfig:
    """Pin the commit of training, because the branch on the hub may have changed since."""
    if card is None or base.name_or_path != card.model.name_or_path:
        return base
    commit = re.fullmatch("commit ([0-9a-f]{40})", card.identity.get("base", ""))
    return dataclasses.replace(base, revision=commit[1]) if commit else base


def _check_sum(
    folders: Sequence[Path], configs: Sequence[LoraConfig], cards: Sequence[Card | None]
) -> None:
    """Refuse factors and sums for adapters that are more than products of matrices."""
    for folder, config in zip(folders, configs, strict=True):
        wrong = [name for name in WHOLE_ONLY if getattr(config, name)]
        wrong += [f"bias={config.bias}"] if config.bias != "none" else []
        start = config.init_lora_weights
        wrong += [f"init_lora_weights={start}"] if str(start).lower() in adapters.RESTARTING else []
        if wrong:
            raise MergeError(
                f"{folder} has {wrong[0]}, which can be neither scaled by weights= nor added to "
                "other adapters\n    fix: merge it alone, without weights="
            )
    if len({repr(card.quantization) for card in cards if card}) > 1:
        raise MergeError(
            "the adapters were trained on bases that were quantised in different ways\n"
            "    fix: merge only adapters whose base was quantised in the same way"
        )


def check_base(sources: Sources) -> str:
    """Compare the base with the one that the adapter was trained on.

    Returns:
        The result, as text for the report.

    Raises:
        MergeError: It is a different one.
    """
    from sft.run.resume import base_identity

    if not sources.trained_on:
        return "not compared: the adapter does not record the base it was trained on"
    here = base_identity(sources.base)
    for trained in sources.trained_on:
        if here.startswith("commit ") != trained.startswith("commit "):
            return f"not compared: {trained} in training, {here} here"
        if here == trained:
            continue
        raise MergeError(
            f"{sources.base.name_or_path} is not the base of training: {trained} in training, "
            f"{here} here\n    fix: base=THE_ONE_IT_WAS_TRAINED_ON, or check_base=false if the "
            "weights are the same"
        )
    return "the same as in training"


@dataclass
class Prepared:
    """A merge that can be written.

    Attributes:
        sources: The adapters and the base.
        base: The base's files.
        model: The base's architecture without weights, with the adapters on it.
        wholes: The functions that are applied to whole matrices, by parameter.
        layout: The files to write.
        dequantized: The base is quantised as in training and dequantised before the merge.
        resized: The rows of the adapter's embedding, if the base has a different number.
        tokenizer: The adapter's; the base's if the adapter has none.
    """

    sources: Sources
    base: Base
    model: PeftModel
    wholes: dict[str, Whole]
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
        restarts = any(
            str(config.init_lora_weights).lower() in adapters.RESTARTING
            for config in self.sources.configs
        )
        return bool(self.base.rearranged) or restarts or self.resized is not None


def prepare(
    sources: Sources, dequantized: bool, dtype: torch.dtype | None, shard_size: int | None
) -> Prepared:
    """Plan every tensor of the merged model.

    Args:
        sources: The adapters and the base.
        dequantized: Quantise the base as in training and dequantise it before the merge.
        dtype: The precision of the result; None: the base's own.
        shard_size: The largest size of a file in bytes; None: the same files as the base.

    Raises:
        MergeError: The adapter does not fit the base, or cannot be written into it.
    """
    from sft.model.base import load_architecture, load_tokenizer

    architecture = load_architecture(sources.base, buffers=True)
    base = Base.read(shards(sources.base), architecture)
    names = _stored_names(architecture)
    resized = _resize(architecture, sources)
    starts = [config.init_lora_weights for config in sources.configs]
    model = adapters.attach(
        adapters.with_placeholders(architecture), sources.adapters, sources.configs
    )
    changes = adapters.changes(model, sources.weights, starts, base.partners)
    wholes: dict[str, Whole] = {}
    if dequantized:
        wholes |= dequantizers(load_architecture(sources.base), sources.quantization, sources.dtype)
    for name, change in changes.items():
        if change.restart is not None:
            wholes[name] = _restart(wholes.get(name), change.restart, sources.dtype)
    layout = plan(base, changes, wholes, dtype, shard_size, names)
    own = ModelConfig(name_or_path=str(sources.adapters[0]))
    brings = (sources.adapters[0] / TOKENIZER).is_file()
    tokenizer = load_tokenizer(own if brings else sources.base)
    return Prepared(sources, base, model, wholes, layout, dequantized, resized, tokenizer)


def _restart(before: Whole | None, restart: Whole, dtype: torch.dtype) -> Whole:
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


def _resize(architecture: PreTrainedModel, sources: Sources) -> int | None:
    """Resize the embedding to the adapter's vocabulary.

    Returns:
        The new number of rows; None if the adapter has no embedding of a different size.
    """
    embedding = architecture.get_input_embeddings()
    name = next(name for name, module in architecture.named_modules() if module is embedding)
    endings = (f"{name}.weight", f"{name}.base_layer.weight")
    for shapes in sources.shapes:
        for tensor, shape in shapes.items():
            if tensor.endswith(endings) and shape[0] != embedding.weight.shape[0]:
                architecture.resize_token_embeddings(shape[0], mean_resizing=False)
                return shape[0]
    return None
