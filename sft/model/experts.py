"""Say whether the adapter trains the experts and routers of a mixture-of-experts model.

PEFT adapts them under ``all-linear`` in some architectures, such as Mixtral and Qwen3-MoE, and not
in others, such as GPT-OSS and Granite-MoE: there they are stacked parameters, not linear layers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sft.checkpoint.sharded import shape_of
from sft.config.rules import typed
from sft.errors import ConfigError, Problem

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from sft.config.settings import Config

NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS, ROUTERS = "experts", "routers"


def number_of(config: object) -> int:
    """Return the number of experts by the text model's config; 0 if it has none."""
    found = (getattr(config, name, None) for name in NUMBERS)
    return next((number for number in found if isinstance(number, int) and number > 1), 0)


def check_balance(config: Config, architecture: PreTrainedModel) -> None:
    """Check that TRL can compute the loss that balances the experts, if it is set or the default.

    Raises:
        ConfigError: The model has no such loss, or TRL does not find its number of experts.
    """
    name = "train.extra.router_aux_loss_coef"
    text = architecture.config.get_text_config()
    given = config.train.extra.get("router_aux_loss_coef")
    if given and not hasattr(text, "output_router_logits"):
        rule = f"{type(architecture).__name__} returns no router logits, which this loss needs"
        raise ConfigError([Problem(f"{name}={given}", rule, f"remove {name}")])
    default = getattr(text, "router_aux_loss_coef", 0)
    balances = hasattr(text, "output_router_logits") and (default if given is None else given)
    if balances and not any(hasattr(text, number) for number in NUMBERS[:2]):
        rule = "TRL cannot balance the experts of this model: its config has no num_experts"
        raise ConfigError([Problem(f"{name}={typed(given)}", rule, f"{name}=0")])


def describe(model: PeftModel) -> str:
    """Say which experts and routers have adapters, and the setting that changes it.

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
    said = []
    if trained:
        out = "lora.target_modules=attention leaves them out"
        said.append(f"{' and '.join(trained)} have adapters ({out})")
    if rest:
        stacked = {name for what in rest for name in names[what].values() if name}
        into = "lora.target_modules=all-linear"
        if stacked:
            into = f"lora.extra.target_parameters=[{','.join(sorted(stacked))}]"
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
