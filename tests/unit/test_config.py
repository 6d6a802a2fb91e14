"""Every YAML composes, the schema is upstream's, and no wrong setting passes, wherever it is."""

import dataclasses
import errno
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sft.config import no_effect, saved, upstream
from sft.config.checks import check
from sft.config.paths import CONF_DIR
from sft.config.rules import above, at_least, fields_of, named, one_of, within
from sft.config.settings import (
    Config,
    LoraSection,
    QuantizationConfig,
    TrainConfig,
    fill_names,
    short_name,
)
from sft.errors import ConfigError, Problem
from sft.train import main

OPTIONS = {
    "model": {
        *("tiny", "opt-125m", "opt-350m", "opt-1.3b", "opt-6.7b", "gpt2", "gpt-j-6b", "hf"),
        *("gpt-neox-20b", "pythia-160m", "pythia-2.8b", "llama-3.2-1b", "llama-3.1-8b"),
        *("llama-3.1-70b", "qwen3-0.6b", "qwen3-8b", "mistral-7b", "gemma-3-1b", "smollm2-135m"),
        *("lfm2-1.2b", "granite-4.0-h-tiny", "falcon-h1-0.5b", "qwen3-next-80b-a3b"),
        *("qwen3.5-27b", "qwen3.5-35b-a3b", "falcon-h1-1.5b-deep", "nemotron-3-nano-30b-a3b"),
        *("nemotron-h-8b", "olmoe-1b-7b", "mixtral-8x7b", "gpt-oss-20b", "qwen3-30b-a3b"),
    },
    "dataset": {
        *("demo", "alpaca", "dolly", "gsm8k", "tiny-shakespeare", "wikitext", "jsonl", "text"),
        *("csv", "parquet", "chat", "mix", "pretokenized"),
    },
    "template": {"alpaca", "chat", "chatml", "completion", "plain-chat", "text", "lines"},
    "lora": {"attention", "all-linear", "none"},
    "quantization": {"none", "int8", "nf4"},
    "zero": {"none", "stage1", "stage2", "stage3", "stage2_offload", "stage3_offload"},
    "train": {"default", "demo", "full"},
    "experiment": {
        *("opt-125m_wikitext", "opt-125m_wikitext_grid", "gpt-j-6b_tiny-shakespeare"),
        *("gpt-neox-20b", "text-folder", "lora_prompt-response"),
    },
}
COUNTS = {
    "model": 32,
    "dataset": 13,
    "template": 7,
    "lora": 3,
    "quantization": 3,
    "zero": 6,
    "train": 3,
    "experiment": 6,
}
# What an option leaves to the user.
GIVEN = {
    "hf": ["model.name_or_path=facebook/opt-125m"],
    "jsonl": ["dataset.path=rows.jsonl"],
    **{name: ["dataset.path=rows"] for name in ("csv", "parquet", "chat")},
    "text": ["dataset.path=texts"],
    "mix": ["dataset.mix.a.path=rows.jsonl"],
    "pretokenized": ["dataset.path=folder"],
    "text-folder": ["dataset.path=texts"],
    "lora_prompt-response": ["dataset.path=rows.jsonl"],
    "opt-125m_wikitext_grid": ["train.per_device_train_batch_size=2"],
}


def refused(*overrides: str, config_dir: Path | None = None) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        main.compose(list(overrides), str(config_dir) if config_dir else None)
    return caught.value.problems


def one_refused(*overrides: str, config_dir: Path | None = None) -> tuple[str, str, str]:
    (problem,) = refused(*overrides, config_dir=config_dir)
    return problem.setting, problem.rule, problem.fix


# The YAML files


@pytest.mark.parametrize("group", sorted(OPTIONS))
def test_groups_hold_the_promised_options(group: str) -> None:
    found = {file.stem for file in (CONF_DIR / group).glob("*.yaml")}
    assert found == OPTIONS[group]
    assert len(found) == COUNTS[group]


def combinations() -> list[dict[str, str]]:
    """Choose options so that each occurs, and none is left out by another's rules."""
    lists = {group: sorted(options) for group, options in OPTIONS.items()}
    # Full fine-tuning and quantisation exclude each other: their lists go in step.
    lists["lora"], lists["quantization"] = (
        ["attention", "all-linear", "none"],
        ["int8", "nf4", "none"],
    )

    def cycle(count: int, *groups: str) -> list[dict[str, str]]:
        return [
            {group: lists[group][row % COUNTS[group]] for group in groups} for row in range(count)
        ]

    data = cycle(COUNTS["model"], "model", "dataset")
    # gsm8k asks for no exact match, so that any template suits it.
    rest = cycle(7, "template", "lora", "quantization", "zero", "train")
    return data + [{"dataset": "gsm8k", **row} for row in rest]


