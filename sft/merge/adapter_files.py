"""Read an adapter's folder, and refuse one that is damaged or cannot be merged."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from sft.checkpoint import weights
from sft.errors import MergeError
from sft.inference.card import ADAPTER_SETTINGS
from sft.merge import refusals

if TYPE_CHECKING:
    from peft import LoraConfig, PeftConfig

logger = logging.getLogger("sft")

WEIGHTS = "adapter_model.safetensors"


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
        found = weights.inspect([path])
    except SafetensorError as error:
        raise MergeError(f"{path} is damaged: {error}\n    fix: train or copy it again") from None
    if not found.shapes or "empty" in found.wrong:
        empty = found.wrong.get("empty", [])
        raise MergeError(f"{path} holds empty tensors {empty[:3]}\n    fix: train it again")
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


def parsed_config(folder: Path) -> PeftConfig:
    """Read an adapter's settings.

    Raises:
        MergeError: The file is damaged.
    """
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        path = folder / ADAPTER_SETTINGS
        raise MergeError(f"{path} is damaged: {error}\n    fix: train or copy it again") from error


def read_config(folder: Path) -> LoraConfig:
    """Read an adapter's settings, and refuse what cannot be merged.

    Raises:
        MergeError: It is not LoRA, or its effect cannot be written as a change of weights.
    """
    config = parsed_config(folder)
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise MergeError(f"{folder} is {kind}, not LoRA\n    fix: merge it in memory, with PEFT")
    if found := refusals.of_adapter(str(folder), config):
        raise MergeError("{}\n    fix: {}".format(*found))
    return config


def restarts(config: LoraConfig) -> bool:
    """Return whether the initialisation subtracts the adapter's initial product from the base."""
    return str(config.init_lora_weights).lower() in ("pissa", "olora")
