"""Every rule and every impossible combination, refused once, with its reason and its fix."""

from typing import Any

import pytest

from sft import process
from sft.config import names, packages, rules, upstream
from sft.config.checks import check
from sft.config.settings import Config
from sft.errors import Problem


def legal_config(**settings: Any) -> Config:
    """Build a config without problems, then change settings, given with __ for dots."""
    config = Config()
    config.model.name_or_path = "facebook/opt-125m"
    config.dataset.path = "rows.jsonl"
    config.template.prompts = ["{prompt}"]
    config.template.completions = ["{completion}"]
    for key, value in settings.items():
        *sections, name = key.split("__")
        node = config
        for section in sections:
            node = getattr(node, section)
        assert hasattr(node, name), key
        setattr(node, name, value)
    return config


def found(**settings: Any) -> list[tuple[str, str, str]]:
    problems = check(legal_config(**settings))
    return [(problem.setting, problem.rule, problem.fix) for problem in problems]


@pytest.fixture(autouse=True)
def every_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every optional package; test_packages has the refusals of those that are missing."""
    monkeypatch.setattr(packages, "installed", lambda module: True)


def test_the_base_of_these_tests_is_legal() -> None:
    assert found() == []


# A field's own rule


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("seed", -1, ("seed=-1", "must be from 0 to 4294967295", "seed=42")),
        (
            "precision",
            "half",
            ("precision=half", "must be one of auto, fp32, bf16, fp16", "precision=auto"),
        ),
        (
            "model__attn_implementation",
            "flash",
            (
                "model.attn_implementation=flash",
                "must be one of auto, packed, eager, sdpa, flash_attention_2, flash_attention_3, "
                "flex_attention",
                "model.attn_implementation=auto",
            ),
        ),
        (
            "dataset__eval_fraction",
            1.0,
            (
                "dataset.eval_fraction=1.0",
                "must be at least 0 and less than 1",
                "dataset.eval_fraction=0.0",
            ),
        ),
        (
            "dataset__max_rows",
            0,
            ("dataset.max_rows=0", "must be at least 1", "dataset.max_rows=null"),
        ),
        (
            "dataset__max_length",
            7,
            ("dataset.max_length=7", "must be at least 8", "dataset.max_length=1024"),
        ),
        (
            "dataset__overlong",
            "cut",
            (
                "dataset.overlong=cut",
                "must be one of truncate, drop, split, error",
                "dataset.overlong=error",
            ),
        ),
        ("lora__r", 0, ("lora.r=0", "must be from 1 to 65536", "lora.r=8")),
        (
            "lora__lora_dropout",
            1.0,
            (
                "lora.lora_dropout=1.0",
                "must be at least 0 and less than 1",
                "lora.lora_dropout=0.0",
            ),
        ),
        (
            "train__learning_rate",
            0.0,
            ("train.learning_rate=0.0", "must be greater than 0", "train.learning_rate=0.0002"),
        ),
        (
            "train__learning_rate",
            float("inf"),
            ("train.learning_rate=inf", "must be a finite number", "train.learning_rate=0.0002"),
        ),
        (
            "train__num_train_epochs",
            float("nan"),
            ("train.num_train_epochs=nan", "must be a finite number", "train.num_train_epochs=3.0"),
        ),
        (
            "train__save_total_limit",
            0,
            ("train.save_total_limit=0", "must be at least 1", "train.save_total_limit=2"),
        ),
    ],
)
def test_a_value_against_its_fields_rule(key: str, value: Any, problem: Any) -> None:
    assert found(**{key: value}) == [problem]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "a.b=null"),
        (True, "a.b=true"),
        (False, "a.b=false"),
        (0.1, "a.b=0.1"),
        ([], "a.b=[]"),
    ],
)
def test_a_setting_is_written_as_it_is_typed(value: Any, text: str) -> None:
    assert rules.written("a.b", value) == text


# Combinations


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"model__name_or_path": None},
            (
                "model.name_or_path=null",
                "a base model is needed",
                "model.name_or_path=HUB_ID_OR_DIR",
            ),
        ),
        (
            {"dataset__path": None},
            ("dataset.path=null", "a dataset is needed", "dataset.path=FILE_OR_HUB_ID"),
        ),
        (
            {"dataset__streaming": True},
            (
                "dataset.streaming=true",
                "reads only the rows that train.max_steps needs, and train.max_steps is not set",
                "train.max_steps=1000",
            ),
        ),
        (
            {"run_name": "a/b"},
            ("run_name=a/b", "must be a name without a folder", "output_dir=DIR"),
        ),
        (
            {"dataset__eval_fraction": 0.1, "dataset__eval_split": "test"},
            (
                "dataset.eval_split=test, dataset.eval_fraction=0.1",
                "only one setting may choose the held-out rows",
                "dataset.eval_fraction=0",
            ),
        ),
        (
            {"dataset__exact_match": 5},
            (
                "dataset.exact_match=5",
                "needs held-out rows whose prompts the model answers",
                "dataset.eval_fraction=0.05",
            ),
        ),
        (
            {
                "dataset__exact_match": 5,
                "dataset__eval_fraction": 0.1,
                "template__kind": "text",
            },
            (
                "dataset.exact_match=5",
                "plain text has no prompt that the model could answer",
                "dataset.exact_match=0",
            ),
        ),
        (
            {"template__system": "Be brief."},
            (
                "template.system='Be brief.'",
                "only a template of kind chat has a system message",
                "template=chat",
            ),
        ),
        (
            {"template__prompts": []},
            (
                "template.prompts=[]",
                "a template of kind completion needs a prompt",
                "template=completion",
            ),
        ),
        (
            {"template__completions": []},
            (
                "template.completions=[]",
                "a template needs completions, the texts that are trained",
                "template=completion",
            ),
        ),
        (
            {"train__global_batch_size": 30},
            (
                "train.global_batch_size=30",
                "must be a multiple of per_device_train_batch_size x ranks = 4 x 1",
                "train.global_batch_size=32, or change train.per_device_train_batch_size",
            ),
        ),
        (
            {"train__eval_strategy": "steps", "dataset__eval_fraction": 0.1},
            ("train.eval_strategy=steps", "needs train.eval_steps", "train.eval_steps=100"),
        ),
        (
            {"train__eval_steps": 5},
            (
                "train.eval_steps=5",
                "has no effect with train.eval_strategy=epoch",
                "train.eval_strategy=steps",
            ),
        ),
        (
            {"train__eval_strategy": "steps", "train__eval_steps": 5},
            (
                "train.eval_strategy=steps",
                "there are no held-out rows",
                "dataset.eval_fraction=0.05",
            ),
        ),
        (
            {"train__max_steps": 0},
            ("train.max_steps=0", "no step would be trained", "train.max_steps=-1"),
        ),
        (
            {"train__warmup_steps": 1.5},
            (
                "train.warmup_steps=1.5",
                "must be a whole number of steps, or a fraction below 1",
                "train.warmup_steps=0.03",
            ),
        ),
        (
            {"train__warmup_steps": 10.0, "train__max_steps": 10},
            (
                "train.warmup_steps=10",
                "the learning rate would not reach its peak within train.max_steps=10",
                "train.warmup_steps=0.03",
            ),
        ),
        (
            {"train__optim": "adamw_toch"},
            (
                "train.optim=adamw_toch",
                "the installed version of Transformers has no such optimizer",
                "did you mean adamw_torch?",
            ),
        ),
        (
            {"train__lr_scheduler_type": "cosin"},
            (
                "train.lr_scheduler_type=cosin",
                "the installed version of Transformers has no such schedule",
                "did you mean cosine?",
            ),
        ),
        (
            {"train__lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            (
                "train.lr_scheduler_kwargs.min_lr_rate=0.1",
                "the schedule cosine has no argument min_lr_rate",
                "train.lr_scheduler_type=cosine_with_min_lr",
            ),
        ),
        (
            {"train__lr_scheduler_kwargs": {"num_cycle": 2}},
            (
                "train.lr_scheduler_kwargs.num_cycle=2",
                "the schedule cosine has no argument num_cycle",
                "did you mean num_cycles?",
            ),
        ),
        (
            {"train__lr_scheduler_type": "constant", "train__lr_scheduler_kwargs": {"a": 1}},
            (
                "train.lr_scheduler_kwargs.a=1",
                "the schedule constant has no argument a",
                "remove it",
            ),
        ),
        (
            {"train__lr_scheduler_type": "warmup_stable_decay"},
            (
                "train.lr_scheduler_type=warmup_stable_decay",
                "needs the argument num_decay_steps",
                "train.lr_scheduler_kwargs.num_decay_steps=...",
            ),
        ),
        (
            {"train__lr_scheduler_type": "cosine_with_min_lr"},
            (
                "train.lr_scheduler_type=cosine_with_min_lr",
                "needs exactly one of the arguments min_lr and min_lr_rate",
                "train.lr_scheduler_kwargs.min_lr_rate=0.1",
            ),
        ),
        (
            {"precision": "fp32", "model__attn_implementation": "flash_attention_2"},
            (
                "model.attn_implementation=flash_attention_2",
                "has no float32 kernel, but precision=fp32 is set",
                "precision=bf16, or model.attn_implementation=sdpa",
            ),
        ),
        *[
            (
                {"lora__target_modules": targets},
                (
                    f"lora.target_modules={targets}",
                    "must be 'attention', 'all-linear', a regular expression, "
                    "or a list of module names",
                    "lora.target_modules=all-linear",
                ),
            )
            for targets in ([], "", None, 5, ["q_proj", 5], {"q_proj": 8})
        ],
        *[
            (
                {"lora__target_modules": ["q_proj", named]},
                (
                    f"lora.target_modules={['q_proj', named]}",
                    f"LoRA on {head} would never train: the loss reads the head's weight directly",
                    f"lora.modules_to_save=[{head}]",
                ),
            )
            for named, head in (("lm_head", "lm_head"), ("model.embed_out", "embed_out"))
        ],
        *[
            (
                {"lora__extra": {"init_lora_weights": init}},
                (
                    f"lora.extra.init_lora_weights={init}",
                    "needs a preprocessing pass that sft does not run; PEFT would not warn",
                    "lora.extra.init_lora_weights=true",
                ),
            )
            for init in ("eva", "corda", "lora_ga", "loftq")
        ],
        *[
            (
                {
                    "lora__extra": {"init_lora_weights": init},
                    "quantization__load_in_4bit": True,
                },
                (
                    f"lora.extra.init_lora_weights={init}",
                    "changes the base weights, which cannot be changed once they are quantised",
                    "quantization=none",
                ),
            )
            for init in ("pissa", "olora", "orthogonal")
        ],
        (
            {"lora__extra": {"init_lora_weights": "mica"}, "zero__config": "stage3.json"},
            (
                "lora.extra.init_lora_weights=mica",
                "saving under ZeRO-3 omits the frozen tensors of the adapter",
                "zero=stage2",
            ),
        ),
        (
            {"lora__use_dora": True, "lora__extra": {"use_qalora": True}},
            (
                "lora.use_dora=true",
                "cannot be combined with lora.extra.use_qalora",
                "lora.use_dora=false",
            ),
        ),
        (
            {"quantization__load_in_4bit": True, "quantization__load_in_8bit": True},
            (
                "quantization.load_in_4bit=true",
                "cannot be combined with quantization.load_in_8bit=true",
                "quantization=nf4",
            ),
        ),
        (
            {"quantization__load_in_8bit": True, "lora__enabled": False},
            ("lora=none", "quantised weights cannot be trained", "lora=all-linear"),
        ),
        (
            {"model__pretrained": False},
            (
                "model.pretrained=false",
                "the adapter would be trained on random weights that are not saved with it",
                "lora=none",
            ),
        ),
        (
            {"lora__extra": {"init_lora_weights": "pissa_niter_16"}},
            (
                "lora.extra.init_lora_weights=pissa_niter_16",
                "changes the base weights at random: a loaded adapter gets a different base",
                "lora.extra.init_lora_weights=pissa",
            ),
        ),
        (
            {"lora__target_modules": "q_proj("},
            (
                "lora.target_modules=q_proj(",
                "is not a regular expression: missing ), unterminated subpattern at position 6",
                "lora.target_modules=all-linear",
            ),
        ),
        (
            {"template__prompts": ['{"q": "{prompt}"}']},
            (
                """template None: '{"q": "{prompt}"}'""",
                'the text between braces is not a column name: "q": "{prompt}"',
                "write {{ and }} for braces that are part of the text",
            ),
        ),
        (
            {"dataset__packing": "wrapped"},
            (
                "dataset.packing=wrapped",
                "would separate prompts from their answers; it is for plain text only",
                "dataset.packing=bfd",
            ),
        ),
        (
            {"dataset__order": "random"},
            (
                "dataset.order='random'",
                "needs dataset.packing=wrapped or boundary; else the trainer shuffles samples",
                "dataset.order=given",
            ),
        ),
        (
            {"dataset__sanitize": True},
            ("dataset.sanitize=True", "is for plain text only", "dataset.sanitize=false"),
        ),
        (
            {"dataset__warn_above": {"duplicate": 0.1}},
            (
                "dataset.warn_above.duplicate=0.1",
                "the checks are nothing_trained, never_stops, prompt_differs, answer_cut, "
                "double_bos, control_tokens, empty_answers, duplicates, near_duplicates, "
                "eval_in_train, eval_near_train",
                "did you mean duplicates?",
            ),
        ),
        (
            {"dataset__stop_above": {"duplicates": 2}},
            (
                "dataset.stop_above.duplicates=2",
                "must be a fraction from 0 to 1",
                "dataset.stop_above.duplicates=1",
            ),
        ),
        (
            {"dataset__mix": {"a": {"path": "b.jsonl"}}},
            ("dataset.path, dataset.mix", "only one of the two may be set", "dataset.path=null"),
        ),
        (
            {"dataset__path": None, "dataset__mix": {"a": {"wieght": 2}}},
            (
                "dataset.mix.a={'wieght': 2}",
                "needs a path",
                "dataset.mix.a={path: FILE, weight: 1}",
            ),
        ),
        (
            {"dataset__path": None, "dataset__mix": {"a": {"path": "b", "wieght": 2}}},
            (
                "dataset.mix.a.wieght=2",
                "the keys of a source are columns, max_rows, path, roles, split, subset, weight",
                "did you mean weight?",
            ),
        ),
        (
            {"dataset__path": None, "dataset__mix": {"a": {"path": "b", "weight": 0}}},
            ("dataset.mix.a.weight=0", "must be above 0", "dataset.mix.a.weight=1"),
        ),
        *(
            (
                {"dataset__path": None, "dataset__mix": {"a": {"path": "b", "max_rows": rows}}},
                (
                    f"dataset.mix.a.max_rows={rows}",
                    "must be a whole number of rows, at least 1",
                    "dataset.mix.a.max_rows=null",
                ),
            )
            for rows in (0, -5, 2.5, True, "all")
        ),
        (
            {"template__train_on": "assistant"},
            (
                "template.train_on=assistant",
                "a template of kind completion trains on completion or all",
                "template.train_on=completion",
            ),
        ),
        (
            {"output_dir": ""},
            ("output_dir=", "must not be empty", "output_dir=DIR, or leave it out"),
        ),
    ],
)
def test_impossible_combinations(settings: dict[str, Any], problem: tuple[str, str, str]) -> None:
    assert found(**settings) == [problem]


@pytest.mark.parametrize(
    "settings",
    [
        {"train__lr_scheduler_type": "constant"},
        {
            "train__lr_scheduler_type": "cosine_with_min_lr",
            "train__lr_scheduler_kwargs": {"min_lr": 1e-5},
        },
        {
            "train__lr_scheduler_type": "reduce_lr_on_plateau",
            "train__lr_scheduler_kwargs": {"patience": 3},
        },
        {"train__optim": "paged_adamw_8bit"},
        {"train__warmup_steps": 10.0, "train__max_steps": 11},
        {"precision": "bf16", "model__attn_implementation": "flash_attention_2"},
        {"lora__target_modules": r".*\.(q|v)_proj"},
        {"lora__modules_to_save": ["lm_head"]},
        {"lora__extra": {"init_lora_weights": "pissa"}},
        {"lora__extra": {"init_lora_weights": "mica"}, "zero__config": "stage2.json"},
        {"quantization__load_in_4bit": True, "zero__config": "stage3.json"},
        {"template__kind": "chat", "template__system": "Be brief."},
    ],
)
def test_possible_combinations(settings: dict[str, Any]) -> None:
    assert found(**settings) == []


@pytest.mark.parametrize(
    ("world_size", "micro", "global_batch", "nearest"),
    [(1, 4, 32, None), (2, 4, 32, None), (8, 4, 32, None), (3, 4, 32, 36), (16, 4, 32, 64)],
)
def test_the_global_batch_must_fit_the_number_of_ranks(
    world_size: int,
    micro: int,
    global_batch: int,
    nearest: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    settings = {
        "train__global_batch_size": global_batch,
        "train__per_device_train_batch_size": micro,
    }
    expected = (
        f"train.global_batch_size={global_batch}",
        f"must be a multiple of per_device_train_batch_size x ranks = {micro} x {world_size}",
        f"train.global_batch_size={nearest}, or change train.per_device_train_batch_size",
    )
    assert found(**settings) == ([expected] if nearest else [])


def test_world_size_is_what_torchrun_says() -> None:
    assert process.world_size({}) == 1
    assert process.world_size({"WORLD_SIZE": "8"}) == 8


def test_every_problem_of_every_section_comes_at_once() -> None:
    problems = found(
        seed=-1,
        dataset__path=None,
        train__global_batch_size=30,
        lora__target_modules=["lm_head"],
        zero__config="stage9.json",
        train__extra={"packing": True},
    )
    assert [setting for setting, _, _ in problems] == [
        "seed=-1",
        "dataset.path=null",
        "train.global_batch_size=30",
        "lora.target_modules=['lm_head']",
        "train.extra.packing=True",
        "zero.config=stage9.json",
    ]


# What stands in extra


@pytest.mark.parametrize(
    ("section", "key", "rule", "fix"),
    [
        ("train", "learning_rate", "has a setting of its own", "train.learning_rate=1"),
        ("lora", "use_dora", "has a setting of its own", "lora.use_dora=1"),
        ("quantization", "load_in_4bit", "has a setting of its own", "quantization.load_in_4bit=1"),
        ("train", "bf16", "is set by sft itself", "precision=bf16"),
        ("train", "deepspeed", "is set by sft itself", "zero=stage1"),
        ("train", "max_length", "is set by sft itself", "did you mean dataset.max_length?"),
        ("lora", "task_type", "is set by sft itself", "remove it: CAUSAL_LM"),
        (
            "train",
            "auto_find_batch_size",
            "is set by sft itself",
            "remove it: set train.per_device_train_batch_size; the global batch stays",
        ),
        (
            "train",
            "warmup_ratio",
            "the installed version has no setting warmup_ratio",
            "train.warmup_steps=1 (below 1 it is a share of all steps)",
        ),
        (
            "train",
            "max_seq_length",
            "the installed version has no setting max_seq_length",
            "did you mean dataset.max_length?",
        ),
        (
            "train",
            "adam_betta2",
            "the installed version has no setting adam_betta2",
            "did you mean adam_beta2?",
        ),
        (
            "lora",
            "init_lora_weight",
            "the installed version has no setting init_lora_weight",
            "did you mean init_lora_weights?",
        ),
        (
            "quantization",
            "bnb_4bit_compute_type",
            "the installed version has no setting bnb_4bit_compute_type",
            "did you mean bnb_4bit_compute_dtype?",
        ),
        ("train", "zzz", "the installed version has no setting zzz", "remove it"),
    ],
)
def test_extra_is_checked(section: str, key: str, rule: str, fix: str) -> None:
    assert found(**{f"{section}__extra": {key: 1}}) == [(f"{section}.extra.{key}=1", rule, fix)]


def test_extra_takes_what_upstream_has() -> None:
    settings = {
        "train__padding_free": False,
        "train__extra": {"adam_beta2": 0.95, "neftune_noise_alpha": 5, "tf32": True},
        "lora__extra": {"bias": "none", "layers_to_transform": [0]},
        "quantization__extra": {"bnb_4bit_quant_storage": "bfloat16"},
    }
    assert found(**settings) == []


def test_the_settings_that_we_own_exist_upstream() -> None:
    assert len(names.TRAIN_OWNED) >= 41
    assert names.TRAIN_OWNED - upstream.sft_config_names() == set()
    assert names.LORA_OWNED - upstream.lora_config_names() == set()


def test_a_problem_reads_as_setting_rule_and_fix() -> None:
    assert str(Problem("lora.r=0", "must be from 1 to 65536", "lora.r=8")) == (
        "lora.r=0\n    must be from 1 to 65536\n    fix: lora.r=8"
    )
