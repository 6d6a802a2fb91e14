"""Start a run from the weights of an adapter: ``lora.init_from``."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.checkpoint import sharded
from sft.checkpoint.weights import adapter_tensors
from sft.config.new_tokens import NAME as NEW_TOKENS
from sft.config.rules import written
from sft.errors import ConfigError, Problem
from sft.inference.card import ADAPTER_SETTINGS, Card, read_card
from sft.merge import adapter_files
from sft.merge.attach import attach
from sft.merge.placeholders import with_placeholders
from sft.model.adapter import attached, excluding
from sft.run.resume import base_identity

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel

    from sft.config.settings import Config
    from sft.training.trainer import Trainer

logger = logging.getLogger("sft")

NAME = "lora.init_from"
# Fields in lora.extra that decide which tensors an adapter has.
CHOOSING = ("bias", "lora_bias", "target_parameters", "trainable_token_indices")
SCALES = ("r", "lora_alpha", "use_rslora", "use_dora")  # settings with a fix of their own


def require(
    config: Config, lora: LoraConfig | None, architecture: PreTrainedModel, resume_from: Path | None
) -> None:
    """Check that the run's adapter can start from the one that is set, before any weight loads.

    Modules that the adapter's own settings exclude are excluded here too.

    Args:
        config: The run's config.
        lora: PEFT's config of the run's adapter, which is changed.
        architecture: The model on the meta device.
        resume_from: The checkpoint of a resumed run, which has the same tensors.

    Raises:
        ConfigError: The adapters differ in their base, modules or ranks.
        MergeError: The adapter is damaged, not one of LoRA, or does not fit the base.
    """
    if config.lora.init_from is None or lora is None:
        return
    folder = Path(config.lora.init_from)
    if not (folder / ADAPTER_SETTINGS).is_file() and resume_from is not None:
        folder = resume_from
    if not (folder / ADAPTER_SETTINGS).is_file():
        fix = f"{NAME}=FOLDER with {ADAPTER_SETTINGS}"
        raise ConfigError([Problem(f"{NAME}={folder}", "is not the folder of an adapter", fix)])
    theirs = adapter_files.read_config(folder)
    if theirs.exclude_modules:
        given = theirs.exclude_modules
        patterns = [given] if isinstance(given, str) else [excluding(given, [])]
        lora.exclude_modules = excluding(lora.exclude_modules, patterns)
    if resume_from is not None:
        return
    found = list(_scales(folder, lora, theirs))
    shapes = adapter_files.check_file(folder)
    if adapter_files.restarts(theirs):
        rule = f"its init_lora_weights={theirs.init_lora_weights} changed the base it was made on"
        found.append(Problem(f"{NAME}={folder}", rule, f"{NAME}=null"))
    card = read_card(folder)
    base = card.identity.get("base") if card else None
    if card and base is not None and base != base_identity(config.model):
        rule = f"was trained on {card.model.name_or_path}, whose weights differ from the base's"
        fix = f"model.name_or_path={card.model.name_or_path}"
        found.append(Problem(f"{NAME}={folder}", rule, fix))
    if not found:
        found += _new_tokens(config, folder, lora, theirs, card)
    if not found:
        # Its patterns, modules and tensors are checked as for generating and merging.
        attach(with_placeholders(copy.deepcopy(architecture)), [folder], [theirs])
        found += _tensors(config, folder, shapes, lora, theirs, architecture)
    if found:
        raise ConfigError(found)


def _scales(folder: Path, ours: LoraConfig, theirs: LoraConfig) -> list[Problem]:
    """Compare the settings that scale the adapter's output."""
    found = []
    for name in SCALES:
        own, other = getattr(ours, name), getattr(theirs, name)
        if own != other:
            fix = f"lora.{name}={other}".lower()
            found.append(Problem(f"lora.{name}={own}".lower(), f"{folder} has {name}={other}", fix))
    return found


