"""Every field of SFTConfig and LoraConfig and every key of DeepSpeed has one verdict."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from unit.test_checks import legal_config

from sft.config import names, no_effect, packages, upstream, verdicts, zero_checks, zero_json
from sft.config.checks import check
from sft.config.rules import declared, default_of
from sft.config.settings import Config, LoraSection, TrainConfig, ZeroConfig
from sft.errors import Problem

NEW = "give it a verdict in sft/config/verdicts.py"


def without_one_verdict(known: Iterable[str], *verdicts: Iterable[str]) -> list[str]:
    """List the names that have no verdict or several, and those that no longer exist."""
    every = [name for found in verdicts for name in found]
    return sorted(
        {name for name in {*known, *every} if every.count(name) != 1} | set(every) - set(known)
    )


@pytest.mark.parametrize(
    ("known", "section", "owned", "refused", "passed"),
    [
        (
            upstream.sft_config_names,
            TrainConfig,
            names.TRAIN_OWNED,
            verdicts.TRAIN_REFUSED,
            verdicts.TRAIN_PASSED,
        ),
        (
            upstream.lora_config_names,
            LoraSection,
            names.LORA_OWNED,
            verdicts.LORA_REFUSED,
            verdicts.LORA_PASSED,
        ),
    ],
)
def test_every_field_has_one_verdict(
    known: Any, section: Any, owned: Any, refused: Any, passed: Any
) -> None:
    ours = {item.name for item in dataclasses.fields(section)} & known()
    given = {*owned} - ours  # a setting of ours may decide a field that has our setting's name
    assert without_one_verdict(known(), ours, given, refused, passed) == [], NEW
    assert without_one_verdict({*known(), "new_field"}, ours, given, refused, passed) == [
        "new_field"
    ]


@pytest.mark.parametrize(
    ("section", "key", "reason"),
    [
        ("train", "train_sampling_strategy", "the seed alone decides the order of the rows"),
        ("train", "prediction_loss_only", "sft computes the evaluation itself"),
        ("lora", "eva_config", "sft does not run the pass over data"),
    ],
)
def test_a_field_without_effect_is_refused(section: str, key: str, reason: str) -> None:
    (problem,) = check(legal_config(**{f"{section}__extra": {key: "x"}}))
    assert problem.setting == f"{section}.extra.{key}=x"
    assert problem.rule.startswith(f"has no effect: {reason}") and problem.fix == "remove it"


class Recording(dict[str, Any]):
    """A DeepSpeed JSON that notes for which keys it is asked."""

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self  # ``in config.keys()`` is noted too


def test_every_key_of_deepspeed_has_one_verdict() -> None:
    """The keys are those that the installed DeepSpeed asks its JSON for."""
    given = Recording({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}})
    DeepSpeedConfig(given)  # type: ignore[no-untyped-call]
    assert len(given.asked) > 50
    assert not given.asked & set(verdicts.DEEPSPEED_FOREIGN)
    asked = given.asked - verdicts.DEEPSPEED_RENAMED.keys()
    of_ours = verdicts.DEEPSPEED_REFUSED, verdicts.DEEPSPEED_DROPPED, verdicts.DEEPSPEED_DECIDED
    foreign = set(verdicts.DEEPSPEED_FOREIGN)
    top = [{name for name in table if "." not in name} - foreign for table in of_ours]
    assert without_one_verdict(asked, *top, verdicts.DEEPSPEED_PASSED[""]) == [], NEW
    for section, place in zero_checks.SECTIONS.items():
        start = f"{section}."
        tables = verdicts.DEEPSPEED_REFUSED, verdicts.DEEPSPEED_DROPPED, verdicts.DEEPSPEED_RENAMED
        within = [
            {name.removeprefix(start) for name in table if name.startswith(start)}
            for table in tables
        ]
        known = upstream.field_names("deepspeed", *place)
        passed = verdicts.DEEPSPEED_PASSED[section]
        assert without_one_verdict(known, *within, passed) == [], NEW


def test_other_names_of_keys_are_those_of_deepspeed() -> None:
    fields = DeepSpeedZeroConfig.model_fields
    aliases = {name: field.alias for name, field in fields.items() if field.alias}
    assert upstream.field_aliases("deepspeed", *zero_json.ZERO) == aliases
    assert zero_json.GATHER in aliases.values()
    extra = {name: field.json_schema_extra for name, field in fields.items()}
    old = {name for name, more in extra.items() if isinstance(more, dict) and "new_param" in more}
    start = "zero_optimization."
    assert verdicts.DEEPSPEED_RENAMED.keys() - {"bfloat16"} == {start + name for name in old}
    for name, present in verdicts.DEEPSPEED_RENAMED.items():
        section, _, leaf = name.rpartition(".")
        given = zero_json.renamed({section: {leaf: True}} if section else {leaf: {"a": 1}})
        assert leaf not in given.get("zero_optimization", given)
        if leaf != "cpu_offload_use_pin_memory":  # which needs an offload to belong to
            assert present.rpartition(".")[2] in given.get("zero_optimization", given)


def test_deepspeed_still_reads_the_keys_of_its_other_sections() -> None:
    root = upstream.package_dir("deepspeed")
    source = "".join(file.read_text(encoding="utf-8") for file in root.rglob("*.py"))
    constants = set(re.findall(r"""["'](\w+)["']""", source))
    others = verdicts.DEEPSPEED_PASSED.keys() - zero_checks.SECTIONS.keys() - {""}
    assert others == {"aio", "data_types", "flops_profiler"}
    for section in others:
        assert verdicts.DEEPSPEED_PASSED[section] <= constants


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("activation_checkpointing", "train.gradient_checkpointing=true"),
        ("torch_autocast", "precision=bf16"),
        ("wandb", "tracker=tensorboard"),
        ("curriculum_learning", "remove it"),
    ],
)
def test_a_key_without_effect_is_refused(key: str, fix: str) -> None:
    settings = ZeroConfig("stage2.json", {key: {"enabled": True}})
    (problem,) = zero_checks.problems(settings, "adamw_torch", False)
    assert problem.setting.startswith(f"zero.overrides.{key}=")
    assert problem.fix.removesuffix(f", without zero.overrides.{key}") == fix


