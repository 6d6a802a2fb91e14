"""Check the keys and values of a DeepSpeed JSON and its overrides.

DeepSpeed refuses unknown keys inside ``zero_optimization`` late, and accepts unknown keys at the
top level silently; both are refused here, before torch is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sft.config import upstream, zero_json
from sft.config.paths import DS_CONFIG_DIR
from sft.config.settings import TrainConfig, ZeroConfig
from sft.config.verdicts import (
    DEEPSPEED_DECIDED,
    DEEPSPEED_DROPPED,
    DEEPSPEED_PASSED,
    DEEPSPEED_REFUSED,
)
from sft.config.zero_json import ADAMW, GATHER, OFFLOADS, device, is_off
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
# Optimizers of DeepSpeed that are AdamW, and those that Transformers has under another name. In
# place of any other one, AdamW would train something else without being asked for.
ADAM = ("adam", "adamw")
SAME = {
    name: f"train.optim={ours}"
    for name, ours in (("adagrad", "adagrad"), ("lion", "lion_32bit"), ("sgd", "sgd"))
}
LONGEST = 80  # characters of a value that is shown
NULL = "zero.overrides.{}=null"  # removes a key


def problems(zero: ZeroConfig, optim: str, trains_base: bool) -> Iterator[Problem]:
    """Find every problem of the JSON and its overrides.

    A file may come from another tool: what a setting of the run decides, and what has no effect,
    is no problem in it, but is one in the overrides, which are written for this run.

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
    path = zero_json.json_path(zero)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in DS_CONFIG_DIR.glob("*.json")))
        rule = f"there is no file {path}; sft has {known}"
        yield Problem(f"zero.config={zero.config}", rule, "zero=stage2")
        return
    try:
        ds_config = zero_json.given(zero)
    except ValueError as error:
        yield Problem(
            f"zero.config={zero.config}", f"is not valid JSON: {error}", f"correct {path}"
        )
        return
    over = dict(_walk(zero_json.renamed(zero.overrides)))
    for key, value in _walk(ds_config):
        yield from _key_problems(key, value, "" if key in over else path.name)
    yield from _optimizer_problems(ds_config, over, path.name, optim)
    yield from _stage_problems(ds_config, over, path.name, trains_base)