def test_the_combinations_leave_no_option_out() -> None:
    for group in OPTIONS.keys() - {"experiment"}:
        assert {row[group] for row in combinations() if group in row} == OPTIONS[group]


@pytest.mark.parametrize("row", combinations(), ids=lambda row: "-".join(row.values()))
def test_every_option_composes(row: dict[str, str]) -> None:
    given = [item for option in row.values() for item in GIVEN.get(option, [])]
    if "template" in row:
        given = []
    config = main.compose([f"{group}={option}" for group, option in row.items()] + given)
    for group, option in row.items():
        for key, value in yaml.safe_load((CONF_DIR / group / f"{option}.yaml").read_text()).items():
            composed = getattr(getattr(config, group), key, None)
            if value not in (None, {}) and key != "defaults" and "${" not in str(value):
                assert composed == (float(value) if isinstance(composed, float) else value), key


def test_every_model_is_named_after_its_file() -> None:
    models = CONF_DIR.glob("model/*.yaml")
    names = {file.stem: yaml.safe_load(file.read_text()).get("name") for file in models}
    assert names.pop("hf") is None
    assert len(names) == 31
    assert all(name == stem for stem, name in names.items())


# The recipes

# name: ranks, micro-batch, accumulation, learning rate, epochs, max_length, stage, full
RECIPES = {
    "opt-125m_wikitext": (2, 4, 4, 5e-5, 3, 1024, 1, True),
    "opt-125m_wikitext_grid": (2, 2, 8, 5e-5, 3, 1024, 1, True),
    "gpt-j-6b_tiny-shakespeare": (2, 16, 1, 2e-5, 1, 512, 3, True),
    "gpt-neox-20b": (8, 4, 32, 0.97e-4, 1, 2048, 1, False),
    "text-folder": (4, 4, 5, 5e-5, 1, 2048, 3, True),
    "lora_prompt-response": (4, 2, 4, 5e-5, 5, 2048, 2, False),
}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_composes_with_its_model_and_with_tiny(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks, micro, accumulation, rate, epochs, length, stage, full = RECIPES[name]
    given = [f"experiment={name}", *GIVEN.get(name, [])]
    config = main.compose(given)
    tiny = main.compose([*given, "model=tiny"])

    train = config.train
    assert train.per_device_train_batch_size == micro
    assert train.global_batch_size == micro * ranks * accumulation
    assert train.learning_rate == rate
    assert train.num_train_epochs == epochs
    assert config.dataset.max_length == length
    assert config.dataset.exact_match == 0
    assert config.lora.enabled is not full
    assert config.zero.config is not None
    assert config.zero.config.startswith(f"stage{stage}")
    for world_size in (1, 2, ranks):
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        assert check(config) == []

    assert config.model.name != "tiny"
    assert tiny.model.name == "tiny"
    assert dataclasses.replace(tiny, model=config.model) == config


def test_the_recipes_keep_what_the_reference_systems_set() -> None:
    neox = main.compose(["experiment=gpt-neox-20b"])
    assert neox.train.lr_scheduler_type == "cosine_with_min_lr"
    assert neox.train.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert neox.train.warmup_steps == 0.01
    assert neox.train.gradient_checkpointing
    assert neox.dataset.subset == "wikitext-103-raw-v1"

    gpt_j = main.compose(["experiment=gpt-j-6b_tiny-shakespeare"])
    assert gpt_j.zero.config == "stage3.json"
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    assert gpt_j.zero.overrides == {"zero_optimization": offload}

    folder = main.compose(["experiment=text-folder", "dataset.path=texts", "model=gpt-j-6b"])
    assert folder.model.name == "gpt-j-6b"
    assert folder.dataset.eval_fraction == 0.1

    rows = main.compose(["experiment=lora_prompt-response", "dataset.path=rows.jsonl"])
    assert (rows.lora.r, rows.lora.lora_alpha, rows.lora.lora_dropout) == (8, 16, 0.05)
    assert rows.train.lr_scheduler_type == "cosine"
    assert rows.zero.config == "stage2_offload.json"
    assert "{prompt}\n" in rows.template.prompts
    assert "{response}" in rows.template.completions


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_opens_with_command_arithmetic_and_expectation(name: str) -> None:
    text = (CONF_DIR / "experiment" / f"{name}.yaml").read_text()
    head = text[: text.index("defaults:")]
    lines = head.splitlines()
    assert lines[0] == "# @package _global_"
    assert all(line.startswith("#") for line in lines)
    command = r"#   (torchrun --nproc_per_node \d+|python) -m sft\.train .*experiment=" + name
    assert re.search(command, head)
    assert "# Arithmetic\n" in head
    assert "# What to expect: " in head


def test_the_grid_sweeps_the_micro_batch_at_one_global_batch() -> None:
    from hydra import compose, initialize_config_dir
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from sft.config.compose import register_schema

    setting, rule, fix = one_refused("experiment=opt-125m_wikitext_grid")
    assert setting == "train.per_device_train_batch_size=2,4,8,16"
    assert rule == "this config defines a sweep"
    assert fix == "add -m, or train.per_device_train_batch_size=2"

    register_schema(Config, "train")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        hydra = compose(
            "train", ["experiment=opt-125m_wikitext_grid"], return_hydra_config=True
        ).hydra
    words = BasicSweeper(None, hydra.sweeper.params)._parse_config()
    parsed = OverridesParser.create().parse_overrides(words)
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    assert jobs == [[f"train.per_device_train_batch_size={size}"] for size in (2, 4, 8, 16)]


def test_a_launcher_that_would_train_nothing_is_refused() -> None:
    basic = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    setting, rule, fix = one_refused("hydra/launcher=basic")
    assert setting == f"hydra/launcher=basic ({basic})"
    assert rule.endswith("this one would train nothing") and fix.startswith("hydra/launcher=torchr")
    assert one_refused(f"hydra.launcher._target_={basic}")[1] == rule
    assert one_refused("hydra.sweeper._target_=other.Sweeper") == (
        "hydra/sweeper=basic (other.Sweeper)",
        "sft supports only the sweeper that tries all combinations of the given values",
        "hydra/sweeper=basic, or leave it out",
    )
    assert main.compose(["hydra/launcher=torchrun", "hydra/sweeper=basic"]) == main.compose([])
    with pytest.raises(SystemExit) as stopped:
        main(["-m", "hydra/launcher=basic", "seed=1,2"])
    assert stopped.value.code == 2


def test_a_saved_config_is_read_as_the_same_values(tmp_path: Path) -> None:
    texts = ["Pay ${x}", r"Pay \${x} and \\${seed}", "${", "$$ {a}", "no \\", "ü: #'\"\n", "null"]
    given = Config()
    given.template.prompts, given.template.completions = texts, ["{response}"]
    given.template.name, given.template.kind = "mine", "completion"
    given.template.system, given.dataset.columns = None, {"a": "${b}"}
    given.lora.extra = {"list": ["${c}", 1, None]}
    path = tmp_path / "config.yaml"
    path.write_text(saved.to_yaml(given), encoding="utf-8")
    assert saved.settings_of(path) == dataclasses.asdict(given)

    config = main.compose(["template.system=Pay \\${x}", "dataset.eval_fraction=0"])
    path.write_text(saved.to_yaml(config), encoding="utf-8")
    assert config.template.system == "Pay ${x}"
    assert main.compose([str(path)]) == config


# The schema


@pytest.mark.parametrize(
    ("rule", "holds", "fails"),
    [
        (at_least(1), [1, 2], [0, -1]),
        (above(0), [1e-9, 1], [0, -1, math.nan]),
        (within(0, 1), [0, 0.99], [1, -0.1]),
        (one_of("a", "b"), ["a", "b"], ["c", ""]),
    ],
)
def test_rules(rule, holds, fails) -> None:
    assert [rule.holds(value) for value in holds] == [True] * len(holds)
    assert [rule.holds(value) for value in fails] == [False] * len(fails)


def test_every_setting_has_a_description_and_a_legal_default() -> None:
    def walk(node):
        for name, field, value in fields_of(node):
            if dataclasses.is_dataclass(value):
                yield from walk(value)
            else:
                rule = field.metadata["rule"]
                assert len(field.metadata["help"]) >= 10, name
                assert rule is None or value is None or rule.holds(value), name
                yield name

    assert len(list(walk(Config()))) >= 60


def test_the_names_read_from_source_are_the_installed_classes_fields() -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames
    from trl import SFTConfig

    assert upstream.sft_config_names() == {field.name for field in dataclasses.fields(SFTConfig)}
    lora_names = {field.name for field in dataclasses.fields(LoraConfig)}
    assert upstream.lora_config_names() == lora_names
    own = BitsAndBytesConfig.__init__.__code__
    assert upstream.bnb_config_names() == set(own.co_varnames[1 : own.co_argcount])
    assert upstream.optimizer_names() == {item.value for item in OptimizerNames}
    assert upstream.scheduler_names() == {item.value for item in SchedulerType}

    # What is not ours is given to the class by name.
    for section, known in (
        (TrainConfig, upstream.sft_config_names()),
        (LoraSection, lora_names),
        (QuantizationConfig, upstream.bnb_config_names()),
    ):
        assert named(section, ours=False) <= known
    # TRL has these too; our code does what they ask for.
    same_name = named(TrainConfig, ours=True) & upstream.sft_config_names()
    best = {"greater_is_better", "load_best_model_at_end"}
    assert same_name == {"padding_free", "pad_to_multiple_of"} | best


@pytest.mark.parametrize(
    ("schedule", "kwargs"),
    [
        ("linear", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("cosine", {"num_cycles": False}),
        ("polynomial", {"lr_end": False, "power": False}),
        ("cosine_with_min_lr", {"num_cycles": False, "min_lr": False, "min_lr_rate": False}),
        ("reduce_lr_on_plateau", None),
    ],
)
def test_a_schedules_keywords_are_read_from_source(schedule: str, kwargs) -> None:
    assert upstream.scheduler_kwargs(schedule) == kwargs


def test_every_schedules_keywords_can_be_read() -> None:
    known = {name: upstream.scheduler_kwargs(name) for name in upstream.scheduler_names()}
    assert len(known) >= 12
    required = {name: [key for key, need in (k or {}).items() if need] for name, k in known.items()}
    assert {name: keys for name, keys in required.items() if keys} == {
        "warmup_stable_decay": ["num_decay_steps"]
    }


def test_upstream_lookups_that_find_nothing_say_so() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_package is not installed: pip install"):
        upstream.package_dir("no_such_package")
    with pytest.raises(LookupError, match=r"config\.py defines no class Nothing"):
        upstream.field_names("peft", "config.py", "Nothing")
    with pytest.raises(LookupError, match="PeftConfig has no __init__"):
        upstream.init_names("peft", "config.py", "PeftConfig")


def test_names_follow_from_the_choices() -> None:
    config = main.compose(["model=gpt2", "dataset=gsm8k", "lora.r=4", "seed=7"])
    fill_names(config)
    assert config.run_name == "gpt2_gsm8k_r4_seed7"
    assert config.output_dir == "outputs/gpt2_gsm8k_r4_seed7"

    config = Config()
    config.model.name_or_path, config.dataset.path = "facebook/opt-125m", "data/rows.jsonl"
    config.lora.enabled = False
    fill_names(config)
    assert (config.model.name, config.dataset.name) == ("opt-125m", "rows.jsonl")
    assert config.run_name == "opt-125m_rows.jsonl_full_seed42"

    config.run_name, config.output_dir = "mine", "there"
    fill_names(config)
    assert (config.run_name, config.output_dir) == ("mine", "there")


def test_a_files_short_name_is_its_stem_and_a_folders_its_last_part(tmp_path: Path) -> None:
    (tmp_path / "rows.v2.jsonl").touch()
    assert short_name(str(tmp_path / "rows.v2.jsonl")) == "rows.v2"
    assert short_name(f"{tmp_path}/") == tmp_path.name
    assert short_name("meta-llama/Llama-3.2-1B") == "Llama-3.2-1B"


# Unknown keys and options, from each place


def test_unknown_keys_are_refused_however_they_are_typed() -> None:
    fixes = {
        "lora.drop_out=0.3": "lora.lora_dropout=0.3",
        "+lora.alpha=8": "lora.lora_alpha=8",
        "++lora.dropout=0.3": "lora.lora_dropout=0.3",
        "+lora.r_pattern={}": "did you mean lora.rank_pattern?",
        "trian.max_steps=3": "did you mean train?",
        "train.max_length=64": (
            "dataset.max_length=64 (TRL cuts off the end of longer rows, and sft stops: "
            "dataset.overlong=truncate)"
        ),
        "sed=1": "did you mean seed?",
        "train.lr=0.0001": "train.learning_rate=0.0001",
        "lr=fast": "did you mean train.learning_rate?",
        "lora_r=0": "did you mean lora.r?",
        "gradient_accumulation_steps=4": (
            "train.global_batch_size=N, with N = train.per_device_train_batch_size x 4 x GPUs"
        ),
        "+batch_size=8": (
            "train.global_batch_size=8 (as in axolotl), or "
            "train.per_device_train_batch_size=8 (as in torchtune)"
        ),
        "train.adam_beta2=0.9": "train.extra.adam_beta2=0.9",
        "lora.bias=all": "lora.extra.bias=all",
        "quantization.bnb_4bit_compute_dtype=bfloat16": (
            "quantization.extra.bnb_4bit_compute_dtype=bfloat16"
        ),
        "train.packing=true": "dataset.packing=bfd",
        "lora.task_type=CAUSAL_LM": "remove it: sft does so anyway",
        "zzzzzz=1": "remove it",
        "dataset.train_ratio=0.9": "dataset.eval_fraction=0.1",
        "val_set_size=0.1": "dataset.eval_fraction=0.1",
        "val_size=2000": (
            "dataset.eval_fraction=0.05 (a share, not 2000 rows: divide 2000 by the number of rows)"
        ),
    }
    problems = {problem.setting: problem for problem in refused(*fixes)}
    assert len(problems) == len(fixes)
    for override, fix in fixes.items():
        setting = override.lstrip("+")
        if setting.startswith("trian"):
            setting = "trian={'max_steps': 3}"
        assert problems[setting] == Problem(setting, "there is no such setting", fix)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_users_own_options_and_groups_come_in_with_config_dir(tmp_path: Path) -> None:
    write(tmp_path / "model" / "mine.yaml", "name: mine\nname_or_path: me/mine\n")
    write(tmp_path / "site" / "lab.yaml", "# @package _global_\nlora:\n  r: 2\n")
    for site in ("site=lab", "+site=lab"):
        config = main.compose(["model=mine", site], str(tmp_path))
        assert (config.model.name_or_path, config.lora.r) == ("me/mine", 2)
    config = main.compose(["model=mine", "site=lab", "lora.r=3"], str(tmp_path))
    assert config.lora.r == 3
    assert one_refused("model=mime", config_dir=tmp_path)[2] == "did you mean mine?"


def test_an_unknown_key_in_a_users_yaml_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "lora" / "mine.yaml", "r: 4\nlora_alhpa: 8\n")
    assert one_refused("lora=mine", config_dir=tmp_path) == (
        "lora.lora_alhpa=8",
        "there is no such setting",
        "did you mean lora.lora_alpha?",
    )


def test_a_users_yaml_that_would_be_shadowed_or_is_broken_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "lora" / "attention.yaml", "r: 64\n")
    write(tmp_path / "train.yaml", "seed: 1\n")
    write(tmp_path / "zero" / "mine.yaml", "config: [\n")
    shadowed, primary, broken = refused("zero=mine", config_dir=tmp_path)
    ours, users = CONF_DIR / "lora" / "attention.yaml", tmp_path / "lora" / "attention.yaml"
    assert shadowed.setting == f"--config-dir {tmp_path}"
    assert shadowed.rule == f"{ours} would be used instead of your {users}"
    assert shadowed.fix == "rename it, for example to lora/my-attention.yaml"
    assert primary.rule == f"{CONF_DIR / 'train.yaml'} would be used instead of your " + str(
        tmp_path / "train.yaml"
    )
    assert broken.rule.startswith(f"{tmp_path / 'zero' / 'mine.yaml'}: while parsing")
    assert broken.fix == "correct the YAML file"


