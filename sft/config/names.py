"""Map names that other libraries and tools use to our settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft.config import upstream, verdicts
from sft.config.rules import declared, example_of, written
from sft.config.saved import escaped
from sft.config.settings import Config
from sft.errors import Problem


def _examples(fact: str, section: str = "") -> dict[str, str]:
    """Map the names that settings declare as ``decides`` or ``called`` to those settings."""
    return {
        name.removeprefix(section): example_of(key, item)
        for key, item in declared(Config)
        for name in item.metadata[fact]
        if name.startswith(section)
    }


# Fields of upstream classes that ``extra`` refuses, and what to do instead. A field that one of our
# settings decides is declared with that setting.
TRAIN_OWNED = _examples("decides", "train.") | verdicts.TRAIN_OWNED
LORA_OWNED = _examples("decides", "lora.") | verdicts.LORA_OWNED
EVAL_FRACTION = ("val_ratio", "val_size", "val_set_size", "test_size")
# Names of other tools and of older releases, and what to write instead. A name that belongs to one
# setting is declared with that setting.
RENAMED = _examples("called") | {
    "group_by_length": "remove it: train.padding_free joins rows of any length without padding",
    **dict.fromkeys(("train_ratio", *EVAL_FRACTION), "dataset.eval_fraction=0.05"),
    "cache_dir": "HF_HOME=DIR in the environment, for the hub's files; SFT_CACHE_DIR=DIR for data",
    "fp16": "precision=fp16",
    "tf32": "train.extra.tf32=true",
}


# Names with the same meaning as a setting, which takes their values too.
CALLED = {name: key for key, item in declared(Config) for name in item.metadata["called"]}
CALLED |= dict.fromkeys(EVAL_FRACTION, "dataset.eval_fraction")
CALLED |= {
    **dict.fromkeys(("max_seq_len", "block_size", "model_max_length"), "dataset.max_length"),
    **dict.fromkeys(("base_model", "base_model_name_or_path", "model_id"), "model.name_or_path"),
    **dict.fromkeys(("datasets", "dataset_dir", "dataset_name", "data_path"), "dataset.path"),
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir"), "lora.init_from"),
    **dict.fromkeys(("lora_target", "lora_target_modules"), "lora.target_modules"),
    "optimizer": "train.optim",
    **dict.fromkeys(("system_prompt", "default_system"), "template.system"),
    "attn_impl": "model.attn_implementation",
}
# Names whose values mean a value of ours; other values have no such fix.
BY_VALUE = {
    ("bf16", "False"): "precision=fp32",
    ("fp16", "False"): "precision=fp32",
    **{
        (name, value): f"dataset.packing={ours}"
        for name in ("packing", "sample_packing")
        for value, ours in (("True", "bfd"), ("False", "none"))
    },
    ("train_on_inputs", "False"): "remove it: the completion or the assistant's turns are trained",
    ("train_on_inputs", "True"): "template.train_on=all",
    ("quantization_bit", "4"): "quantization=nf4",
    ("quantization_bit", "8"): "quantization=int8",
    ("flash_attention", "True"): "model.attn_implementation=flash_attention_2",
    ("lora_target_linear", "True"): "lora=all-linear",
    ("train_type", "lora"): "remove it: sft trains LoRA adapters",
    ("train_type", "full"): "lora=none train=full",
    **{("deepspeed", f"zero{stage}"): f"zero=stage{stage}" for stage in (1, 2, 3)},
}
OTHER_UNITS = {"gradient_accumulation_steps"}  # names whose values mean something else here

# Transformers' names of trackers, and the packages of which each needs one.
TRACKERS: dict[str, tuple[str, ...]] = {
    "none": (),
    "all": (),
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": ("kubeflow",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}


# Of each section with ``extra``: fields that it refuses, with a fix or without, and all fields.
SECTIONS: dict[str, tuple[dict[str, str], dict[str, str], Callable[[], frozenset[str]]]] = {
    "train": (TRAIN_OWNED, verdicts.TRAIN_REFUSED, upstream.sft_config_names),
    "lora": (LORA_OWNED, verdicts.LORA_REFUSED, upstream.lora_config_names),
    "quantization": ({}, {}, upstream.bnb_config_names),
}


def extra_problems(config: Config) -> Iterator[Problem]:
    """Check the sections' ``extra``: refuse unknown names and names that our settings decide."""
    for name, (owned, refused, legal) in SECTIONS.items():
        section = getattr(config, name)
        own_fields = set(section.__dataclass_fields__)
        for key, value in section.extra.items():
            given = f"{name}.extra.{key}={value}"
            if key in own_fields:
                yield Problem(given, "has a setting of its own", f"{name}.{key}={value}")
            elif key in owned:
                yield Problem(given, "is set by sft itself", owned[key])
            elif key in refused:
                yield Problem(given, f"has no effect: {refused[key]}", "remove it")
            elif key in RENAMED and key not in legal():
                yield Problem(given, f"the installed version has no setting {key}", RENAMED[key])
            elif key not in legal():
                yield Problem(
                    given,
                    f"the installed version has no setting {key}",
                    upstream.did_you_mean(key, legal() - owned.keys() - refused.keys()),
                )
    yield from _report_problems(config.train.extra.get("report_to", "none"))


