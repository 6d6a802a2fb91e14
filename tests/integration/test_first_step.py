"""What trains is known before the first step, on models in which an adapter may not be reached."""

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import yaml
from safetensors import safe_open
from support import FAMILIES, TINY, build_model, losses, records
from warm import run_warm

from sft import prove
from sft.errors import ConfigError, MergeError, RunError
from sft.train import main, train
from sft.training import resumable

FAMILIES_HERE: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 8},
    "mamba2": {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "granitemoe": {
        "intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
    },
}


def go(base: Path, rows: Path, run: Path, *more: str, steps: int = 2) -> Path:
    """Train in this process."""
    overrides = [*settings(base, rows), f"output_dir={run}", f"train.max_steps={steps}", *more]
    train(main.compose(overrides))
    return run


def settings(base: Path, rows: Path) -> list[str]:
    return [
        *("model=hf", f"model.name_or_path={base}", "dataset=jsonl", f"dataset.path={rows}"),
        *("template=chat", "train.global_batch_size=4", "train.per_device_train_batch_size=2"),
        *("train.warmup_steps=0", "train.logging_steps=1", "train.learning_rate=1e-2"),
        *("precision=fp32", "train.max_forgetting=null"),
    ]


def adapter(run: Path) -> tuple[set[str], dict[str, Any]]:
    """Return the names of the adapter's tensors, and its settings."""
    with safe_open(run / "adapter" / "adapter_model.safetensors", "pt") as file:
        names = set(file.keys())
    return names, json.loads((run / "adapter" / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a Gemma-3 with a vision tower, which no text reaches."""
    from transformers import AutoTokenizer, Gemma3Config, Gemma3ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    size, common = len(tokenizer), {"num_hidden_layers": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={
            **common,
            **{"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2},
            **{"head_dim": 16, "vocab_size": size + 8, "bos_token_id": None},
            **{"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id},
        },
        vision_config={
            **common,
            **{"hidden_size": 32, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        },
        image_token_id=size + 1,
        boi_token_id=size + 2,
        eoi_token_id=size + 3,
        mm_tokens_per_image=4,
    )
    folder = tmp_path_factory.mktemp("models") / "gemma3"
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def families() -> Any:
    added = FAMILIES_HERE.keys() - FAMILIES.keys()
    FAMILIES.update(FAMILIES_HERE)
    yield
    for name in added:
        del FAMILIES[name]


def test_adapters_that_no_gradient_reaches_are_left_out(
    tmp_path: Path, vision: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sft")
    names, made = adapter(go(vision, rows, tmp_path / "run"))
    assert len(names) == 28 and not [name for name in names if "language_model" not in name]
    assert made["exclude_modules"] == "model.vision_tower.*"
    assert "15 adapters are left out, because no gradient reaches them" in caplog.text
    fix = re.search(r"as with '(lora\.extra[^']*)'", caplog.text)
    assert fix is not None
    assert adapter(go(vision, rows, tmp_path / "said", fix[1]))[0] == names


def test_weights_that_no_gradient_reaches_are_not_trained(
    tmp_path: Path, vision: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """DDP would wait for their gradients, and the ranks' weights would differ."""
    caplog.set_level(logging.INFO, "sft")
    more = [f"output_dir={tmp_path / 'run'}", "train.max_steps=2", "lora=none"]
    done = run_warm("train", *settings(vision, rows), *more, ranks=2, cwd=tmp_path)
    said = "no gradient reaches them: model.multi_modal_projector.*, model.vision_tower.*"
    assert said in done.stdout + done.stderr


def test_under_zero_3_the_run_is_refused_with_a_fix_that_works(
    tmp_path: Path, vision: Path, rows: Path
) -> None:
    more = [*settings(vision, rows), "output_dir=run", "train.max_steps=2", "zero=stage3"]
    refused = run_warm("train", *more, ranks=2, cwd=tmp_path, check=False)
    said = refused.stdout + refused.stderr
    fix = re.search(r"no gradient reaches 15 of the adapters\n    fix: (.*)", said)
    assert refused.returncode == 2 and fix is not None, said
    assert shlex.split(fix[1]) == [
        'lora.extra.exclude_modules="model.vision_tower.*"',
        "overwrite=true",
    ]
    run_warm("train", *more, *shlex.split(fix[1]), cwd=tmp_path)
    assert len(adapter(tmp_path / "run")[0]) == 28


@pytest.mark.parametrize(
    ("family", "left", "kept"),
    [
        ("mamba", {"dt_proj", "out_proj"}, {"in_proj", "x_proj"}),
        ("mamba2", {"out_proj"}, {"in_proj"}),
    ],
)
def test_mamba_trains_with_default_settings(
    tmp_path: Path, rows: Path, family: str, left: set[str], kept: set[str]
) -> None:
    base = build_model(tmp_path / "base", family, tied=False)
    names, made = adapter(go(base, rows, tmp_path / "run", "train.padding_free=false"))
    assert {name.split(".")[-3] for name in names} == kept
    for name in left:
        assert re.fullmatch(made["exclude_modules"], f"backbone.layers.0.mixer.{name}")
    targets = "lora.target_modules=[in_proj,out_proj]"
    with pytest.raises(ConfigError, match=r"fix: lora.target_modules=\[in_proj\]"):
        go(base, rows, tmp_path / "other", targets)


def test_a_mixture_of_experts_resumes_and_says_what_it_trains(
    tmp_path: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT writes ranks of the stacked experts into its config, which is a copy."""
    caplog.set_level(logging.INFO, "sft")
    base = build_model(tmp_path / "base", "qwen3_moe", tied=False)
    more = ["train.save_strategy=steps", "train.save_steps=2"]
    run = go(base, rows, tmp_path / "run", *more, steps=4)
    assert "experts and routers have adapters (lora.target_modules=attention" in caplog.text
    assert yaml.safe_load((run / "config.yaml").read_text())["lora"]["rank_pattern"] == {}
    straight, logged = (run / "adapter" / "adapter_model.safetensors").read_bytes(), losses(run)
    prove.cut_back(run, 2)
    go(base, rows, run, *more, steps=4)
    assert "resuming from" in caplog.text
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == straight
    assert losses(run) == logged


def test_the_balancing_loss_of_granite_is_computed_or_left_out(
    tmp_path: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sft")
    base = build_model(tmp_path / "base", "granitemoe", tied=False)
    balanced = losses(go(base, rows, tmp_path / "balanced", steps=1))[0]
    added = re.search(
        r"experts and routers have none \((lora\.extra\.\S*) adds them\)", caplog.text
    )
    assert added is not None
    plain = go(
        base, rows, tmp_path / "plain", "train.extra.router_aux_loss_coef=0", added[1], steps=1
    )
    # Four experts, two a token: the loss is about 2, and its coefficient 0.001.
    assert balanced - losses(plain)[0] == pytest.approx(0.002, rel=0.2)
    assert any(".experts." in name for name in adapter(plain)[0])


def test_a_model_with_experts_answers_while_it_trains(tmp_path: Path, rows: Path) -> None:
    """TRL makes its config ask for the routers' scores, which do not fit the mask of all tokens."""
    base = small_models.build(tmp_path / "base", "mixtral")
    answers = ("dataset.exact_match=2", "dataset.eval_fraction=0.2")
    run = go(base, rows, tmp_path / "run", "lora=none", *answers, steps=1)
    shares = [record for record in records(run) if "exact_match" in record]
    assert [record["step"] for record in shares] == [0, 1]
    kept = [json.loads((path / "config.json").read_text()) for path in (base, run / "model")]
    assert kept[0]["router_aux_loss_coef"] > 0
    for name in resumable.CHANGED:
        assert kept[0].get(name) == kept[1].get(name), name


def test_peft_is_asked_before_weights_load(tmp_path: Path, rows: Path) -> None:
    base = build_model(tmp_path / "base", "qwen3_moe", tied=False)
    (base / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"does not work with lora_dropout") as refused:
        go(base, rows, tmp_path / "run", "lora.lora_dropout=0.1")
    assert "fix: lora.lora_dropout=0.0, or lora.target_modules=attention" in str(refused.value)


# More steps, and a start from an adapter


def test_a_finished_run_is_extended(
    tmp_path: Path, llama: Path, rows: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """From the last checkpoint on, the learning rate is that of the longer run."""
    caplog.set_level(logging.INFO, "sft")
    run = go(llama, rows, tmp_path / "run", steps=2)
    with pytest.raises(RunError, match="is finished") as refused:
        go(llama, rows, run, steps=2)
    allow = re.search(r"'(resume\.allow=\[train\.max_steps\])'", str(refused.value))
    assert allow is not None
    go(llama, rows, run, allow[1], steps=4)
    assert "the finished run is extended from 2 to 4 steps" in caplog.text
    straight = go(llama, rows, tmp_path / "straight", steps=4)
    rates = [[r["learning_rate"] for r in records(each) if "loss" in r] for each in (run, straight)]
    assert rates[0][2:] == rates[1][2:] and len(rates[0]) == 4
    with pytest.raises(RunError, match="has made 4 steps, and 3 are asked for"):
        go(llama, rows, run, allow[1], steps=3)
    with pytest.raises(RunError, match=r"the run in .* is finished\n"):
        go(llama, rows, run, steps=4)


def test_a_finished_run_without_checkpoint_can_only_be_started_from(
    tmp_path: Path, llama: Path, rows: Path
) -> None:
    run = go(llama, rows, tmp_path / "run", "train.save_strategy=no")
    allow = ("train.save_strategy=no", "resume.allow=[train.max_steps]")
    with pytest.raises(RunError, match="no checkpoint to continue from") as refused:
        go(llama, rows, run, *allow, steps=4)
    (fix,) = re.findall(r"lora\.init_from=\S+", str(refused.value))
    second = go(llama, rows, tmp_path / "second", fix, steps=1)
    assert adapter(second)[0] == adapter(run)[0]
    ends, starts = (
        [r["eval_loss"] for r in records(each) if "eval_loss" in r] for each in (run, second)
    )
    assert starts[0] == ends[-1] != ends[0]
    identity = json.loads((second / "run.json").read_text())["identity"]
    assert len(identity["adapter"]) == 32


def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, llama: Path, rows: Path, vision: Path
) -> None:
    run = go(llama, rows, tmp_path / "run", steps=2)
    start = f"lora.init_from={run}"
    for more, rule, fix in (
        ("lora.r=4", f"{run}/adapter has r=8", "lora.r=8"),
        ("lora.lora_alpha=8", "has lora_alpha=16", "lora.lora_alpha=16"),
        ("lora.target_modules=attention", "only .* has .*down_proj", "lora.target_modules=[down_"),
        ("lora.rank_pattern={q_proj: 2}", "has the shape [2, 64]", "'lora.rank_pattern={}'"),
        ("lora.alpha_pattern={q_proj: 2}", "has alpha_pattern={}", "'lora.alpha_pattern={}'"),
        ("lora.modules_to_save=[norm]", "only the run's adapter", "lora.modules_to_save=null"),
    ):
        with pytest.raises(ConfigError) as refused:
            go(llama, rows, tmp_path / "new", start, more)
        (problem,) = refused.value.problems
        assert rule in problem.rule or re.search(rule, problem.rule), problem
        assert problem.fix.startswith(fix)
    with pytest.raises(ConfigError, match="is not the folder of an adapter"):
        go(llama, rows, tmp_path / "new", f"lora.init_from={tmp_path}/nothing")
    other = build_model(tmp_path / "other", "llama", tied=False, hidden_size=64, rope_theta=5e5)
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    with pytest.raises(ConfigError, match="whose weights differ from the base's"):
        go(other, rows, tmp_path / "new", start)
    assert not (tmp_path / "new").exists()
    settings = run / "adapter" / "adapter_config.json"
    sound = json.loads(settings.read_text())
    for entry, reason in (
        ({"target_modules": ["nothing"]}, "does not fit the base: Target modules"),
        ({"bias": "odd"}, "bias=odd must be one of"),
        ({"rank_pattern": {"(q_proj": 4}}, "is not a regular expression"),
        ({"modules_to_save": ["nothing"]}, "modules_to_save=nothing matches no module"),
    ):
        settings.write_text(json.dumps({**sound, **entry}))
        with pytest.raises(MergeError, match=f"{reason}(.|\n)*fix: "):
            go(llama, rows, tmp_path / "new", start)
    assert not (tmp_path / "new").exists()
