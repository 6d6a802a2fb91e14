"""What generation needs to know of training, kept beside the weights in ``sft.json``.

An adapter folder that is moved elsewhere thus still renders prompts as in training, and is put on a
base model that is stored as it was then.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from omegaconf import OmegaConf

from sft.config.settings import Config, ModelConfig, QuantizationConfig, TemplateConfig
from sft.errors import ModelError
from sft.files import write_text

CARD = "sft.json"
ADAPTER_SETTINGS = "adapter_config.json"


@dataclasses.dataclass
class Card:
    """The choices of a run that outlive it.

    Attributes:
        model: The base, as it was named.
        template: What prompts and answers look like.
        quantization: How training stored the base.
        identity: ``base``, which weights those were, and ``precision``, which they were loaded in.
    """

    model: ModelConfig
    template: TemplateConfig
    quantization: QuantizationConfig
    identity: dict[str, str] = dataclasses.field(default_factory=dict)


def card_of(config: Config, identity: dict[str, str]) -> Card:
    """Note what a run has chosen, and the base and the precision that it had."""
    kept = {what: found for what, found in identity.items() if what in ("base", "precision")}
    return Card(config.model, config.template, config.quantization, kept)


def write_card(folder: Path, content: Card) -> None:
    """Write ``sft.json`` beside an adapter or a model."""
    card = dataclasses.asdict(content)
    card["template"]["chat_template"] = None  # it is saved with the tokenizer, which lies beside
    write_text(folder / CARD, json.dumps(card, indent=2) + "\n")


def read_card(folder: Path) -> Card | None:
    """Read ``sft.json``; None where another tool made the folder."""
    path = folder / CARD
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    card: Card = OmegaConf.to_object(  # type: ignore[assignment]
        OmegaConf.merge(OmegaConf.structured(Card), values)
    )
    return card


def base_of(adapter: Path, card: Card | None, asked: str | None) -> ModelConfig:
    """Say which base model an adapter goes on: as asked, as in training, or as PEFT noted.

    Raises:
        ModelError: The adapter's settings are damaged, or nothing names a base.
    """
    if card is not None:
        named = card.model if asked is None else dataclasses.replace(card.model, name_or_path=asked)
        return named
    path = adapter / ADAPTER_SETTINGS
    try:
        noted = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise ModelError(f"{path} is damaged: {error}\n    fix: train or copy it anew") from error
    if not asked and not noted:
        raise ModelError(f"{path} names no base model\n    fix: base=HUB_ID_OR_FOLDER")
    return ModelConfig(name_or_path=asked or noted)
