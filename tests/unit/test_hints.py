"""Names of other tools are answered with our setting and the user's value, or with the reason."""

import re
import subprocess
from typing import Any

import pytest

from sft.cli.options import parse
from sft.config import names
from sft.config.compose import typed_config
from sft.config.foreign import CONVERTED, DEFAULT, DIFFERS, NOT_OURS, Key
from sft.config.foreign_others import NESTED
from sft.config.grammar import hydra_text
from sft.config.rules import declared, rule_problems
from sft.config.settings import Config
from sft.config.settings_file import field_of
from sft.errors import ConfigError
from sft.train import main as train

# Names that are a group or a section of ours, so that they never reach a hint.
OURS = {"model", "dataset", "template", "lora", "train", "zero", "quantization", "resume"}
# Values that a setting takes, by its type; a key with an example has that.
TYPICAL = {"bool": True, "int": 64, "float": 0.25, "str": "word", "Any": "word"}
SETTINGS = dict(declared(Config))
TYPICAL_OF = {
    "train.eval_strategy": "steps",
    "train.save_strategy": "steps",
    "train.gradient_checkpointing": True,
    "train.padding_free": True,
    "train.warmup_steps": 100,
    "quantization.bnb_4bit_quant_type": "fp4",
    "template.kwargs": {"enable_thinking": False},
    "model.attn_implementation": "sdpa",
}


def value_for(key: Key) -> Any:
    """Give a value that users write for a key."""
    if key.example not in (None, ""):
        return key.example
    setting = key.ours.partition(" ")[0].rstrip(",;")
    if setting in TYPICAL_OF:
        return TYPICAL_OF[setting]
    field = field_of(Config, setting) if setting else None
    if field is None or isinstance(field, type):
        return True
    kind = str(field.type).partition(" |")[0]
    if setting.count(".") > 1:
        return True
    if kind.startswith("dict"):
        return {"a": 1}
    return {"list[str]": ["word"]}.get(kind, TYPICAL.get(kind, "word"))


def every() -> dict[str, Any]:
    """Map every name of the tables to a value that users write for it."""
    found = {name: value_for(key) for keys in names.TABLES.values() for name, key in keys.items()}
    return {name: value for name, value in found.items() if name not in OURS}


EVERY = every()


def words_of(hint: str) -> list[list[str]]:
    """Give the words that each alternative of a hint names, without what is said in brackets."""
    if hint.startswith(("remove it", "did you mean")) or "=N, with N" in hint:
        return []
    found = [re.sub(r" \((?!.*\) \().*\)$", "", part) for part in hint.split("), or ")]
    return [re.findall(r"(?:^|(?<= ))[\w.]+=(?:\{.*?\}|\[.*?\]|'.*?'|\S+)", text) for text in found]


def test_the_table_knows_the_names_of_seven_tools() -> None:
    assert {tool: len(keys) >= 20 for tool, keys in names.TABLES.items()} == dict.fromkeys(
        (
            *("axolotl", "llamafactory", "trl", "peft", "unsloth", "ms-swift", "torchtune"),
            "others",
        ),
        True,
    )
    assert len(EVERY) >= 600
    foreign = {name for name in EVERY if name not in {key.rpartition(".")[2] for key in SETTINGS}}
    assert len(foreign) >= 550


def test_every_name_is_answered_with_the_setting_and_the_value_or_with_the_reason() -> None:
    counts = dict.fromkeys((CONVERTED, DIFFERS, DEFAULT, NOT_OURS), 0)
    for name, value in EVERY.items():
        outcomes = names.found(name, value).values()
        hint = names.suggest(name, Config, value)
        meant = {item.words() for item in outcomes if item.settings}
        for item in outcomes:
            counts[item.kind] += 1
        if meant:
            alternatives = words_of(hint)
            assert alternatives, (name, value, hint)
            assert {" ".join(words) for words in alternatives} <= meant, (name, hint, meant)
        elif hint.startswith("remove it: "):
            assert hint.removeprefix("remove it: ") in {item.note for item in outcomes}, name
        else:
            assert any(item.kind == DIFFERS and item.note == hint for item in outcomes), name
    assert min(counts.values()) > 40, counts


