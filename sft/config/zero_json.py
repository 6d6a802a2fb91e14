"""Read a DeepSpeed JSON, also one that was written for another tool.

Old and alternative names are replaced by those that Transformers reads. Keys that contradict
settings of the run are replaced by these settings, and keys without effect are left out; each of
them has a line that says so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.config import upstream, verdicts
from sft.config.paths import DS_CONFIG_DIR
from sft.config.plain import read_json
from sft.config.rules import typed, written
from sft.config.settings import Config, ZeroConfig
from sft.process import world_size

ZERO = ("runtime/zero/config.py", "DeepSpeedZeroConfig")
GATHER = "stage3_gather_16bit_weights_on_model_save"
OFFLOADS = ("offload_optimizer", "offload_param")
# Optimizers of Transformers that DeepSpeed replaces by its own of the same kind if it offloads.
ADAMW = ("adamw_torch", "adamw_torch_fused")
# Arguments of the JSON's optimizer and scheduler, and the settings that decide them.
ARGUMENTS = {
    "lr": ("train.learning_rate",),
    "weight_decay": ("train.weight_decay",),
    "betas": ("train.extra.adam_beta1", "train.extra.adam_beta2"),
    "eps": ("train.extra.adam_epsilon",),
    "warmup_max_lr": ("train.learning_rate",),
    "warmup_num_steps": ("train.warmup_steps",),
}
# Defaults of Transformers for entries of train.extra.
DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def json_path(zero: ZeroConfig) -> Path:
    """Return the path of the JSON: ``zero.config`` is a path, or a file name in ds_config/."""
    assert zero.config is not None
    path = Path(zero.config)
    return path if path.is_absolute() or path.is_file() else DS_CONFIG_DIR / zero.config


def given(zero: ZeroConfig) -> dict[str, Any]:
    """Read the JSON with the overrides merged in, under DeepSpeed's present names.

    Raises:
        ValueError: The file cannot be read, or is not valid JSON.
    """
    ds_config = read_json(json_path(zero), finite=False)
    if not isinstance(ds_config, dict):
        raise ValueError("its top level must be an object")
    try:
        return merged(renamed(ds_config), renamed(zero.overrides))
    except RecursionError as error:
        raise ValueError("its sections are nested too deeply") from error


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested mappings; the second wins, and a null in it or in the first removes a key.

    The result is a copy, because Transformers and DeepSpeed write into what they are given.
    """
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[key] = merged(below, value) if both and below is not None else value
    return copy.deepcopy(
        {key: _filled(value) for key, value in result.items() if value is not None}
    )


def _filled(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _filled(item) for key, item in value.items() if item is not None}