def test_a_config_dir_must_exist(tmp_path: Path) -> None:
    missing = tmp_path / "no"
    assert one_refused(config_dir=missing) == (
        f"--config-dir {missing}",
        "there is no such folder",
        "--config-dir DIR",
    )


@pytest.mark.parametrize(
    ("override", "setting", "rule", "fix"),
    [
        (
            "zero=stage4",
            "zero=stage4",
            "zero has no option stage4; it has "
            "none, stage1, stage2, stage2_offload, stage3, stage3_offload",
            "did you mean stage3?",
        ),
        ("lora=null", "lora=null", "lora has no option null; it has ", "lora=none"),
        ("train=null", "train=null", "train has no option null; it has default, demo", "did"),
        ("lora={r: 4}", "lora={'r': 4}", "lora has no option {'r': 4}; it has ", "choose one"),
        ("~lora.r", "~lora.r", "a setting cannot be deleted", "remove it from the command"),
        ("lora.r=2,4", "lora.r=2,4", "several values need a sweep (-m)", "add -m"),
        (
            "lora.target_modules=a,b",
            "lora.target_modules=a,b",
            "several values need a sweep (-m)",
            "add -m, or lora.target_modules=[a,b]",
        ),
        (
            "model=gpt2,tiny",
            "model=gpt2,tiny",
            "several values need a sweep (-m)",
            "add -m, or choose",
        ),
        ("lora.r", "lora.r", "has no value", "lora.r=VALUE"),
        ("lora.rr", "lora.rr", "is neither a setting nor a settings file", "write each setting as"),
        ("model.name=???", "model.name=???", "a value must be given", "model.name=VALUE"),
        (
            "model.name=${nope}",
            "model.name",
            "Interpolation key 'nope' not found",
            "name a setting, as in ${seed}, or write",
        ),
        (
            "dataset.columns=[a]",
            "dataset.columns=['a']",
            "must be of type dict[str, str]",
            "dataset.columns={}",
        ),
    ],
)
def test_an_override_that_cannot_be_composed(
    override: str, setting: str, rule: str, fix: str
) -> None:
    found = one_refused(override)
    assert found[0] == setting
    assert found[1].startswith(rule)
    assert found[2].startswith(fix)


