"""Read an adapter's folder, and refuse one that is damaged or cannot be merged.

Generation and merging read adapters here and with ``attach.attach``; so both refuse the same.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from safetensors import SafetensorError

from sft.checkpoint import weights
from sft.config.plain import read_json
from sft.config.rules import LARGEST, LARGEST_RANK
from sft.errors import MergeError
from sft.inference.card import ADAPTER_SETTINGS, damaged
from sft.limits import slow_pattern
from sft.merge import refusals

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftConfig

logger = logging.getLogger("sft")

WEIGHTS = "adapter_model.safetensors"
# With these PEFT imports a module that the file names, or loads other adapters and pickled tensors.
FOREIGN = ("megatron_config", "adapters", "prompt_tuning_init_state_dict_path")
PATTERNS = ("rank_pattern", "alpha_pattern")
EXPRESSIONS = ("target_modules", "exclude_modules", "layers_pattern")
TASK = "CAUSAL_LM"
BIASES = ("none", "all", "lora_only")
NOT_FLOAT = "numbers that are not floating-point"


def check_file(folder: Path) -> dict[str, tuple[int, ...]]:
    """Refuse an adapter that is damaged, empty, not finite, or whose lora_B are all zero.

    Returns:
        The shapes of its tensors by name.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        states = sorted(item.name for item in folder.glob("*zero_pp_rank_*")) or sorted(
            item.name for item in folder.glob("global_step*")
        )
        if states:
            raise MergeError(
                f"{folder} holds DeepSpeed's shards ({states[0]}), not an adapter\n"
                "    fix: adapter=FOLDER with adapter_model.safetensors (a run has it in adapter/)"
            )
        raise MergeError(f"there is no {path}\n    fix: adapter=FOLDER with safetensors weights")
    try:
        found = weights.inspect([path], lambda name, tensor: _type_fault(tensor))
    except SafetensorError as error:
        raise MergeError(f"{path} is damaged: {error}\n    fix: train or copy it again") from None
    if not found.shapes or "empty" in found.wrong:
        empty = found.wrong.get("empty", [])
        raise MergeError(f"{path} holds empty tensors {empty[:3]}\n    fix: train it again")
    if types := [what for what in found.wrong if what.startswith(NOT_FLOAT)]:
        raise MergeError(
            f"{path} has {types[0]} in {found.wrong[types[0]][:3]}\n    fix: train or copy it again"
        )
    if "not finite" in found.wrong:
        raise MergeError(
            f"{path} holds NaN or infinite values in {found.wrong['not finite'][:3]}\n"
            "    fix: train again with a lower learning rate"
        )
    zero, trained = len(found.zero), len(found.trained)
    if zero and not trained:
        raise MergeError(f"every lora_B of {path} is zero: the adapter changes nothing")
    if zero:
        logger.info("warning: %d of %d lora_B in %s are zero", zero, zero + trained, path)
    return found.shapes


def _type_fault(tensor: torch.Tensor) -> str | None:
    return None if tensor.is_floating_point() else f"{NOT_FLOAT} ({tensor.dtype})"


