"""Everything about a merge that can be known, and refused, before anything is written."""

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
# Settings of an adapter that have no meaning as a part of a sum.
WHOLE_ONLY = ("use_dora", "modules_to_save", "trainable_token_indices")


@dataclass
class Sources:
    """What is merged onto what.

    Attributes:
        adapters: Their folders.
        weights: By which each is multiplied.
        configs: PEFT's settings of each.
        shapes: Of each adapter's tensors, by name.
        card: What training noted beside the first; None where another tool made it.
        trained_on: Which base each was trained on, by commit or hash, where that is known.
        base: The base model.
        quantization: How training stored the base.
        dtype: In which training loaded the base.
        stored_dtype: Of the base's files, as its config says.
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
    """Read the adapters, and name their base.

    Raises:
        MergeError: An adapter is missing, damaged, empty or of a kind that is not merged.
        ModelError: The base is not named, or cannot be reached.
    """
    from transformers import AutoConfig

    from sft.model.base import commit_of, dtype_of, loading, source

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
            "    fix: base=ONE that fits them all"
        )
    shapes = [adapters.check_file(folder) for folder in folders]
    configs = [adapters.read_config(folder) for folder in folders]
    if len(folders) > 1 or list(weights) != [1.0]:
        _check_sum(folders, configs, cards)
    base = bases[0]
    with loading("config", base):
        config = AutoConfig.from_pretrained(**source(base))
    if commit := commit_of(base):  # what is read from the hub later is of the same commit
        base = dataclasses.replace(base, revision=commit)
    if getattr(config, "quantization_config", None) is not None:
        raise MergeError(
            f"the files of {base.name_or_path} are quantised themselves\n"
            "    fix: base=THE_MODEL_THAT_THEY_WERE_MADE_OF"
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
    """Take the commit of training, where the hub's branch may have moved on."""
    if card is None or base.name_or_path != card.model.name_or_path:
        return base
    commit = re.fullmatch("commit ([0-9a-f]{40})", card.identity.get("base", ""))
    return dataclasses.replace(base, revision=commit[1]) if commit else base


def _check_sum(
    folders: Sequence[Path], configs: Sequence[LoraConfig], cards: Sequence[Card | None]
) -> None:
    """Refuse to weigh or add what is no product of matrices."""
    for folder, config in zip(folders, configs, strict=True):
        wrong = [name for name in WHOLE_ONLY if getattr(config, name)]
        wrong += [f"bias={config.bias}"] if config.bias != "none" else []
        start = config.init_lora_weights
        wrong += [f"init_lora_weights={start}"] if str(start).lower() in adapters.RESTARTING else []
        if wrong:
            raise MergeError(
                f"{folder} has {wrong[0]}, which cannot be weighed or added to another adapter's\n"
                "    fix: merge it alone, without weights"
            )
    if len({repr(card.quantization) for card in cards if card}) > 1:
        raise MergeError(
            "the adapters were trained on a base that was quantised in different ways\n"
            "    fix: merge those that were trained on the same"
        )


def check_base(sources: Sources) -> str:
    """Hold the base against the one that the adapter was trained on; say what was compared.

    Raises:
        MergeError: It is another.
    """
    from sft.run.resume import base_identity

    if not sources.trained_on:
        return "not known what the adapter was trained on"
    here = base_identity(sources.base)
    for trained in sources.trained_on:
        if here.startswith("commit ") != trained.startswith("commit "):
            return f"not compared: {trained} in training, {here} here"
        if here == trained:
            continue
        raise MergeError(
            f"{sources.base.name_or_path} is not what the adapter was trained on: {trained} there, "
            f"{here} here\n    fix: base=THE_ONE_IT_WAS_TRAINED_ON, or check_base=false if its "
            "weights are the same"
        )
    return "the same as in training"


@dataclass
class Prepared:
    """A merge that can be written.

    Attributes:
        sources: What is merged onto what.
        base: The base's files.
        model: The base's architecture without weights, with the adapters on it.
        wholes: What some weights go through as a whole, by parameter.
        layout: What is written.
        dequantized: The base goes through its training storage first.
        resized: Rows of the embedding, where the adapter brings others than the base has.
        tokenizer: The adapter's, or the base's where the adapter brings none.
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
        """Say whether the base cannot be read a layer at a time: not row by row, or at a price."""
        restarts = any(
            str(config.init_lora_weights).lower() in adapters.RESTARTING
            for config in self.sources.configs
        )
        return bool(self.base.rearranged) or restarts or self.resized is not None


def prepare(
    sources: Sources, dequantized: bool, dtype: torch.dtype | None, shard_size: int | None
) -> Prepared:
    """Decide every tensor of the merged model.

    Args:
        sources: What is merged.
        dequantized: The base goes through its training storage first.
        dtype: Of the result; None: the base's own.
        shard_size: Bytes of a file; None: the base's files.

    Raises:
        MergeError: The adapter does not fit the base, or cannot be written into it.
    """
    from sft.model.base import load_architecture, load_tokenizer

    architecture = load_architecture(sources.base, buffers=True)
    base = Base.read(shards(sources.base), architecture)
    names = _stored_names(architecture)
    resized = _resize(architecture, sources)
    starts = [config.init_lora_weights for config in sources.configs]
    model = adapters.attach(adapters.hollow(architecture), sources.adapters, sources.configs)
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
    """Give what names a parameter as the files of its architecture do."""
    from transformers.core_model_loading import revert_weight_conversion

    def name_of(parameter: str) -> str:
        named: dict[str, Any] = revert_weight_conversion(
            architecture, {parameter: torch.zeros((), device="meta")}
        )
        return next(iter(named))

    return name_of


def _resize(architecture: PreTrainedModel, sources: Sources) -> int | None:
    """Make room for tokens that training added to the vocabulary; give the number of rows."""
    embedding = architecture.get_input_embeddings()
    name = next(name for name, module in architecture.named_modules() if module is embedding)
    endings = (f"{name}.weight", f"{name}.base_layer.weight")
    for shapes in sources.shapes:
        for tensor, shape in shapes.items():
            if tensor.endswith(endings) and shape[0] != embedding.weight.shape[0]:
                architecture.resize_token_embeddings(shape[0], mean_resizing=False)
                return shape[0]
    return None
