"""Find the adapters of a merge and their base, and check that they belong together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sft.config.settings import ModelConfig, QuantizationConfig
from sft.errors import MergeError
from sft.inference.card import Card, base_of, read_card
from sft.merge import refusals
from sft.merge.adapter_files import check_file, parsed_config, read_config, restarts

if TYPE_CHECKING:
    from peft import LoraConfig

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


def find(
    folders: Sequence[Path],
    weights: Sequence[float],
    asked: str | None,
    trust: bool,
    merging: bool = True,
) -> Sources:
    """Read the adapters, and find their base.

    Args:
        folders: The adapters' folders.
        weights: The factor of each adapter.
        asked: The base that the command names.
        trust: Whether the command consents to run the base's own Python code.
        merging: Whether the adapters will be merged; otherwise they generate text with the base.

    Raises:
        MergeError: An adapter is damaged, empty or of a kind that cannot be merged.
        ModelError: The adapter does not name a base, or the base cannot be reached.
    """
    from sft.model.base import commit_of, load_config
    from sft.model.precision import dtype_of

    cards = [read_card(folder) for folder in folders]
    bases = [base_of(*one, asked, trust) for one in zip(folders, cards, strict=True)]
    card = cards[0]
    bases = [_as_trained(base, card) for base in bases]
    names = {str(base.name_or_path) for base in bases}
    if len(names) > 1:
        raise MergeError(
            f"the adapters were trained on different bases: {', '.join(sorted(names))}\n"
            "    fix: base=MODEL that fits all of them"
        )
    shapes = [check_file(folder) for folder in folders]
    configs = [(read_config if merging else parsed_config)(folder) for folder in folders]
    if len(folders) > 1 or list(weights) != [1.0]:
        _check_sum(folders, configs, cards)
    base = bases[0]
    config = load_config(base)
    if commit := commit_of(base):  # so that all files are read from the same commit
        base = dataclasses.replace(base, revision=commit)
    if merging and (reason := refusals.of_base(str(base.name_or_path), config)):
        raise MergeError(f"{reason}\n    fix: base=THE_MODEL_THAT_WAS_QUANTISED check_base=false")
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
        wrong += [f"init_lora_weights={start}"] if restarts(config) else []
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