def test_every_suggested_setting_is_accepted() -> None:
    """In one composition for many hints; each setting is one that the rules allow too."""
    tried: dict[str, str] = {}
    for name, value in EVERY.items():
        for words in words_of(names.suggest(name, Config, value)):
            for word in words:
                tried.setdefault(word, name)
    assert len(tried) >= 150
    rounds: list[dict[str, str]] = []  # words of different settings
    for word in tried:
        key = word.partition("=")[0]
        place = next((one for one in rounds if key not in one), None)
        if place is None:
            rounds.append(place := {})
        place[key] = word
    for words in rounds:
        given, problems = train.read(list(words.values()))
        config, found = typed_config(Config, "train", given, None)
        wrong = [*problems, *found, *rule_problems(config)]
        assert [(p.setting, p.rule, p.fix) for p in wrong] == []


@pytest.mark.parametrize("section", ["train", "dataset", "model", "lora", "template"])
def test_in_a_section_a_name_is_answered_as_on_the_line(section: str) -> None:
    for name, value in EVERY.items():
        path = f"{section}.{name}"
        if path in SETTINGS or path in NESTED:
            continue
        hint, alone = names.suggest(path, Config, value), names.suggest(name, Config, value)
        extra = f"{section}.extra.{name}={hydra_text(value)}"
        assert hint in (alone, extra), (path, hint, alone)


# The hints that changed a run into another, and those that said "remove it" of what sft has.
HINTS = (
    ("adapter_name_or_path=x", "lora.init_from=x"),
    ("early_stopping_patience=3", "train.early_stopping_patience=3"),
    ("metric_for_best_model=eval_hard_loss", "train.metric=eval_hard_loss"),
    ("disable_gradient_checkpointing=true", "train.gradient_checkpointing=false"),
    ("train_on_inputs=true", "template.train_on=all"),
    ("train_on_inputs=false", "remove it: sft does so anyway"),
    ("train_on_prompt=true", "template.train_on=all"),
    ("mix_strategy=interleave_under", "remove it: dataset.mix.NAME.weight=W"),
    ("model.rope_scaling={type: linear}", "model.config.rope_scaling={type:linear}"),
    ("model.rope_scaling=linear", "remove it: model.config.rope_scaling needs all values"),
    ("dataset.type=alpaca", "template=alpaca"),
    ("dataset.type=chat_template", "template=chat"),
    ("dataset.val_size=0.1", "dataset.eval_fraction=0.1"),
    ("template.mask_history=true", "template.train_on=last_assistant"),
    ("template.eos_token=<|im_end|>", "model.eos_token='<|im_end|>'"),
    ("dataset.packing=true", "dataset.packing=bfd"),
    ("group_by_length=true", "remove it: sft shuffles rows by the seed alone"),
    ("lora_r=64", "lora.r=64"),
    ("val_set_size=0.1", "dataset.eval_fraction=0.1"),
    ("val_size=0.2", "dataset.eval_fraction=0.2"),
    ("optimizer=adamw_8bit", "train.optim=adamw_8bit"),
    ("flash_attention=true", "model.attn_implementation=flash_attention_2 (needs the package"),
    ("flash_attn=fa2", "model.attn_implementation=flash_attention_2"),
    ("max_samples=100", "dataset.max_rows=100"),
    ("preprocessing_num_workers=16", "dataset.num_proc=16"),
    ("additional_target=embed_tokens,lm_head", "lora.modules_to_save=[embed_tokens,lm_head]"),
    ("pissa_init=true", "lora.extra.init_lora_weights=pissa"),
    ("default_system=Hello", "template.system=Hello"),
    ("adapter=qlora", "quantization=nf4"),
    ("adapter=lora", "remove it: sft does so anyway"),
    ("finetuning_type=full", "lora=none"),
    ("neftune_noise_alpha=5", "train.extra.neftune_noise_alpha=5"),
    ("ddp_timeout=180000000", "train.extra.ddp_timeout=180000000"),
    ("torch_compile=true", "train.extra.torch_compile=true"),
    ("report_to=wandb", "tracker.wandb=true"),
    ("enable_liger_kernel=true", "train.extra.use_liger_kernel=true"),
    ("lora_model_dir=out/adapter", "lora.init_from=out/adapter"),
    ("tokenized_path=x", "remove it: samples are cached by content; sft data output=DIR"),
    ("cosine_min_lr_ratio=0.1", "train.lr_scheduler_type=cosine_with_min_lr train.lr_sched"),
    ("hub_model_id=me/x", "remove it: hf upload USER/NAME outputs/RUN/adapter"),
    ("pure_bf16=true", "precision=bf16 (adapters stay in float32)"),
    ("bf16=false", "precision=fp32"),
    ("fp16=false", "remove it: sft does so anyway"),
    ("quantization_bit=8", "quantization=int8"),
    ("lora_target=q_proj,v_proj", "lora.target_modules=[q_proj,v_proj]"),
    ("train.use_galore=true", "remove it: sft has no GaLore"),
    ("use_unsloth=true", "remove it: sft has its own kernels"),
    ("fsdp=full_shard", "zero=stage3 (sft splits by DeepSpeed ZeRO"),
    ("push_to_hub=true", "remove it: hf upload"),
    ("zero.stage=2", "zero=stage2"),
    ("train.learning_rat=1e-4", "did you mean train.learning_rate?"),
    ("emu=1", "remove it"),
    ("train.zzz=1", "remove it"),
    ("lora.dropuot=0.1", "did you mean lora.lora_dropout?"),
)


