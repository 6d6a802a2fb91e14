"""Refuse an option whose package is not installed, before torch is imported or data is read."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from sft.config.settings import Config
from sft.errors import Problem

# Beginnings of values of train.optim, and the package of each: what is imported, and what pip
# installs. The first that fits counts.
OPTIMIZERS = {
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_xla": ("torch_xla", "torch_xla"),
    "adamw_torch_npu_fused": ("torch_npu", "torch_npu"),
    "adamw_anyprecision": ("torchdistx", "torchdistx"),
    "galore_": ("galore_torch", "galore-torch"),
    "apollo_": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "adalomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    **dict.fromkeys(
        ("adamw_bnb", "adamw_8bit", "paged_", "ademamix", "lion_", "rmsprop_bnb"),
        ("bitsandbytes", "bitsandbytes"),
    ),
}
# Attention kernels: the packages of which each needs one, and what pip installs. Without the first
# package, Transformers loads the kernel from the hub with the package kernels.
ATTENTION = {
    "flash_attention_2": (("flash_attn", "kernels"), "flash-attn"),
    "flash_attention_3": (("flash_attn_interface", "kernels"), "kernels"),
}
HUB_KERNEL = (("kernels",), "kernels")  # of a name with a slash


def problems(config: Config) -> Iterator[Problem]:
    """Find the options whose package is not installed."""
    for setting, value, modules, pip in _needed(config):
        if not any(map(installed, modules)):
            names = " or ".join(dict.fromkeys((pip, *modules[1:])))
            yield Problem(f"{setting}={value}", f"needs the package {names}", f"pip install {pip}")


def installed(module: str) -> bool:
    """Return whether a package is installed; a folder with its name, such as wandb/, is none."""
    found = find_spec(module)
    return found is not None and found.origin is not None


def package_of(optim: str) -> tuple[str, str] | None:
    """Return the module and the package of an optimizer; None if PyTorch or Transformers has it."""
    return next((of for start, of in OPTIMIZERS.items() if optim.startswith(start)), None)


def _needed(config: Config) -> Iterator[tuple[str, Any, tuple[str, ...], str]]:
    """Yield the setting, its value, the modules of which it needs one, and what pip installs."""
    optim, kernel = config.train.optim, config.model.attn_implementation or ""
    if package := package_of(optim):
        yield "train.optim", optim, package[:1], package[1]
    if of := HUB_KERNEL if "/" in kernel else ATTENTION.get(kernel):
        yield "model.attn_implementation", kernel, *of
    if config.train.extra.get("use_liger_kernel"):
        yield "train.extra.use_liger_kernel", "true", ("liger_kernel",), "liger-kernel"