def test_an_empty_dict_that_empties_nothing_is_refused() -> None:
    assert one_refused("dataset=tiny-shakespeare", "dataset.columns={}") == (
        "dataset.columns={}",
        "is merged with {'text': 'Text'} and does not remove any of it",
        "choose a different option of the group dataset",
    )
    assert main.compose(["dataset.columns={}"]).dataset.columns == {}


def test_null_is_off_where_off_is_clear() -> None:
    off = {
        **{"train.max_steps": -1, "train.warmup_steps": 0.0, "train.weight_decay": 0.0},
        **{"train.max_grad_norm": 0.0, "train.dataloader_num_workers": 0},
        **{"train.lr_scheduler_kwargs": {}, "train.extra": {}, "train.merge": False},
        **{"lora.rank_pattern": {}, "lora.alpha_pattern": {}, "lora.lora_dropout": 0.0},
        **{"dataset.eval_fraction": 0.0, "dataset.columns": {}, "resume.allow": []},
        **{"quantization.load_in_4bit": False, "overwrite": False},
    }
    config = main.compose([f"{name}=null" for name in off])
    for name, value in off.items():
        assert no_effect.value_of(config, name) == value, name
    for name in ("train.learning_rate", "train.num_train_epochs", "lora.enabled", "seed"):
        with pytest.raises(ConfigError, match="must be of type"):
            main.compose([f"{name}=null"])


