"""Check the adapter's and the quantisation's settings, without the model's architecture."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from sft.config import zero
from sft.config.settings import Config
from sft.errors import Problem

HEADS = ("lm_head", "embed_out", "output_layer")


def lora(config: Config) -> Iterator[Problem]:
    """Check the settings of the adapter."""
    if not config.lora.enabled:
        if config.train.merge:
            yield Problem(
                "train.merge=true",
                "with lora=none there is no adapter to merge",
                "train.merge=false",
            )
        return
    if config.model.trainable is not None:
        yield Problem(
            f"model.trainable={config.model.trainable}",
            "has no effect with lora.enabled=true",
            "lora=none, or lora.modules_to_save=[NAME]",
        )
    targets = config.lora.target_modules
    named = [targets] if isinstance(targets, str) else targets
    if not targets or not isinstance(named, list) or not all(isinstance(x, str) for x in named):
        yield Problem(
            f"lora.target_modules={targets}",
            "must be 'attention', 'all-linear', a regular expression, or a list of module names",
            "lora.target_modules=all-linear",
        )
        return
    for head in HEADS:
        if any(item == head or item.endswith(f".{head}") for item in named):
            yield head_targeted(targets, head)
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            yield Problem(
                f"lora.target_modules={targets}",
                f"is not a regular expression: {error}",
                "lora.target_modules=all-linear",
            )
    yield from _initialisation(config)


def head_targeted(targets: Any, path: str) -> Problem:
    """Return the problem of an adapter on the LM head.

    Args:
        targets: ``lora.target_modules``.
        path: The head's name or path in the model.
    """
    return Problem(
        f"lora.target_modules={targets}",
        f"LoRA on {path} would never train: the loss reads the head's weight directly",
        f"lora.modules_to_save=[{path.rpartition('.')[2]}]",
    )


def _initialisation(config: Config) -> Iterator[Problem]:
    """Check that the adapter's first values, and the variant of LoRA, can be trained and saved."""
    section = config.lora
    if not config.model.pretrained:
        yield Problem(
            "model.pretrained=false",
            "the adapter would be trained on random weights that are not saved with it",
            "lora=none",
        )
    init = section.extra.get("init_lora_weights", True)
    if isinstance(init, str) and init.startswith("pissa_niter"):
        yield Problem(
            f"lora.extra.init_lora_weights={init}",
            "changes the base weights at random: a loaded adapter gets a different base",
            "lora.extra.init_lora_weights=pissa",
        )
    if init in ("eva", "corda", "lora_ga", "loftq"):
        yield Problem(
            f"lora.extra.init_lora_weights={init}",
            "needs a preprocessing pass that sft does not run; PEFT would not warn",
            "lora.extra.init_lora_weights=true",
        )
    quantized = config.quantization.load_in_4bit or config.quantization.load_in_8bit
    if quantized and isinstance(init, str) and init.startswith(("pissa", "olora", "orthogonal")):
        yield Problem(
            f"lora.extra.init_lora_weights={init}",
            "changes the base weights, which cannot be changed once they are quantised",
            "quantization=none",
        )
    if init == "mica" and zero.stage(_json(config)) == 3:
        yield Problem(
            "lora.extra.init_lora_weights=mica",
            "saving under ZeRO-3 omits the frozen tensors of the adapter",
            "zero=stage2",
        )
    if section.use_dora and section.extra.get("use_qalora"):
        yield Problem(
            "lora.use_dora=true",
            "cannot be combined with lora.extra.use_qalora",
            "lora.use_dora=false",
        )


def quantization(config: Config) -> Iterator[Problem]:
    """Check the settings of the quantised base model."""
    section = config.quantization
    bits = [key for key in ("load_in_4bit", "load_in_8bit") if getattr(section, key)]
    if not bits:
        return
    if len(bits) == 2:
        yield Problem(
            "quantization.load_in_4bit=true",
            "cannot be combined with quantization.load_in_8bit=true",
            "quantization=nf4",
        )
    if not config.lora.enabled:
        yield Problem("lora=none", "quantised weights cannot be trained", "lora=all-linear")


def _json(config: Config) -> dict[str, Any] | None:
    try:
        return zero.read(config.zero)
    except (OSError, ValueError):
        return None  # zero_checks reports the error
