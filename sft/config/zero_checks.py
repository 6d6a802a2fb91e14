"""Check the keys and values of a DeepSpeed JSON and its overrides.

DeepSpeed refuses unknown keys inside ``zero_optimization`` late, and accepts unknown keys at the
top level silently; both are refused here, before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sft.config import upstream
from sft.config.paths import DS_CONFIG_DIR
from sft.config.settings import ZeroConfig
from sft.config.verdicts import DEEPSPEED_PASSED
from sft.config.verdicts import DEEPSPEED_REFUSED as REFUSED
from sft.config.zero import json_path, read
from sft.errors import Problem

# Sections whose legal keys DeepSpeed declares as fields: (file, class) in the deepspeed package.
SECTIONS = {
    "zero_optimization": ("runtime/zero/config.py", "DeepSpeedZeroConfig"),
    "zero_optimization.offload_optimizer": (
        "runtime/zero/offload_config.py",
        "DeepSpeedZeroOffloadOptimizerConfig",
    ),
    "zero_optimization.offload_param": (
        "runtime/zero/offload_config.py",
        "DeepSpeedZeroOffloadParamConfig",
    ),
    "zero_optimization.leaf_module": (
        "runtime/zero/leaf_module_config.py",
        "DeepSpeedZeroLeafModuleConfig",
    ),
    "bf16": ("runtime/precision_config.py", "DeepSpeedBF16Config"),
    "fp16": ("runtime/precision_config.py", "DeepSpeedFP16Config"),
    "comms_logger": ("comm/config.py", "CommsLoggerConfig"),
}
# Sections that are JSON objects.
OBJECTS = DEEPSPEED_PASSED.keys() - {""}
# Keys that must be "auto": the Trainer fills them in from these settings, so that both agree.
AUTO = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
}


def problems(zero: ZeroConfig, optim: str, trains_base: bool) -> Iterator[Problem]:
    """Find every problem of the JSON and its overrides.

    Args:
        zero: The section of the config.
        optim: ``train.optim``, which offloading may silently replace.
        trains_base: Whether the base model is trained, so that stage 3 must gather its weights to
            save them.
    """
    if zero.config is None:
        if zero.overrides:
            yield Problem(
                f"zero.overrides={zero.overrides}", "there is no JSON to override", "zero=stage2"
            )
        return
    path = json_path(zero)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in DS_CONFIG_DIR.glob("*.json")))
        rule = f"there is no file {path}; sft has {known}"
        yield Problem(f"zero.config={zero.config}", rule, "zero=stage2")
        return
    try:
        ds_config = read(zero)
    except ValueError as error:
        yield Problem(
            f"zero.config={zero.config}", f"is not valid JSON: {error}", f"correct {path}"
        )
        return
    assert ds_config is not None
    flat = {key for key, _ in _walk(zero.overrides)}
    for key, value in _walk(ds_config):
        origin = f"zero.overrides.{key}={value}" if key in flat else f"{path.name}: {key}={value}"
        yield from _key_problems(key, value, origin)
    yield from _combination_problems(ds_config, path.name, optim, trains_base)


def _walk(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")


def _legal_keys(section: str) -> frozenset[str] | None:
    passed = DEEPSPEED_PASSED.get(section)
    if passed is not None and section in SECTIONS:
        return passed & upstream.field_names("deepspeed", *SECTIONS[section])
    return passed


def _key_problems(key: str, value: Any, origin: str) -> Iterator[Problem]:
    section, _, name = key.rpartition(".")
    if key in REFUSED:
        yield Problem(origin, *REFUSED[key])
        return
    if any(section == refused or section.startswith(f"{refused}.") for refused in REFUSED):
        return
    legal = _legal_keys(section)
    if legal is None:
        above, _, own = section.rpartition(".")
        if own in (_legal_keys(above) or ()):  # otherwise the section itself is reported
            yield Problem(origin, f"{section} has no nested keys", "remove the key")
    elif name not in legal:
        rule = f"{section} has no key {name}" if section else f"sft knows no DeepSpeed key {name}"
        yield Problem(origin, rule, upstream.did_you_mean(name, legal))
    elif key in OBJECTS and not isinstance(value, dict | None):
        yield Problem(origin, "must be a JSON object", f"{key}.KEY=VALUE")
    elif key in AUTO and value != "auto":
        yield Problem(origin, f'must be "auto": {AUTO[key]} sets it', f"{AUTO[key]}=...")


def _combination_problems(
    ds_config: dict[str, Any], name: str, optim: str, trains_base: bool
) -> Iterator[Problem]:
    for key in AUTO:
        section, _, leaf = key.rpartition(".")
        node = ds_config.get(section) if section else ds_config
        if isinstance(node, dict) and leaf not in node:
            yield Problem(
                f"{name}: no {key}",
                f"DeepSpeed would use its own default instead of {AUTO[key]}",
                f'add "{leaf}": "auto"',
            )
    zero = ds_config.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") not in (1, 2, 3):
        yield Problem(f"{name}: zero_optimization", "stage must be 1, 2 or 3", "zero=stage2")
        return
    devices = {key: _device(zero, key) for key in ("offload_optimizer", "offload_param")}
    for key, device in devices.items():
        if device == "nvme" and not zero[key].get("nvme_path"):
            yield Problem(f"{name}: {key}", "device nvme needs nvme_path", "nvme_path: /DIR")
    if devices["offload_optimizer"] == "nvme":
        yield Problem(
            f"{name}: offload_optimizer",
            "a checkpoint of sft cannot include optimizer state on NVMe",
            "zero=stage3_offload, which stores it in CPU memory",
        )
    offloads = devices["offload_optimizer"] != "none"
    if offloads and optim not in ("adamw_torch", "adamw_torch_fused"):
        if ds_config.get("zero_force_ds_cpu_optimizer", True):
            yield Problem(
                f"train.optim={optim}",
                f"{name} offloads the optimizer, so DeepSpeed would use DeepSpeedCPUAdam",
                "+zero.overrides.zero_force_ds_cpu_optimizer=false",
            )
    if devices["offload_param"] != "none" and zero["stage"] != 3:
        yield Problem(f"{name}: offload_param", "needs ZeRO stage 3", "zero=stage3_offload")
    gathers = zero.get("stage3_gather_16bit_weights_on_model_save", False)
    if trains_base and zero["stage"] == 3 and not gathers:
        yield Problem(
            f"{name}: stage3_gather_16bit_weights_on_model_save={gathers}",
            "must be true: lora=none under ZeRO stage 3 gathers the weights to save them",
            "zero.overrides.zero_optimization.stage3_gather_16bit_weights_on_model_save=true",
        )


def _device(zero: dict[str, Any], key: str) -> str:
    section = zero.get(key)
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"
