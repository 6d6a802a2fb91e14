"""Write and read ``sft.json``: the settings of training that generation needs, with the weights.

An adapter folder that is moved elsewhere thus still renders prompts as in training, and its base
model is quantized as in training.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

from sft.config import upstream
from sft.config.artefact_meta import meta_of
from sft.config.new_tokens import read_new_tokens
from sft.config.plain import from_json, read_json
from sft.config.settings import (
    Config,
    DatasetConfig,
    ModelConfig,
    QuantizationConfig,
    TemplateConfig,
)
from sft.config.template_settings import parts_of
from sft.errors import ConfigError, ModelError
from sft.files import write_text

CARD = "sft.json"
ADAPTER_SETTINGS = "adapter_config.json"
TOKENIZER = "tokenizer_config.json"
GENERATION = "generation_config.json"
PRECISIONS = ("fp32", "bf16", "fp16")


@dataclasses.dataclass
class Card:
    """The settings of a run that generation and merging need.

    Attributes:
        model: The base model, as the run named it.
        template: How prompts and answers are rendered.
        quantization: How training stored the base model.
        identity: ``base`` identifies the base weights, ``precision`` is how they were loaded.
        columns: ``dataset.columns``, with which the rows of a file to answer are read too.
        roles: ``dataset.roles``.
    """

    model: ModelConfig
    template: TemplateConfig
    quantization: QuantizationConfig
    identity: dict[str, str] = dataclasses.field(default_factory=dict)
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    roles: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def named(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rename columns, keys and roles of rows as in training, where a row has them."""
        if not (self.columns or self.roles):
            return rows
        from sft.data.sources import Source

        source = Source("", columns=self.columns, roles=self.roles)
        return [source.renamed(row) for row in rows]


def card_of(config: Config, identity: dict[str, str]) -> Card:
    """Return the card of a run, with the base and the precision of its identity."""
    kept = {what: found for what, found in identity.items() if what in ("base", "precision")}
    return Card(config.model, config.template, config.quantization, kept, **_names(config.dataset))


def _names(data: DatasetConfig) -> dict[str, Any]:
    """Return the names of columns and roles in the data; where its sources differ, what they share.

    Prepared data was made with the names in its meta.json.
    """
    meta = meta_of(data.path)
    settings = dataclasses.asdict(data) if meta is None else meta.get("settings", {})
    shared = {name: settings.get(name, {}) for name in ("columns", "roles")}
    sources = [{**shared, **item} for item in settings.get("mix", {}).values()]
    return {
        name: sources[0][name]
        if sources and all(source[name] == sources[0][name] for source in sources)
        else value
        for name, value in shared.items()
    }


def write_card(folder: Path, content: Card) -> None:
    """Write ``sft.json`` beside an adapter or a model."""
    card = dataclasses.asdict(content)
    card["template"]["chat_template"] = None  # the tokenizer in the same folder has it
    write_text(folder / CARD, json.dumps(card, indent=2) + "\n")


def read_card(folder: Path) -> Card | None:
    """Read ``sft.json``; None if a different tool made the folder.

    The folder may be a stranger's. So the file is plain JSON with the entries of ``Card``, and two
    entries are not taken from it: consent to run code, and a chat template, which is a file's name
    in training and in the tokenizer afterwards.

    Raises:
        ModelError: The file is damaged.
    """
    path = folder / CARD
    if not path.exists():
        return None
    try:
        card = from_json(Card, read_json(path))
        for text in [*card.template.prompts, *card.template.completions]:
            parts_of(text)
        if card.template.date is not None:
            datetime.date.fromisoformat(card.template.date)
        if card.identity.get("precision", "fp32") not in PRECISIONS:
            raise ValueError(f"identity.precision must be one of {', '.join(PRECISIONS)}")
        if card.quantization.load_in_4bit and card.quantization.load_in_8bit:
            raise ValueError("quantization has both load_in_4bit and load_in_8bit")
        if unknown := card.quantization.extra.keys() - upstream.bnb_config_names():
            raise ValueError(f"there is no entry quantization.extra.{min(unknown)}")
        if isinstance(card.model.new_tokens, str):  # a run names no file there
            raise ValueError("model.new_tokens must be a list or a mapping")
        read_new_tokens(card.model.new_tokens)
    except (ValueError, ConfigError) as error:
        raise damaged(path, error) from error
    card.model.trust_remote_code = False
    card.template.chat_template = None
    return card


def damaged(path: Path, error: object) -> ModelError:
    """Return the error for a file that another program has written, or an accident."""
    reason = (str(error) or repr(error)).splitlines()[0]
    return ModelError(f"{path} is damaged: {reason}\n    fix: train or copy it again")


def base_of(adapter: Path, card: Card | None, asked: str | None, trust: bool) -> ModelConfig:
    """Return the base model of an adapter: as asked, as in training, or as PEFT recorded.

    Args:
        adapter: The adapter's folder.
        card: Its card.
        asked: The base that the command names.
        trust: Whether the command consents to run the base's own Python code.

    Raises:
        ModelError: The adapter's settings are damaged, or nothing names a base model.
    """
    noted: Any = asked
    if card is not None:
        noted = asked or card.model.name_or_path
    elif asked is None:
        path = adapter / ADAPTER_SETTINGS
        try:
            noted = dict(read_json(path)).get("base_model_name_or_path")
        except (ValueError, TypeError) as error:
            raise damaged(path, error) from error
    if not noted or not isinstance(noted, str):
        name = CARD if card is not None else ADAPTER_SETTINGS
        raise ModelError(f"{adapter / name} names no base model\n    fix: base=HUB_ID_OR_FOLDER")
    given = card.model if card is not None else ModelConfig()
    return dataclasses.replace(given, name_or_path=noted, trust_remote_code=trust)
