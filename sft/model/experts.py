"""What the config of a mixture-of-experts model says of its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft.config.rules import typed
from sft.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.config.settings import Config

NUMBERS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


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