def test_the_hints_of_real_configurations() -> None:
    """Many in one composition; names that are there twice are in different ones."""
    rounds: list[dict[str, tuple[str, str]]] = []
    for word, hint in HINTS:
        name = word.partition("=")[0]
        place = next((one for one in rounds if name not in one), None)
        if place is None:
            rounds.append(place := {})
        place[name] = (word, hint)
    for place in rounds:
        with pytest.raises(ConfigError) as refused:
            train.compose([word for word, _ in place.values()])
        fixes = {p.setting.partition("=")[0]: p.fix for p in refused.value.problems}
        assert fixes.keys() >= place.keys()
        wrong = {name for name, (_, hint) in place.items() if not fixes[name].startswith(hint)}
        assert not wrong, {name: fixes[name] for name in wrong}


@pytest.mark.parametrize(
    ("words", "fixes"),
    [
        ("--learning_rate 1e-4", ["train.learning_rate=0.0001"]),
        ("--learning-rate 1e-4", ["train.learning_rate=0.0001"]),
        ("--lora_rank=64", ["lora.r=64"]),
        (
            "--lora_r 64 --bf16 --output_dir out --load_in_4bit true",
            ["lora.r=64", "precision=bf16", "output_dir=out", "quantization=nf4"],
        ),
        ("--lora.r 8", ["lora.r=8"]),
        ("--model opt-125m", ["model=opt-125m"]),
        ("--max_steps -1", ["train.max_steps=-1"]),
        ("--jsn", ["did you mean --json?"]),
        ("--nonsense 3", ["remove it; a setting is written as NAME=VALUE"]),
    ],
)
def test_options_of_other_tools_are_answered_with_their_values(
    words: str, fixes: list[str]
) -> None:
    with pytest.raises(ConfigError) as refused:
        parse(words.split())
    assert [problem.fix for problem in refused.value.problems] == fixes


def test_secrets_are_not_repeated() -> None:
    for name in ("hub_token", "comet_api_key", "swanlab_api_key", "hf_hub_token"):
        assert "sesame" not in names.suggest(name, Config, "sesame")


@pytest.mark.parametrize("value", ["a b", "it's", "a,b", "$(id)", "<|end|>", '"q"', "#5", "null"])
@pytest.mark.parametrize("key", ["special_eos", "optim_args", "columns"])
def test_a_hint_may_be_typed_in_a_shell(key: str, value: str) -> None:
    name = {"special_eos": "eos_token"}.get(key, key)
    given = {"prompt": value, "completion": "b"} if key == "columns" else value
    hint = names.suggest(name, Config, given)
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {hint}"], capture_output=True, text=True, check=True
    ).stdout.split("\0")[:-1]
    [override], problems = train.read(words)
    assert problems == [] and override.value == given


def test_a_value_that_is_no_value_of_a_setting_leaves_nothing_behind() -> None:
    for value in ("${HOME}", {"a b": [1]}, float("inf"), "${a.b}"):
        for name in ("lr", "rank_pattern", "chat_template_kwargs", "log_every_n_steps", "alpha"):
            names.suggest(name, Config, value)
    assert names.suggest("preserve_thinking", Config, True) == (
        "template.kwargs.preserve_thinking=true"
    )


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("lora_r=8,16", "lora.r=8,16"),
        ("cutoff_len=512,1024", "dataset.max_length=512,1024"),
        ("nosuch=1,2", "remove it"),
        ("adapter=lora,qlora", "remove it: sft trains LoRA adapters, or every weight"),
    ],
)
def test_a_sweep_over_a_name_of_another_tool_keeps_its_values(word: str, fix: str) -> None:
    _, [problem] = train.read([word], None, True)
    assert problem.fix.startswith(fix)