def test_values_of_the_wrong_type_are_all_named() -> None:
    problems = refused(
        "lora.r=2.5",
        "seed=x",
        "model.trust_remote_code=maybe",
        "train.learning_rate=fast",
        "template.prompts=hello",
        "template.completions=5",
        "lora.modules_to_save=lm_head",
        "lora.rank_pattern={a: x}",
        "train.extra=5",
    )
    assert {(item.setting, item.rule, item.fix) for item in problems} == {
        ("lora.r=2.5", "must be of type int", "lora.r=8"),
        ("seed=x", "must be of type int", "seed=42"),
        (
            "model.trust_remote_code=maybe",
            "must be of type bool: true or false",
            "model.trust_remote_code=false",
        ),
        ("train.learning_rate=fast", "must be of type float", "train.learning_rate=0.0002"),
        ("template.prompts=hello", "must be of type list[str]", "template.prompts=[hello]"),
        ("template.completions=5", "must be of type list[str]", "template.completions=[]"),
        (
            "lora.modules_to_save=lm_head",
            "must be of type list[str] or null",
            "lora.modules_to_save=[lm_head]",
        ),
        (
            "lora.rank_pattern={'a': 'x'}",
            "must be of type dict[str, int]",
            "lora.rank_pattern={}",
        ),
        ("train.extra=5", "must be of type dict[str, Any]", "train.extra={}"),
        # The chat template keeps its default, which has nothing to train.
        (
            "template.completions=[]",
            "a template needs completions, the texts that are trained",
            "template=completion",
        ),
    }


