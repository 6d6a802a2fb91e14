"""Write the files of a merged model beside its weights: configs, tokenizer and card."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sft.config.plain import read_json
from sft.config.settings import ModelConfig, QuantizationConfig, TemplateConfig
from sft.errors import DataError, MergeError
from sft.files import write_text
from sft.inference.card import TOKENIZER, write_card
from sft.inference.stops import generation_of, stop_at
from sft.model.base import load_config
from sft.model.overrides import written_into
from sft.model.source import loading, source
from sft.model.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from sft.merge.prepare import PreparedMerge


def write(prepared: PreparedMerge, dtype: torch.dtype | None, folder: Path) -> None:
    """Write config, generation config, tokenizer, chat template and card.

    Args:
        prepared: The merge.
        dtype: The precision of the weights; None: the base's own.
        folder: The folder of the weights.
    """
    tokenizer = prepared.tokenizer
    tokenizer.save_pretrained(folder)
    settings = _base_settings(prepared.sources.base)
    text = settings.get("text_config", settings)
    for level in {id(settings): settings, id(text): text}.values():
        if prepared.layout.untied:
            level["tie_word_embeddings"] = False
        if dtype is not None:
            level.pop("torch_dtype", None)
            level["dtype"] = str(dtype).removeprefix("torch.")
    if prepared.sources.card is not None:
        _name_tokens(text, prepared.sources.card.model, prepared.tokenizer)
    rows = prepared.model.get_input_embeddings().weight.shape[0]
    if "vocab_size" in text and prepared.resized:
        text["vocab_size"] = rows
    _carry_code(prepared.sources.base, settings, folder)
    write_text(folder / "config.json", json.dumps(settings, indent=2) + "\n")
    _generation(prepared).save_pretrained(folder)
    card = prepared.sources.card
    if card is not None:
        # The merged model is no longer quantised, and depends on no base model.
        whole = dataclasses.replace(card, quantization=QuantizationConfig(), identity={})
        write_card(folder, whole)


def _name_tokens(text: dict[str, Any], model: ModelConfig, tokenizer: Any) -> None:
    """Write the ids of an EOS and a pad token that the run chose into the model's config."""
    if model.eos_token is not None:
        text["eos_token_id"] = tokenizer.eos_token_id
    if model.eos_token is not None or model.pad_token is not None:
        text["pad_token_id"] = tokenizer.pad_token_id


def check(prepared: PreparedMerge, folder: Path) -> None:
    """Compare the written tokenizer and config with the ones in memory.

    Raises:
        MergeError: An entry that affects the model's answers differs.
    """
    trust = prepared.sources.base.trust_remote_code
    here = ModelConfig(name_or_path=str(folder.resolve()), trust_remote_code=trust)
    wanted, written = prepared.tokenizer, load_tokenizer(here)
    config = load_config(here).get_text_config()
    before = prepared.model.config.get_text_config()
    tied = bool(before.tie_word_embeddings) and not prepared.layout.untied
    pairs = {
        "vocabulary": (wanted.get_vocab(), written.get_vocab()),
        "EOS token": (wanted.eos_token_id, written.eos_token_id),
        "pad token": (wanted.pad_token_id, written.pad_token_id),
        "chat template": (wanted.chat_template, written.chat_template),
        "tie_word_embeddings": (tied, bool(config.tie_word_embeddings)),
    }
    if wrong := [name for name, (one, other) in pairs.items() if one != other]:
        raise MergeError(f"the {wrong[0]} in {folder} is not the one that was written")


def _base_settings(base: ModelConfig) -> dict[str, Any]:
    """Read the base's config.json unparsed, so that entries unknown to Transformers remain."""
    from transformers.utils.hub import cached_file

    where = source(base)
    with loading("config", base):
        path = cached_file(
            where["pretrained_model_name_or_path"], "config.json", revision=where["revision"]
        )
        settings: dict[str, Any] = read_json(Path(path), finite=False)
    if base.config:
        config = load_config(base)
        written_into(settings, base.config, config.to_dict(), config.attribute_map)
    return settings


def _carry_code(base: ModelConfig, settings: dict[str, Any], folder: Path) -> None:
    """Copy the model's own Python files, or let ``auto_map`` refer to them on the hub."""
    name = Path(str(base.name_or_path))
    if name.is_dir():
        for path in name.glob("*.py"):
            shutil.copy(path, folder)
        return
    for kind, reference in settings.get("auto_map", {}).items():
        if isinstance(reference, str) and "--" not in reference:
            settings["auto_map"][kind] = f"{name}--{reference}"


def _generation(prepared: PreparedMerge) -> GenerationConfig:
    """Return the adapter's generation settings, or the base's, with the stops of both."""
    from transformers import GenerationConfig

    adapter, where = prepared.sources.adapters[0], source(prepared.sources.base)
    try:
        generation = generation_of(adapter) or GenerationConfig.from_pretrained(
            where["pretrained_model_name_or_path"], revision=where["revision"]
        )
    except OSError:  # the base has no generation_config.json
        generation = GenerationConfig.from_model_config(prepared.model.config)
    if prepared.sources.card is not None or (adapter / TOKENIZER).is_file():
        stop_at(generation, prepared.tokenizer, stop_ids(prepared))
    return generation


def stop_ids(prepared: PreparedMerge) -> list[int]:
    """Return the tokens that end an answer in the template of training.

    Of an adapter without card, that is the chat template which it brings.
    """
    from sft.data.template import Template

    tokenizer, card = prepared.tokenizer, prepared.sources.card
    if card is not None:
        return Template(card.template, tokenizer).stop_ids
    if not (prepared.sources.adapters[0] / TOKENIZER).is_file() or not tokenizer.chat_template:
        return []
    try:
        return Template(TemplateConfig(kind="chat"), tokenizer).stop_ids
    except DataError:  # it ends an answer with no control token
        return []
