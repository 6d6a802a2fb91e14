"""Whether training adds the loss that balances the load of experts."""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any

from sft.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.config.settings import Config

COEFFICIENT = "router_aux_loss_coef"
EXPERT_NAMES = {
    "num_experts": ("num_local_experts", "n_routed_experts", "moe_num_experts"),
    "num_experts_per_tok": ("moe_k", "moe_topk", "num_experts_per_token"),
}


def balances(config: Config, architecture: PreTrainedModel) -> bool:
    """Return whether training adds the loss that balances the load of experts.

    TRL adds Mixtral's loss with the coefficient of ``train.extra`` or of the model's config. This
    holds for architectures whose own forward pass adds it too, and whose routers exist: a config
    may have the fields without any layer of experts.

    Args:
        config: The run's config.
        architecture: The model, with or without weights.

    Raises:
        ConfigError: A coefficient is set, and the architecture has no such loss.
    """
    text = architecture.config.get_text_config()
    asked = config.train.extra.get(COEFFICIENT)
    coefficient = getattr(text, COEFFICIENT, None) if asked is None else asked
    if not coefficient or not hasattr(text, "output_router_logits"):
        return bool(coefficient) and asked is not None  # TRL refuses it by name
    if not _has_balancing_loss(architecture):
        if asked:
            rule = f"{architecture.config.model_type} adds no loss that balances its experts"
            problem = Problem(f"train.extra.{COEFFICIENT}={asked}", rule, "leave it out")
            raise ConfigError([problem])
        return False
    # TRL reads the number of experts by Mixtral's names.
    for wanted, others in EXPERT_NAMES.items():
        other = next((each for each in others if getattr(text, each, None)), None)
        if not hasattr(text, wanted) and other is not None:
            known = type(text).attribute_map
            type(text).attribute_map = {**known, wanted: known.get(other, other)}
    return True


def _has_balancing_loss(architecture: PreTrainedModel) -> bool:
    """Return whether the model's own forward pass adds Mixtral's loss to that of the labels."""
    function = getattr(sys.modules[type(architecture).__module__], "load_balancing_loss_func", None)
    if function is None or "top_k" not in list(inspect.signature(function).parameters)[:3]:
        return False
    recorded: Any = {}
    for module in architecture.modules():
        recorded = recorded or (getattr(module, "_can_record_outputs", None) or {}).get(
            "router_logits"
        )
    recorders = recorded if isinstance(recorded, list) else [recorded]
    routers = tuple(
        kind
        for kind in (getattr(each, "target_class", each) for each in recorders)
        if isinstance(kind, type)
    )
    return any(isinstance(module, routers) for module in architecture.modules())
