"""What a merge refuses by rule: said before training begins, and by the merge itself."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sft.errors import MergeError
from sft.model.quantization import stored_method

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig
    from transformers import PreTrainedConfig

    from sft.config.settings import Config

logger = logging.getLogger("sft")

# Settings that cannot be expressed as weights, or that the merge does not support.
REFUSED = (
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora"),
    *("monteclora_config", "kasa_config"),
)
# These initialisations change the base before the first step, with data that only training had.
UNKNOWN_STARTS = ("corda", "lora_ga", "loftq", "pissa_niter")


def of_base(name: str, config: PreTrainedConfig) -> str | None:
    """Return why no adapter can be merged into a base; None if one can."""
    method = stored_method(config)
    return None if method is None else f"the files of {name} are already quantised ({method})"


def of_settings(adapter: str, config: PeftConfig) -> tuple[str, str] | None:
    """Return why an adapter with these settings cannot be merged, and a fix; None if it can."""
    for name in REFUSED:
        if getattr(config, name, None):
            reason = f"{adapter} uses {name}, which cannot be merged"
            return reason, "use the adapter without merging it"
    return None


def of_start(adapter: str, config: PeftConfig) -> tuple[str, str] | None:
    """Return why nothing records the base that an adapter belongs to, and a fix; None if it is."""
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith(UNKNOWN_STARTS):
        return (
            f"{adapter} has init_lora_weights={start}, which changed the base in a way that the "
            "adapter's files do not record",
            "save it with PEFT's path_initial_model_for_weight_conversion",
        )
    return None


def of_adapter(adapter: str, config: PeftConfig) -> tuple[str, str] | None:
    """Return why an adapter cannot be merged, and a fix; None if it can."""
    return of_settings(adapter, config) or of_start(adapter, config)


def say_before_training(
    config: Config, architecture: PreTrainedConfig, lora: LoraConfig | None
) -> None:
    """Log that the adapter of a run will not be mergeable.

    Raises:
        MergeError: It will not, and ``train.merge`` asks for a merge.
    """
    if lora is None:
        return
    if reason := of_base(str(config.model.name_or_path), architecture):
        fix = "model.name_or_path=THE_MODEL_THAT_WAS_QUANTISED"
    elif found := of_adapter("this run's adapter", lora):
        reason, fix = found
    else:
        return
    if config.train.merge:
        raise MergeError(f"train.merge=true: {reason}\n    fix: train.merge=false, or {fix}")
    logger.info("warning: sft merge will refuse this run's adapter: %s\n    fix: %s", reason, fix)