def parsed_config(folder: Path) -> PeftConfig:
    """Read an adapter's settings.

    Raises:
        MergeError: The file is damaged, or asks PEFT to import a module or to load other files.
    """
    from peft import PeftConfig

    path = folder / ADAPTER_SETTINGS
    try:
        content = dict(read_json(path))
        with warnings.catch_warnings(record=True) as notes:
            config = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # the file may hold anything, and PEFT checks little of it
        raise MergeError(str(damaged(path, error))) from error
    require_known_start(folder, config)
    for name in FOREIGN:
        if getattr(config, name, None):
            raise MergeError(
                f"{folder} uses {name}, with which PEFT loads code or files from elsewhere\n"
                "    fix: remove it from adapter_config.json, or use PEFT itself"
            )
    if is_lora(config) and (reason := _wrong_type(content, config)):
        raise MergeError(str(damaged(path, reason)))
    ranks = {"r": content.get("r", 1), **dict(content.get("rank_pattern") or {})}
    for name, rank in ranks.items() if config.peft_type == "LORA" else ():
        if type(rank) is not int or not 1 <= rank <= LARGEST_RANK:
            reason = f"{name}={rank} must be a whole number from 1 to {LARGEST_RANK}"
            raise MergeError(str(damaged(path, reason)))
    alphas = {"lora_alpha": content.get("lora_alpha", 1), **(content.get("alpha_pattern") or {})}
    for name, alpha in alphas.items() if config.peft_type == "LORA" else ():
        if not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST:
            reason = f"{name}={alpha} must be a number of at most {LARGEST:,}"
            raise MergeError(str(damaged(path, reason)))
    if config.task_type not in (None, TASK):
        raise MergeError(
            f"{folder} has task_type={getattr(config.task_type, 'value', config.task_type)}, whose "
            f"model has another head than one that generates text\n"
            f"    fix: name an adapter with task_type={TASK}, or use PEFT itself"
        )
    if (bias := getattr(config, "bias", "none")) not in BIASES:
        reason = f"bias={bias} must be one of {', '.join(BIASES)}"
        raise MergeError(str(damaged(path, reason)))
    for note in notes:
        logger.info("warning: %s: %s", path, str(note.message).splitlines()[0])
    return config


def _wrong_type(content: dict[str, Any], config: PeftConfig) -> str | None:
    """Return the first entry whose type is not the one that PEFT documents; None if all are."""
    kinds, fields = get_type_hints(type(config)), dataclasses.fields(config)
    for field in fields:
        value = content.get(field.name)
        if value is not None and not _fits(value, kinds[field.name]):
            return f"{field.name}={str(value)[:80]} must be of type {field.type}"
    return None


def _fits(value: Any, kind: Any) -> bool:
    """Check a JSON value against a type of PEFT's settings; numbers may be whole or not."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is list:
        return isinstance(value, list) and all(_fits(item, arguments[0]) for item in value)
    if origin is Literal:  # PEFT's own do not name all values, such as pissa_niter_4
        return isinstance(value, str)
    if kind in (int, float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is dict or origin is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    return isinstance(value, list if origin is tuple else kind)


def read_config(folder: Path) -> LoraConfig:
    """Read an adapter's settings, and refuse what cannot be merged.

    Raises:
        MergeError: It is not LoRA, or its effect cannot be written as a change of weights.
    """
    config = parsed_config(folder)
    if not is_lora(config):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise MergeError(f"{folder} is {kind}, not LoRA\n    fix: merge it in memory, with PEFT")
    if found := refusals.of_settings(str(folder), config):
        raise MergeError("{}\n    fix: {}".format(*found))
    return config


def require_known_start(folder: Path, config: PeftConfig) -> None:
    """Refuse an adapter that belongs to a base which training has changed and nothing records.

    Raises:
        MergeError: It is one.
    """
    if found := refusals.of_start(str(folder), config):
        raise MergeError("{}\n    fix: {}".format(*found))


def require_quick_patterns(folder: Path, config: PeftConfig, paths: Iterable[str]) -> None:
    """Refuse settings that are regular expressions and would take PEFT too long.

    Args:
        folder: The adapter's folder.
        config: Its settings.
        paths: The paths of the base's modules.

    Raises:
        MergeError: An expression is not valid, or takes too long.
    """
    texts = [getattr(config, name, None) for name in EXPRESSIONS]
    keys = [key for name in PATTERNS for key in getattr(config, name, None) or {}]
    patterns = [text for text in texts if isinstance(text, str)]
    patterns += [rf"(?:.*\.)?(?:{key})" for key in keys]
    if reason := slow_pattern(patterns, list(paths)):
        raise MergeError(str(damaged(folder / ADAPTER_SETTINGS, reason)))


def is_lora(config: PeftConfig) -> bool:
    """Return whether an adapter is LoRA or one of its variants."""
    return bool(config.peft_type == "LORA")


def restarts(config: PeftConfig) -> bool:
    """Return whether the initialisation subtracts the adapter's initial product from the base."""
    return str(getattr(config, "init_lora_weights", None)).lower() in ("pissa", "olora")
