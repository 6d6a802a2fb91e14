"""Refuse an option whose package is not installed, before torch is imported or data is read."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sft.config import upstream
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
# Trackers of ``tracker=NAME``, and the packages that each needs.
TRACKERS: dict[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    "trackio": ("trackio",),
}
# Other trackers, which Transformers logs to (train.extra.report_to), and the packages of which each
# needs one.
REPORTS: dict[str, tuple[str, ...]] = {
    "none": (),
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": ("kubeflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
}
DRIVER = Path("/proc/driver/nvidia/gpus")  # a folder for each GPU
NEEDS = "needs the package "


def problems(config: Config) -> Iterator[Problem]:
    """Find the options whose package is not installed."""
    for setting, value, modules, pip in _needed(config):
        if not any(map(installed, modules)):
            names = " or ".join(dict.fromkeys((pip, *modules[1:])))
            yield Problem(f"{setting}={value}", f"{NEEDS}{names}", f"pip install {pip}")
    for name in TRACKERS:
        if getattr(config.tracker, name):
            yield from tracker_problems(name)
    for name in _reports(config):
        given = f"train.extra.report_to={name}"
        if name in TRACKERS:
            rule = "Transformers would log the steps of a resumed run twice; sft logs them itself"
            yield Problem(given, rule, f"tracker={name}")
        elif name == "all":
            yield Problem(given, "a tracker must be named", f"tracker=[{','.join(TRACKERS)}]")
        elif name not in REPORTS:
            hint = upstream.did_you_mean(name, REPORTS)
            yield Problem(given, "there is no such tracker", hint)


def tracker_problems(name: str) -> Iterator[Problem]:
    """Check the name of a tracker, and that its packages are installed."""
    if name not in TRACKERS:
        rule = f"must be one of {', '.join(TRACKERS)}"
        yield Problem(f"tracker={name}", rule, "tracker=tensorboard")
    elif absent := [module for module in TRACKERS[name] if not installed(module)]:
        rule = f"{NEEDS}{' and '.join(absent)}"
        yield Problem(f"tracker={name}", rule, f"pip install 'sft[{name}]'")


def is_missing(problem: Problem) -> bool:
    """Return whether a problem is a package that is missing here; the settings may be right."""
    return problem.rule.startswith(NEEDS)


def installed(module: str) -> bool:
    """Return whether a package is installed; a folder with its name, such as wandb/, is none."""
    found = find_spec(module)
    return found is not None and found.origin is not None


def has_gpu(environ: Mapping[str, str] = os.environ) -> bool:
    """Return whether the run will use a GPU of NVIDIA; asks the driver's files, not torch."""
    hidden = environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    return not hidden and any(DRIVER.glob("*"))


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
    for name in _reports(config):
        if modules := REPORTS.get(name):
            yield "train.extra.report_to", name, modules, modules[0]
    if config.profile.system and has_gpu():
        yield "profile.system", "true", ("pynvml",), "nvidia-ml-py"
    if config.train.extra.get("use_liger_kernel"):
        yield "train.extra.use_liger_kernel", "true", ("liger_kernel",), "liger-kernel"


def _reports(config: Config) -> list[str]:
    given = config.train.extra.get("report_to", "none")
    return [str(name) for name in (given if isinstance(given, list) else [given])]