def _new_tokens(
    config: Config, folder: Path, ours: LoraConfig, theirs: LoraConfig, card: Card | None
) -> list[Problem]:
    """Compare the new tokens, whose rows both adapters train."""
    there = card.model.new_tokens if card else None
    if ours.trainable_token_indices == theirs.trainable_token_indices:
        return []
    if not (there or config.model.new_tokens):
        return []
    rule = f"{folder} has {len(there or ())} new tokens, {written(NEW_TOKENS, there)}"
    given = written(NEW_TOKENS, config.model.new_tokens)
    return [Problem(given, rule, f"'{written(NEW_TOKENS, there)}'")]


def _tensors(
    config: Config,
    folder: Path,
    shapes: dict[str, tuple[int, ...]],
    ours: LoraConfig,
    theirs: LoraConfig,
    architecture: PreTrainedModel,
) -> list[Problem]:
    """Compare names and shapes of the tensors, and the scales of single modules."""
    model = attached(ours, architecture)
    own = {name: tuple(t.shape) for name, t in adapter_tensors(model).items()}
    different = sorted(set(own.items()) ^ set(shapes.items()))
    if own.keys() != shapes.keys():
        name = different[0][0]
        where = "the run's adapter" if name in own else str(folder)
        setting, now, fix = _chooses(config, ours, theirs)
        return [Problem(f"{setting}={now}", f"only {where} has {name}", f"{setting}={fix}")]
    if different:
        name = different[0][0]
        rule = f"{name} has the shape {list(own[name])}, and in {folder} {list(shapes[name])}"
        return [_pattern("rank_pattern", config, theirs, rule)]
    alphas = model.peft_config["default"].alpha_pattern
    if (alphas or {}) != (theirs.alpha_pattern or {}):
        rule = f"{folder} has alpha_pattern={theirs.alpha_pattern}"
        return [_pattern("alpha_pattern", config, theirs, rule)]
    return []


def _chooses(config: Config, ours: LoraConfig, theirs: LoraConfig) -> tuple[str, Any, str]:
    """Return the setting by which two adapters have other tensors, its value and the other one."""
    if (theirs.modules_to_save or []) != (ours.modules_to_save or []):
        saved = _written(theirs.modules_to_save) if theirs.modules_to_save else "null"
        return "lora.modules_to_save", config.lora.modules_to_save, saved
    for name in CHOOSING:
        own, other = getattr(ours, name), getattr(theirs, name)
        if own != other:
            written = _written(other) if isinstance(other, list) else str(other).lower()
            return f"lora.extra.{name}", own, "null" if other is None else written
    return "lora.target_modules", config.lora.target_modules, _written(theirs.target_modules)


def _pattern(name: str, config: Config, theirs: LoraConfig, rule: str) -> Problem:
    """Return the problem of a pattern, with the other adapter's as the fix."""
    entries = (f'"{key}": {value}' for key, value in (getattr(theirs, name) or {}).items())
    fix = f"'lora.{name}={{{', '.join(entries)}}}'"
    return Problem(f"lora.{name}={getattr(config.lora, name)}", rule, fix)


def _written(targets: Any) -> str:
    if isinstance(targets, str):
        return f'"{targets}"'
    leaves = {str(target).rpartition(".")[2] for target in targets or ()}
    return f"[{','.join(sorted(leaves))}]"


def load(config: Config, trainer: Trainer) -> None:
    """Replace the first values of the run's adapter by those of the adapter that is set."""
    if config.lora.init_from is None or not config.lora.enabled:
        return
    from safetensors.torch import load_file

    folder = Path(config.lora.init_from)
    values = load_file(folder / adapter_files.WEIGHTS)
    model: Any = trainer.model
    parameters = adapter_tensors(model, dict(model.named_parameters(remove_duplicate=False)))
    if parameters.keys() != values.keys():
        name = sorted(parameters.keys() ^ values.keys())[0]
        rule = f"{name} is trained by one of the adapters only"
        raise ConfigError([Problem(f"{NAME}={folder}", rule, f"{NAME}=null")])
    for name, value in values.items():
        sharded.fill(parameters[name], value)
    logger.info("the adapter starts from %s", folder)