def test_a_group_given_a_value_in_a_yaml_file_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "experiment" / "mine.yaml", "# @package _global_\nlora: 8\n")
    (problem,) = refused("experiment=mine", config_dir=tmp_path)
    assert (
        problem.rule.startswith("In 'experiment/mine'")
        or problem.rule == "lora is a section of settings"
    )


def test_all_problems_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as caught:
        main.compose(["model=tinny", "lora.r=0", "sed=1", "train.extra.warmup_ratio=0.1"])
    assert str(caught.value).splitlines()[0] == "4 settings are refused"
    assert [item.setting for item in caught.value.problems] == [
        "model=tinny",
        "sed=1",
        "lora.r=0",
        "train.extra.warmup_ratio=0.1",
    ]
    assert "\n\nlora.r=0\n    must be from 1 to 65536\n    fix: lora.r=8\n\n" in str(caught.value)
    assert str(ConfigError(caught.value.problems[2:3])) == (
        "1 setting is refused\n\nlora.r=0\n    must be from 1 to 65536\n    fix: lora.r=8"
    )


# The command line


def run(*argv: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *argv],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_refused_setting_exits_2_without_torch_or_a_traceback() -> None:
    done = run("-X", "importtime", "-m", "sft.train", "lora.r=0", "+lora.drop_out=0.3")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert done.stdout == ""
    assert "\n".join(lines) == (
        "error: 2 settings are refused\n\n"
        "lora.drop_out=0.3\n    there is no such setting\n"
        "    fix: lora.lora_dropout=0.3\n\n"
        "lora.r=0\n    must be from 1 to 65536\n    fix: lora.r=8"
    )
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "sft.config.checks" in imported
    assert imported & HEAVY == set()