def test_a_tracker_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config()
    config.tracker.mlflow = True
    monkeypatch.setattr(packages, "installed", lambda package: package == "mlflow")
    (problem,) = packages.problems(config)
    rule, fix = "needs the package sqlalchemy and alembic", "pip install 'sft[mlflow]'"
    assert problem == Problem("tracker=mlflow", rule, fix)
    monkeypatch.setattr(packages, "installed", lambda package: True)
    assert list(packages.problems(config)) == []


# Settings that another one switches off

# These always have an effect, or say in their help when they have none.
ALWAYS = {
    *("run_name", "output_dir", "overwrite", "seed", "precision", "lora.enabled", "zero.config"),
    *("model.name", "model.name_or_path", "model.revision", "model.pretrained"),
    *("model.trust_remote_code", "model.attn_implementation", "model.lm_head"),
    *("model.eos_token", "model.pad_token", "model.new_tokens", "model.config"),
    *("model.frozen_linear", "quantization.load_in_8bit", "quantization.load_in_4bit"),
    *("quantization.extra", "resume.checkpoint", "resume.allow"),
    *("train.global_batch_size", "train.per_device_train_batch_size"),
    *("train.per_device_eval_batch_size", "train.num_train_epochs", "train.max_steps"),
    *("train.learning_rate", "train.lr_scheduler_type", "train.lr_scheduler_kwargs"),
    *("train.weight_decay", "train.max_grad_norm", "train.optim", "train.gradient_checkpointing"),
    *("train.logging_steps", "train.eval_strategy", "train.save_strategy", "train.on_nan"),
    *("train.max_loss_jump", "train.padding_free", "train.pad_to_multiple_of"),
    *("train.dataloader_num_workers", "train.extra", "profile.torch", "profile.system"),
    *("train.max_forgetting", "sample.every", "report.every", "on_alert"),
    *("alert.loss_jump", "alert.stall", "alert.disk"),
    *("tracker.tensorboard", "tracker.wandb", "tracker.mlflow", "tracker.trackio"),
}
# zero_checks, lora_checks, training.groups and evaluation refuse them.
ELSEWHERE = {"zero.overrides", "train.merge", "model.trainable", "train.embedding_learning_rate"}
ELSEWHERE |= {"train.metric", "train.greater_is_better"}
# These choose a tracker, and name its project for three of them.
ELSEWHERE |= {"tracker.project", "tracker.group"}


def test_for_every_setting_it_is_known_what_it_needs() -> None:
    known = {name for name, _ in declared(Config)}
    known = {name for name in known if not name.startswith(("dataset.", "template."))}
    needing = {need.setting for need in no_effect.NEEDS} & known
    assert without_one_verdict(known, ALWAYS, ELSEWHERE, needing) == []


def put(config: Config, name: str, value: Any) -> None:
    node: Any = config
    *above, leaf = name.split(".")
    for part in above:
        node = getattr(node, part)
    if isinstance(node, dict):
        node[leaf] = value
    else:
        setattr(node, leaf, value)


SWITCHES_OFF = {
    "train.eval_strategy": "no",
    "train.save_strategy": "no",
    "train.early_stopping_patience": None,
    "train.lr_scheduler_type": "constant",
    "train.dataloader_num_workers": 0,
    "train.gradient_checkpointing": False,
    "zero.config": "stage2.json",
    "tracker.mlflow": False,
    "train.padding_free": "auto",
    "dataset.packing": "bfd",
    "lora.enabled": False,
    "profile.torch": False,
    "profile.system": False,
    "quantization.load_in_4bit": False,
    "sample.every": None,
    "sample.temperature": None,
}


@pytest.mark.parametrize("need", no_effect.NEEDS, ids=lambda need: f"{need.setting}-{need.other}")
def test_a_setting_that_another_switches_off_is_refused_with_a_fix(need: no_effect.Need) -> None:
    item = dict(declared(Config)).get(need.setting)
    default = None if item is None else default_of(item)
    config = legal_config()
    put(config, need.setting, 7)
    off = SWITCHES_OFF[need.other]
    put(config, need.other, not off if need.holds(off) else off)

    def refused() -> list[str]:
        found = no_effect.problems(config)
        return [p.setting for p in found if need.other in p.rule and p.setting.endswith("=7")]

    assert refused() == [f"{need.setting}=7"]
    if need.fix is None:
        put(config, need.setting, default)
    else:
        values = (True, False, None, "steps", "epoch", "none", "linear")
        put(config, need.other, next(value for value in values if need.holds(value)))
    assert refused() == []


def test_settings_are_refused_by_the_command() -> None:
    config = legal_config(train__save_steps=6)
    assert [(p.setting, p.rule, p.fix) for p in check(config)] == [
        (
            "train.save_steps=6",
            "has no effect with train.save_strategy=epoch",
            "train.save_strategy=steps",
        )
    ]
