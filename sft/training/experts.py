"""Say whether the adapter trains the experts and routers of a mixture-of-experts model.

PEFT adapts them under ``all-linear`` in some architectures, such as Mixtral and Qwen3-MoE, and not
in others, such as GPT-OSS and Granite-MoE: there they are stacked parameters, not linear layers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sft.checkpoint.sharded import shape_of
from sft.model.experts import number_of

if TYPE_CHECKING:
    from peft import PeftModel

    from sft.config.settings import LoraSection

EXPERTS, ROUTERS = "experts", "routers"


def describe(model: PeftModel, lora: LoraSection) -> str:
    """Say which experts and routers have adapters, and the setting that changes it.

    Args:
        model: The model with its adapter.
        lora: The settings that it was made with.

    Returns:
        A clause for the log; "" if the model has neither.
    """
    text = model.get_base_model().config.get_text_config()
    names = _names(model, number_of(text), text.hidden_size)
    if not any(names.values()):
        return ""
    adapted = {
        name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name
    }
    adapted = {_clean(path) for path in adapted}
    trained = [what for what, found in names.items() if adapted & found.keys()]
    rest = [what for what, found in names.items() if found and what not in trained]
    said, given = [], lora.extra.get("target_parameters") or []
    if trained:
        out = "lora.target_modules=attention leaves them out"
        if given:
            out = "without lora.extra.target_parameters they would have none"
        said.append(f"{' and '.join(trained)} have adapters ({out})")
    if rest:
        stacked = {name for what in rest for name in names[what].values() if name}
        into = "lora.target_modules=all-linear"
        if stacked:
            into = f"lora.extra.target_parameters=[{','.join(sorted(stacked | set(given)))}]"
        said.append(f"{' and '.join(rest)} have none ({into} adds them)")
    return ", ".join(said)


def _names(model: PeftModel, number: int, width: int) -> dict[str, dict[str, str]]:
    """Map the paths of experts and routers to what ``target_parameters`` calls them.

    A linear layer has no name there: ``target_modules`` chooses it.
    """
    found: dict[str, dict[str, str]] = {EXPERTS: {}, ROUTERS: {}}
    if not number:
        return found
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        path, _, leaf = name.rpartition(".")
        cleaned, shape = _clean(path), tuple(shape_of(parameter))
        linear = hasattr(modules[path], "in_features")
        own = "" if linear else f"{cleaned.rpartition('.')[2]}.{leaf}"
        if re.search(r"\.experts(\.|$)", cleaned):
            if linear or len(shape) == 3:
                found[EXPERTS][f"{cleaned}.{leaf}" if own else cleaned] = own
        elif shape == (number, width):
            found[ROUTERS][f"{cleaned}.{leaf}" if own else cleaned] = own
    return {what: _with_modules(paths) for what, paths in found.items()}


def _with_modules(paths: dict[str, str]) -> dict[str, str]:
    """Key stacked parameters by their module, whose path is that of the adapter."""
    return {path.rpartition(".")[0] if own else path: own for path, own in paths.items()} | {
        path: own for path, own in paths.items() if own
    }


def _clean(path: str) -> str:
    """Return a module's path without the layers that PEFT put around it."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")