HEAVY = {"torch", "transformers", "trl", "peft", "deepspeed", "datasets", "bitsandbytes"}


def test_help_exits_0_without_torch() -> None:
    done = run("-X", "importtime", "-m", "sft.train", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("sft train: ")
    assert "\nzero=OPTION\n    none " in done.stdout
    assert (
        "    lora.r=8\n        rank; a higher rank learns more and takes more memory (must"
        in done.stdout
    )
    assert "Traceback" not in done.stderr
    assert set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE)) & HEAVY == set()


def test_importing_the_command_imports_no_torch() -> None:
    done = run("-c", "import sft.train, sys; print(*sorted(sys.modules))")
    modules = set(done.stdout.split())
    assert "sft.train" in modules
    assert modules & HEAVY == set()


def test_rank_0_speaks_first(capsys, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another rank waits: torchrun ends it meanwhile, unless it alone has failed."""
    waited: list[float] = []
    monkeypatch.setattr("time.sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for argv in (["--help"], ["--cfg", "job"], ["-m", "lora.r=1,2"]):
        main(argv)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit, match="2"):
        main(["lora.r=0"])
    assert capsys.readouterr().err.startswith("error: rank 1: 1 setting is refused\n")
    assert waited == [5]
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit, match="2"):
        main(["lora.r=0"])
    assert capsys.readouterr().err.startswith("error: 1 setting is refused\n")
    assert waited == [5]
    told = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert told.startswith("1 setting is refused\n\nlora.r=0\n")


@pytest.mark.parametrize(
    "prompt", ["What's this, é?", "Tell me: what, why?", "[1]", "${x}", 'say "hi"', "a=b;c\n#d"]
)
def test_a_prompt_is_taken_as_it_is_typed(prompt: str) -> None:
    from sft.generate import main as generate

    assert generate.compose([f"prompt={prompt}", "model=m", "temperature=0.5"]).prompt == prompt


def test_plain_settings_are_typed_and_given_once() -> None:
    from sft.merge.__main__ import main as merge

    config = merge.compose(["adapter=a", "output=b", "overwrite=true", "base=null"])
    assert (config.overwrite, config.base) == (True, None)
    with pytest.raises(ConfigError) as caught:
        merge.compose(["run=a", "run=b", "overwrite=maybe", "dtype=bf16", "--x", "outptu=c"])
    settings = [problem.setting for problem in caught.value.problems]
    assert settings == ["run=b", "--x", "overwrite=maybe", "outptu=c", "dtype=bf16"]


def test_a_setting_given_twice_is_refused() -> None:
    assert [problem.setting for problem in refused("lora.r=4", "lora.r=8")] == ["lora.r=8"]
    assert refused("model=tiny", "model=gpt2")[0].rule == "model is given twice"


@pytest.mark.parametrize(
    ("override", "fix"),
    [
        ("zero=2", "zero=stage2"),
        ("quantization=4bit", "quantization=nf4"),
        ("model=Qwen/Qwen3-0.6B", "model=hf model.name_or_path=Qwen/Qwen3-0.6B"),
        ("dataset=me/rows", "dataset=jsonl dataset.path=me/rows"),
        ("dataset=s3://b/r.csv", "dataset=jsonl dataset.path=s3://b/r.csv"),
        ("dataset=demmo", "did you mean demo?"),
        ("experiment=foo", "choose one of them"),
    ],
)
def test_what_was_meant_by_an_option(override: str, fix: str) -> None:
    assert one_refused(override)[2] == fix


def test_options_may_stand_between_overrides(tmp_path: Path, capsys) -> None:
    main(["lora.r=4", "--config-dir", str(tmp_path), "seed=7", "--cfg", "job"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["lora"]["r"], shown["seed"]) == (4, 7)


def test_a_refusal_reaches_the_sweep_that_started_it(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "error"
    monkeypatch.setenv("SFT_ERROR_FILE", str(file))
    with pytest.raises(SystemExit, match="2"):
        main(["lora.r=0"])
    assert file.read_text().startswith("1 setting is refused\n\nlora.r=0\n")


def test_cfg_prints_the_composed_config(capsys) -> None:
    main(["--cfg", "job", "model=gpt2", "lora.r=4"])
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["name_or_path"] == "openai-community/gpt2"
    assert shown["lora"]["r"] == 4
    assert set(shown) == {field.name for field in dataclasses.fields(Config)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["-m", "--cfg", "job"],
            "--cfg\n    cannot print a sweep: each trial has its own config\n",
        ),
        (["--config-name", "x"], "--config-name x\n    this option of Hydra is not supported\n"),
        (["--config-path", "x"], "--config-path x\n    this option of Hydra is not supported\n"),
        (
            ["--cfg", "job", "--package", "lora"],
            "--package lora\n    this option of Hydra is not supported\n",
        ),
        (
            ["--experimental-rerun", "x"],
            "--experimental-rerun x\n    this option of Hydra is not supported\n",
        ),
    ],
)
def test_options_that_would_be_ignored_are_refused(argv: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["lora.r=1,2", "lora.drop_out=0.1"], "lora.drop_out=0.1\n    there is no such setting"),
        (["lora.rr=1,2"], "lora.rr=1,2\n    there is no such setting"),
        (["model=gpt2,tinny"], "model=tinny\n    model has no option tinny"),
        (["model=choice(gpt2,tinny)"], "model=tinny\n    model has no option tinny"),
        (["model=gpt2,tiny", "zero=stage9"], "zero=stage9\n    zero has no option stage9"),
    ],
)
def test_a_sweep_none_of_whose_trials_can_be_right_is_refused(
    argv: list[str], message: str, capsys
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["-m", *argv])
    error = capsys.readouterr().err
    assert error.startswith("error: 1 setting is refused\n")
    assert message in error


def test_a_bug_shows_its_traceback(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(config: Config) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("time.sleep", lambda seconds: None)  # another rank may speak first
    monkeypatch.setenv("RANK", "1")  # whichever rank it happens on
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="1"):
        dataclasses.replace(main, run=fails)([])
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("error: rank 1: ZeroDivisionError: a bug\n")


def test_a_full_disk_is_an_error_without_a_traceback(capsys) -> None:
    def fails(config: Config) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x/y")

    with pytest.raises(SystemExit, match="1"):
        dataclasses.replace(main, run=fails)([])
    assert capsys.readouterr().err == (
        "error: No space left on device: x/y\n"
        "    fix: free some space, or choose a folder that can be written to\n"
    )


def test_an_interrupt_exits_130(capsys) -> None:
    def interrupted(config: Config) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        dataclasses.replace(main, run=interrupted)([])
    assert capsys.readouterr().err == "error: interrupted\n"
