"""Write and read ``sft.json``: the settings of training that generation needs, with the weights.

An adapter folder that is moved elsewhere thus still renders prompts as in training, and its base
model is quantized as in training.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft.config.saved import escaped
from sft.config.settings import Config, ModelConfig, QuantizationConfig, TemplateConfig
from sft.errors import ModelError
from sft.files import write_text

CARD = "sft.json"
ADAPTER_SETTINGS = "adapter_config.json"


@dataclasses.dataclass
class Card:
    """The settings of a run that generation and merging need.

    Attributes:
        model: The base model, as the run named it.
        template: How prompts and answers are rendered.
        quantization: How training stored the base model.
        identity: ``base`` identifies the base weights, ``precision`` is how they were loaded.
    """

    model: ModelConfig
    template: TemplateConfig
    quantization: QuantizationConfig
    identity: dict[str, str] = dataclasses.field(default_factory=dict)


def card_of(config: Config, identity: dict[str, str]) -> Card:
    """Return the card of a run, with the base and the precision of its identity."""
    kept = {what: found for what, found in identity.items() if what in ("base", "precision")}
    return Card(config.model, config.template, config.quantization, kept)


def write_card(folder: Path, content: Card) -> None:
    """Write ``sft.json`` beside an adapter or a model."""
    card = dataclasses.asdict(content)
    card["template"]["chat_template"] = None  # the tokenizer in the same folder has it
    write_text(folder / CARD, json.dumps(card, indent=2) + "\n")


def read_card(folder: Path) -> Card | None:
    """Read ``sft.json``; None if a different tool made the folder.

    Raises:
        ModelError: The file is damaged.
    """
    path = folder / CARD
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        card: Card = OmegaConf.to_object(  # type: ignore[assignment]
            OmegaConf.merge(OmegaConf.structured(Card), escaped(values))
        )
    except (ValueError, TypeError, AttributeError, OmegaConfBaseException) as error:
        raise _damaged(path, error) from error
    return card


def _damaged(path: Path, error: Exception) -> ModelError:
    reason = str(error).splitlines()[0]
    return ModelError(f"{path} is damaged: {reason}\n    fix: train or copy it again")


def base_of(adapter: Path, card: Card | None, asked: str | None) -> ModelConfig:
    """Return the base model of an adapter: as asked, as in training, or as PEFT recorded.

    Raises:
        ModelError: The adapter's settings are damaged, or nothing names a base model.
    """
    if card is not None:
        named = card.model if asked is None else dataclasses.replace(card.model, name_or_path=asked)
        return named
    path = adapter / ADAPTER_SETTINGS
    try:
        noted = json.loads(path.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise _damaged(path, error) from error
    if not asked and not noted:
        raise ModelError(f"{path} names no base model\n    fix: base=HUB_ID_OR_FOLDER")
    return ModelConfig(name_or_path=asked or noted)