def _walk(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        yield prefix + key, value
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")


def _legal_keys(section: str) -> frozenset[str] | None:
    passed = DEEPSPEED_PASSED.get(section)
    if passed is None:
        return None
    if section in SECTIONS:
        return passed & upstream.field_names("deepspeed", *SECTIONS[section])
    return passed | DEEPSPEED_DECIDED.keys() if section == "" else passed


def _key_problems(key: str, value: Any, file: str) -> Iterator[Problem]:
    """Check one key; ``file`` is the name of the JSON, or empty for a key of the overrides."""
    section, _, name = key.rpartition(".")
    shown = str(value) if len(str(value)) <= LONGEST else f"{str(value)[:LONGEST]}..."
    origin = f"{file}: {key}={shown}" if file else f"zero.overrides.{key}={shown}"
    remove = NULL.format(key) if file else "remove it"
    if key in DEEPSPEED_REFUSED:
        if not is_off(value):
            yield Problem(origin, DEEPSPEED_REFUSED[key], remove)
        return
    if key in DEEPSPEED_DROPPED or key in DEEPSPEED_DECIDED:
        if not file and not is_off(value):
            yield _of_override(key, value, origin)
        return
    known = (*DEEPSPEED_REFUSED, *DEEPSPEED_DROPPED, "optimizer", "scheduler")
    if any(section == one or section.startswith(f"{one}.") for one in known):
        return
    if zero_json.is_comment(key.partition(".")[0]):
        return
    legal = _legal_keys(section)
    if legal is None:
        above, _, own = section.rpartition(".")
        if own in (_legal_keys(above) or ()):  # otherwise the section itself is reported
            yield Problem(origin, f"{section} has no nested keys", remove)
    elif name not in legal:
        if section or not is_off(value):
            rule = (
                f"{section} has no key {name}" if section else f"sft knows no DeepSpeed key {name}"
            )
            hint = upstream.did_you_mean(name, legal)
            yield Problem(origin, rule, hint if hint.startswith("did") else remove)
    elif key in OBJECTS and not isinstance(value, dict | None):
        if key == "zero_optimization":
            remove = f"zero=stage{value if str(value) in ('1', '2', '3') else 2}"
        elif name in OFFLOADS and value in (True, "cpu"):
            remove = f"zero.overrides.{key}.device=cpu"
        yield Problem(origin, "must be a JSON object", remove if file else f"{key}.KEY=VALUE")


def _of_override(key: str, value: Any, origin: str) -> Problem:
    """Return the problem of an override that a setting decides, or that has no effect."""
    if key in DEEPSPEED_DROPPED:
        why, instead = DEEPSPEED_DROPPED[key]
        fix = f"{instead}, without zero.overrides.{key}" if instead else "remove it"
        return Problem(origin, f"has no effect: {why}", fix)
    setting = DEEPSPEED_DECIDED[key]
    ours = "..." if isinstance(value, dict) or key == "gradient_accumulation_steps" else value
    if setting == "precision":
        ours = key.partition(".")[0] if value is True else "fp32"
    return Problem(
        origin, f"{setting} decides it", f"{setting}={ours}, without zero.overrides.{key}"
    )


def _optimizer_problems(
    ds_config: dict[str, Any], over: dict[str, Any], name: str, optim: str
) -> Iterator[Problem]:
    """Refuse an optimizer that nothing in the run replaces, or that offloading would replace."""
    section = ds_config.get("optimizer")
    if isinstance(section, dict) and "optimizer" not in over and optim == TrainConfig().optim:
        kind = str(section.get("type", "AdamW"))
        if kind.lower() not in ADAM:
            rule = f"Transformers makes the optimizer, and train.optim={optim} is a different one"
            fix = SAME.get(kind.lower(), NULL.format("optimizer"))
            yield Problem(f"{name}: optimizer={kind}", rule, fix)
    force = "zero_force_ds_cpu_optimizer"
    offloads = device(ds_config.get("zero_optimization", {}), "offload_optimizer") != "none"
    if offloads and optim not in ADAMW and over.get(force):
        yield Problem(
            f"train.optim={optim}",
            f"{name} offloads the optimizer, so DeepSpeed would use DeepSpeedCPUAdam",
            f"zero.overrides.{force}=false",
        )


def _stage_problems(
    ds_config: dict[str, Any], over: dict[str, Any], name: str, trains_base: bool
) -> Iterator[Problem]:
    zero = ds_config.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        rule = "stage must be 1, 2 or 3, or 0 for plain DDP"
        yield Problem(f"{name}: zero_optimization", rule, "zero=stage2")
        return
    stage = zero.get("stage", 0)
    key = "zero.overrides.zero_optimization"
    devices = {offload: device(zero, offload) for offload in OFFLOADS}
    if stage and devices["offload_optimizer"] == "nvme":
        yield Problem(
            f"{name}: offload_optimizer",
            "a checkpoint of sft cannot include optimizer state on NVMe",
            f"{key}.offload_optimizer.device=cpu",
        )
    if stage in (1, 2) and devices["offload_param"] != "none":
        rule = f"needs ZeRO stage 3, and the stage is {stage}"
        yield Problem(f"{name}: offload_param", rule, f"{key}.offload_param=null")
    elif stage == 3 and devices["offload_param"] == "nvme":
        if not zero["offload_param"].get("nvme_path"):
            rule = "device nvme needs nvme_path, a folder on the NVMe disk"
            yield Problem(f"{name}: offload_param", rule, f"{key}.offload_param.device=cpu")
    if trains_base and stage == 3 and over.get(f"zero_optimization.{GATHER}") is False:
        yield Problem(
            f"{name}: {GATHER}=False",
            "must be true: lora=none under ZeRO stage 3 gathers the weights to save them",
            f"{key}.{GATHER}=true",
        )
