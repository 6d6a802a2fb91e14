"""Check which modules the LoRA settings choose, against the model's architecture.

PEFT ignores a name in ``target_modules`` that matches no module if a different one matches, and
ignores typos in ``rank_pattern`` and ``modules_to_save``: the run would train other parameters.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sft.config.rules import LARGEST_RANK
from sft.config.settings import LoraSection
from sft.config.upstream import did_you_mean
from sft.errors import ConfigError, Problem
from sft.limits import slow_pattern
from sft.model import shared_weights
from sft.model.shared_weights import matches

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Fields in lora.extra that choose layers.
LAYERS = ("layers_to_transform", "layers_pattern")


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer; GPT-2's are Conv1D."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


def attention_names(model: PreTrainedModel) -> list[str]:
    """List the linear layers of the attention modules, as suffixes that PEFT matches."""
    names = set()
    for path, module in model.named_modules():
        if type(module).__name__.endswith("Attention"):
            parent = path.rpartition(".")[2]
            for child, layer in module.named_modules():
                if child and is_linear(layer):
                    names.add(f"{parent}.{child}")
    return sorted(names)


def targeted(lora: LoraSection, model: PreTrainedModel) -> list[str]:
    """List the paths of the modules that get an adapter."""
    exclude = lora.extra.get("exclude_modules")
    return [path for path in _chosen(lora, model) if not _excluded(path, exclude)]


def _excluded(path: str, exclude: Any) -> bool:
    """Match a module's path with ``exclude_modules`` as PEFT does."""
    if isinstance(exclude, str):
        return re.fullmatch(exclude, path) is not None
    return any(matches(path, name) for name in exclude or ())


def _chosen(lora: LoraSection, model: PreTrainedModel) -> list[str]:
    head = model.get_output_embeddings()
    linear = [path for path, module in model.named_modules() if is_linear(module)]
    targets = lora.target_modules
    if targets == "all-linear":
        return [path for path in linear if model.get_submodule(path) is not head]
    if targets == "attention":
        targets = attention_names(model)
    paths = [path for path, _ in model.named_modules()]
    if isinstance(targets, str):
        return [path for path in paths if re.fullmatch(targets, path)]
    return [path for path in paths if any(matches(path, name) for name in targets)]


def target_modules(lora: LoraSection, model: PreTrainedModel) -> str | list[str]:
    """Return ``target_modules`` as PEFT takes it.

    PEFT chooses layers among a list of names only. Such a list has the last parts of the modules'
    paths, or the whole paths where a last part is also that of a module that is not targeted, such
    as the router of experts.

    Raises:
        ValueError: PEFT refuses the choice of layers.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    layers = {key: lora.extra[key] for key in LAYERS if lora.extra.get(key) is not None}
    if layers and isinstance(lora.target_modules, str):
        wanted = set(targeted(lora, model))
        names = sorted({path.rpartition(".")[2] for path in wanted})
        trial = LoraConfig(target_modules=names, **layers)
        paths = (path for path, _ in model.named_modules())
        found = {path for path in paths if check_target_module_exists(trial, path)}
        return names if found <= wanted else sorted(found & wanted)
    if lora.target_modules == "attention":
        return attention_names(model)
    given: str | list[str] = copy.copy(lora.target_modules)  # PEFT writes into its config
    return given


def missing_layers(lora: LoraSection, paths: list[str]) -> Iterator[Problem]:
    """Find layers of ``layers_to_transform`` that no path has; PEFT ignores some without a word."""
    asked = lora.extra.get("layers_to_transform")
    if asked is None or lora.extra.get("layers_pattern"):
        return
    # As PEFT does (tuners_utils.check_target_module_exists).
    found = (re.match(r".*?\.[^.]*\.(\d+)\.", path) for path in paths)
    layers = {int(match[1]) for match in found if match}
    given = asked if isinstance(asked, list) else [asked]
    missing = [layer for layer in given if layer not in layers]
    if missing and layers:
        rule = f"there are no adapted modules in layers {missing}, only in {sorted(layers)}"
        kept = [layer for layer in given if layer in layers] or [max(layers)]
        key = "lora.extra.layers_to_transform"
        yield Problem(f"{key}={asked}", rule, f"{key}=[{','.join(map(str, kept))}]")


def require_quick_patterns(lora: LoraSection, model: PreTrainedModel) -> None:
    """Refuse regular expressions that are not valid, or take long on the modules' paths.

    Raises:
        ConfigError: One of them is such.
    """
    given = (lora.target_modules, lora.extra.get("exclude_modules"))
    patterns = [text for text in given if isinstance(text, str)]
    patterns += [rf"(?:.*\.)?(?:{key})" for key in {**lora.rank_pattern, **lora.alpha_pattern}]
    if reason := slow_pattern(patterns, [path for path, _ in model.named_modules() if path]):
        fix = "lora.target_modules=all-linear lora.rank_pattern={}"
        raise ConfigError([Problem("lora", reason, fix)])


def problems(lora: LoraSection, model: PreTrainedModel, stage: int) -> Iterator[Problem]:
    """Yield the settings of the adapter that do not fit the architecture."""
    paths = [path for path, _ in model.named_modules() if path]
    leaves = {path.rpartition(".")[2] for path in paths}
    adapted = targeted(lora, model)
    linear_names = sorted({path.rpartition(".")[2] for path in adapted})

    if not adapted:
        known = sorted({p.rpartition(".")[2] for p in paths if is_linear(model.get_submodule(p))})
        yield Problem(
            f"lora.target_modules={lora.target_modules}",
            f"matches no module of {type(model).__name__}; its linear layers are "
            + ", ".join(known),
            f"lora.target_modules=[{lora.target_modules}]"
            if lora.target_modules in known
            else "lora.target_modules=all-linear",
        )
    entries = {"target_modules": lora.target_modules, "modules_to_save": lora.modules_to_save}
    for setting, names in entries.items():
        for name in names if isinstance(names, list) else []:
            if adapted and not any(matches(path, name) for path in paths):
                yield Problem(
                    f"lora.{setting}: {name}",
                    f"matches no module of {type(model).__name__}",
                    did_you_mean(name, leaves),
                )
    patterns: dict[str, Any] = {
        "rank_pattern": lora.rank_pattern,
        "alpha_pattern": lora.alpha_pattern,
    }
    for setting, pattern in patterns.items():
        for name in pattern:
            # As PEFT does (tuners_utils.get_pattern_key): the path's end must match the pattern.
            if not any(re.match(rf"(.*\.)?({name})$", path) for path in adapted):
                yield Problem(
                    f"lora.{setting}: {name}",
                    "matches no module that gets an adapter",
                    did_you_mean(name, linear_names),
                )
    for name, rank in lora.rank_pattern.items():
        if not 1 <= rank <= LARGEST_RANK:
            rule = f"must be from 1 to {LARGEST_RANK}"
            yield Problem(f"lora.rank_pattern.{name}={rank}", rule, "remove it")
    yield from shared_weights.problems(lora, model, adapted)