def _report_problems(value: Any) -> Iterator[Problem]:
    """Refuse a tracker that is unknown or whose package is not installed."""
    for name in value if isinstance(value, list) else [value]:
        packages = TRACKERS.get(str(name))
        if packages is None:
            hint = upstream.did_you_mean(str(name), TRACKERS)
            yield Problem(f"train.extra.report_to={name}", "there is no such tracker", hint)
        elif packages and not any(find_spec(package) for package in packages):
            rule = f"the package {packages[0]} is not installed"
            yield Problem(f"train.extra.report_to={name}", rule, f"pip install {packages[0]}")


def _with_value(key: str, value: Any, schema: Any) -> str | None:
    """Return a setting with a value that it takes; None if it does not take the value."""
    item = dict(declared(schema)).get(key)
    if item is None or not isinstance(value, str | int | float):
        return None
    typed = OmegaConf.structured(schema)
    try:
        OmegaConf.update(typed, key, escaped(value))
    except OmegaConfBaseException:
        return None
    taken, rule = OmegaConf.select(typed, key), item.metadata["rule"]
    return written(key, value) if rule is None or rule.holds(taken) else None


def suggest(path: str, schema: Any, value: Any = None) -> str:
    """Suggest the setting that was probably meant, in any section.

    Args:
        path: The unknown setting.
        schema: The settings of the command.
        value: The value that it was given; the suggestion keeps it where that is sure to be right.
    """
    section, _, leaf = path.rpartition(".")
    settings = dict(declared(schema))
    if schema is Config and path not in settings and (leaf, str(value)) in BY_VALUE:
        return BY_VALUE[leaf, str(value)]
    if CALLED.get(leaf) in settings and leaf not in OTHER_UNITS:
        example = RENAMED.get(leaf) or f"did you mean {CALLED[leaf]}?"
        kept = _with_value(CALLED[leaf], value, schema)
        return example if kept is None else kept + "".join(example.partition(" (")[1:])
    if leaf in RENAMED and (schema is Config or leaf not in CALLED):
        return RENAMED[leaf]
    paths = list(settings)
    paths += sorted({path.rpartition(".")[0] for path in paths} - {""})  # the sections
    same_leaf = [known for known in paths if known.rpartition(".")[2] == leaf]
    if same_leaf:
        kept = _with_value(same_leaf[0], value, schema) if len(same_leaf) == 1 else None
        return kept or f"did you mean {same_leaf[0]}?"
    for place in SECTIONS if schema is Config and not section else [section]:
        owned, refused, legal = SECTIONS.get(place, ({}, {}, frozenset))
        if leaf in owned:
            return owned[leaf]
        if leaf in refused:
            return "remove it"
        if leaf in legal():
            is_plain = isinstance(value, str | int | float)
            return written(f"{place}.extra.{leaf}", value if is_plain else "...")
    siblings = [known.rpartition(".")[2] for known in paths if known.startswith(f"{section}.")]
    hint = upstream.did_you_mean(leaf, siblings)
    if hint.startswith("did"):
        return hint.replace("mean ", f"mean {section}." if section else "mean ")
    return upstream.did_you_mean(path, paths)