def renamed(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Replace old and alternative names, which DeepSpeed reads and Transformers does not.

    Where both names are given, the present one counts.
    """
    result = dict(ds_config)
    if "bfloat16" in result:
        old = result.pop("bfloat16")
        result.setdefault("bf16", old)
    section = result.get("zero_optimization")
    if isinstance(section, bool):  # the oldest form: true is stage 1
        section = {"stage": int(section)}
    if not isinstance(section, dict):
        return result
    section = dict(section)
    names = {"stage3_gather_fp16_weights_on_model_save": GATHER}
    for name, alias in (names | upstream.field_aliases("deepspeed", *ZERO)).items():
        if name in section:
            value = section.pop(name)
            section.setdefault(alias, value)
    pinned = section.pop("cpu_offload_use_pin_memory", None)
    for name, old_name in zip(OFFLOADS, ("cpu_offload", "cpu_offload_param"), strict=True):
        if old_name in section:
            offload = {"device": "cpu"} if section.pop(old_name) else None
            section.setdefault(name, offload)
        if pinned is not None and isinstance(section.get(name), dict):
            section[name] = {"pin_memory": pinned, **section[name]}
    return {**result, "zero_optimization": section}


def is_off(value: Any) -> bool:
    """Return whether a key or section is switched off, so that it can be left out unsaid."""
    if isinstance(value, dict):
        return value.get("enabled") is False or all(map(is_off, value.values()))
    return value in (None, False, "auto")


def is_comment(key: str) -> bool:
    """Return whether a key of the top level is how people write a comment into JSON."""
    return key.startswith(("_", "#", "//", "$")) or key.lower() in ("comment", "comments")


def settled(
    ds_config: dict[str, Any], config: Config, precision: str
) -> tuple[dict[str, Any], list[str]]:
    """Let the settings of the run replace what the JSON says of the same things.

    Args:
        ds_config: See ``given``.
        config: The run's config, already checked.
        precision: fp32, bf16 or fp16, as the run computes.

    Returns:
        The configuration for the Trainer, and a line for each key whose value is not used.
    """
    assert config.zero.config is not None
    name = Path(config.zero.config).name
    result, lines = copy.deepcopy(ds_config), []
    for key in (*result, *(f"zero_optimization.{k}" for k in result.get("zero_optimization", ()))):
        dropped = verdicts.DEEPSPEED_DROPPED.get(key)
        if dropped is None and (is_comment(key) or key in verdicts.DEEPSPEED_REFUSED):
            _take(result, key)
        elif dropped is not None and not is_off(_take(result, key)):
            why, instead = dropped
            also = f"; {instead} is the setting" if instead else ""
            lines.append(f"{name}: {key} is not used: {why}{also}")
    for key, ours in _decisions(config, precision).items():
        value = _take(result, key)
        if value not in (None, "auto", ours):
            setting = verdicts.DEEPSPEED_DECIDED[key]
            decides = written(
                setting, precision if setting == "precision" else _of(config, setting)
            )
            lines.append(f"{name} says {key}={typed(value)}; {decides} decides")
        _put(result, key, "auto")
    lines += [f"{name} says {line}" for line in _optimizer_lines(result, config)]
    lines += _zero_lines(result, config, name)
    return result, lines


def _decisions(config: Config, precision: str) -> dict[str, Any]:
    """Map keys to the values that the Trainer fills in for ``auto``."""
    train = config.train
    per_forward = train.per_device_train_batch_size * world_size()
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.per_device_train_batch_size,
        "gradient_accumulation_steps": train.global_batch_size // per_forward,
        "gradient_clipping": train.max_grad_norm,
        "bf16.enabled": precision == "bf16",
        "fp16.enabled": precision == "fp16",
    }


def _optimizer_lines(ds_config: dict[str, Any], config: Config) -> Iterator[str]:
    """Leave out the sections optimizer and scheduler; say their values and those of the run."""
    for key in ("optimizer", "scheduler"):
        section = ds_config.pop(key, None)
        if not isinstance(section, dict) or not section:
            continue
        params = section.get("params")
        params = params if isinstance(params, dict) else {}
        said = {name: value for name, value in params.items() if value not in (None, "auto")}
        settings = [verdicts.DEEPSPEED_DECIDED[key]]
        settings += [setting for name in said for setting in ARGUMENTS.get(name, ())]
        ours = ", ".join(written(setting, _of(config, setting)) for setting in settings)
        theirs = " ".join([f"{key}={section.get('type')}", *(f"{k}={v}" for k, v in said.items())])
        yield f"{theirs}; {ours} decide{'s' if len(settings) == 1 else ''}"


def _zero_lines(ds_config: dict[str, Any], config: Config, name: str) -> Iterator[str]:
    """Keep the optimizer under offloading, and gather the weights that lora=none saves."""
    section = ds_config.get("zero_optimization", {})
    force, optim = "zero_force_ds_cpu_optimizer", config.train.optim
    if device(section, "offload_optimizer") != "none" and optim not in ADAMW:
        if ds_config.get(force, True):
            yield f"{name} offloads the optimizer: {force}=false keeps train.optim={optim}"
        ds_config[force] = False
    if section.get("stage") == 3 and not config.lora.enabled:
        if section.get(GATHER) is False:
            yield f"{name} says {GATHER}=false; it is true, because lora=none saves the weights"
        section[GATHER] = True


def device(section: Any, key: str) -> str:
    """Return the device of an offload section of ``zero_optimization``."""
    offload = section.get(key) if isinstance(section, dict) else None
    return str(offload.get("device", "none")) if isinstance(offload, dict) else "none"


def _of(config: Config, setting: str) -> Any:
    node: Any = config
    for part in setting.split("."):
        node = node.get(part, DEFAULTS.get(part)) if isinstance(node, dict) else getattr(node, part)
    return node


def _take(ds_config: dict[str, Any], key: str) -> Any:
    """Remove a key by its dotted name, and return its value; None if there is none."""
    section, _, leaf = key.rpartition(".")
    node = ds_config.get(section) if section else ds_config
    return node.pop(leaf, None) if isinstance(node, dict) else None


def _put(ds_config: dict[str, Any], key: str, value: Any) -> None:
    section, _, leaf = key.rpartition(".")
    node = ds_config.setdefault(section, {}) if section else ds_config
    node[leaf] = value
