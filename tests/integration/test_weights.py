"""Which weights train, how fast, and in which precision: rates by kind, fp16, quantised bases."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import (
    FAMILIES,
    SAME_LOSS,
    assert_same_adapter,
    build_adapter,
    build_model,
    losses,
    records,
)
from warm import run_warm

from sft import prove
from sft.config import packages
from sft.errors import ConfigError, MergeError, ModelError, RunError

FILE = "adapter/adapter_model.safetensors"


def train(*overrides: str) -> None:
    from sft.train import main, train

    train(main.compose(list(overrides)))


def without(settings: list[str], *names: str) -> list[str]:
    """Leave settings out, by the beginning of their names."""
    return [item for item in settings if not item.startswith(names)]


def test_one_step_moves_each_kind_by_its_rate(
    tmp_path: Path, llama: Path, saving: list[str]
) -> None:
    """SGD's first step is the rate times the gradient, which is the same in both runs."""
    start = build_adapter(tmp_path / "start", llama, modules_to_save=["embed_tokens"])
    once = without(saving, "train.max_steps", "train.save_")
    once += [f"lora.init_from={start}", "lora.r=4", "lora.lora_alpha=8", "train.optim=sgd"]
    once += ["lora.modules_to_save=[embed_tokens]", "lora.target_modules=[q_proj,v_proj]"]
    once += ["train.max_steps=1", "train.lr_scheduler_type=constant", "train.warmup_steps=0"]
    once += ["train.save_strategy=no", "train.max_grad_norm=0"]
    train(*once, f"output_dir={tmp_path / 'plain'}")
    rates = ["train.loraplus_lr_ratio=8", "train.embedding_learning_rate=2e-2"]
    train(*once, *rates, f"output_dir={tmp_path / 'rates'}")
    before = load_file(start / "adapter_model.safetensors")
    plain, other = (load_file(tmp_path / run / FILE) for run in ("plain", "rates"))
    factors = {"lora_A": 1.0, "lora_B": 8.0, "embed_tokens": 2.0}
    for name, value in before.items():
        factor = next(factor for kind, factor in factors.items() if kind in name)
        moved, expected = other[name] - value, factor * (plain[name] - value)
        assert moved.abs().max() > 1e-5
        # Both are differences of float32 numbers of about 1.
        assert (moved - expected).abs().max() < 1e-6 + 1e-4 * expected.abs().max(), name


def test_rates_by_kind_are_the_same_under_zero_and_on_resume(
    tmp_path: Path, saving: list[str]
) -> None:
    rates = ["train.loraplus_lr_ratio=4", "train.embedding_learning_rate=1e-3"]
    rates += ["lora.modules_to_save=[embed_tokens]", "train.weight_decay=0.1"]
    one, two = tmp_path / "one", tmp_path / "two"
    train(*saving, *rates, f"output_dir={one}")
    run_warm("train", *saving, *rates, "zero=stage2", f"output_dir={two}", ranks=2, cwd=tmp_path)
    assert losses(two) == pytest.approx(losses(one), rel=SAME_LOSS)
    assert_same_adapter(two, one, rate=4e-2, steps=6)
    assert_goes_on(one, *saving, *rates)


def assert_goes_on(run: Path, *settings: str) -> None:
    """Require that a finished run, cut back to step 4, ends with the same bits."""
    straight = prove.outcome(run)
    prove.cut_back(run, 4)
    train(*settings, f"output_dir={run}")
    assert prove.differences(straight, prove.outcome(run)) == []


class Float16:
    """What a GPU does with precision=fp16, on the CPU: autocast, and a loss that is scaled."""

    scale = 2.0**16
    trainer: Any = None  # the newest one


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> Float16:
    """Let fp16 train here: sft refuses it on a CPU, where Accelerate would compute in float32."""
    import torch
    from accelerate import Accelerator

    from sft.model import precision
    from sft.training import build

    found, start, make = Float16(), Accelerator.__init__, build.make_trainer

    def scaling(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=found.scale)

    def noted(*args: Any) -> Any:
        found.trainer = make(*args)
        return found.trainer

    def as_asked(name: str, why: str, *_: Any) -> precision.Precision:
        return precision.Precision("precision", name, why)

    monkeypatch.setattr(Accelerator, "__init__", scaling)
    monkeypatch.setattr(build, "make_trainer", noted)
    monkeypatch.setattr(precision, "_on_cpu", as_asked)
    return found


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_trains_in_fp16(
    tmp_path: Path, saving: list[str], float16: Float16, quantization: str
) -> None:
    """With float32 adapters, the losses of float32 and a merge that is verified."""
    from sft.merge import __main__ as merge

    bits = [f"quantization={quantization}", "lora.modules_to_save=[embed_tokens]"]
    train(*saving, *bits, f"output_dir={tmp_path / 'fp32'}")
    run, fp16 = tmp_path / "run", [*without(saving, "precision"), *bits, "precision=fp16"]
    train(*fp16, f"output_dir={run}")
    parameters = dict(float16.trainer.model.named_parameters())
    trained = {p.dtype for p in parameters.values() if p.requires_grad}
    frozen = {p.dtype for p in parameters.values() if not p.requires_grad}
    assert trained == {torch.float32} and torch.float16 in frozen and torch.float32 not in frozen
    assert losses(run) == pytest.approx(losses(tmp_path / "fp32"), rel=2e-3)
    assert losses(run) != losses(tmp_path / "fp32")
    assert_goes_on(run, *fp16)
    merge.merge(merge.main.compose([f"run={run}"]))
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert report["passed"] and report["onto"] == "dequantized"


def test_a_step_that_overflows_in_fp16_is_left_out(
    tmp_path: Path, saving: list[str], float16: Float16
) -> None:
    """The scale is halved and neither the weights nor the schedule go on; a resume goes on so."""
    float16.scale = 2.0**20  # with 2**19, too, the gradients of the first steps overflow
    run, fp16 = tmp_path / "run", [*without(saving, "precision"), "quantization=nf4"]
    fp16 += ["precision=fp16", "train.warmup_steps=1"]
    train(*fp16, f"output_dir={run}")
    logged = [record for record in records(run) if "loss" in record]
    assert [record["grad_norm"] is None for record in logged] == [True] * 2 + [False] * 4
    assert [record["learning_rate"] for record in logged][:4] == [0.0, 0.0, 0.0, 1e-2]
    state = json.loads((run / "checkpoint-4" / "state.json").read_text())
    assert state["scaler"]["scale"] == 2.0**18 and state["scaler"]["_growth_tracker"] == 2
    float16.scale = 1.0  # what a restored scale replaces
    assert_goes_on(run, *fp16)
    assert float16.trainer.accelerator.scaler.get_scale() == 2.0**18


def stored(folder: Path, base: Path, quantization: str, dtype: Any, **changed: Any) -> Path:
    """Write a base as Transformers saves it once bitsandbytes has quantised it."""
    from transformers import AutoTokenizer

    from sft.model.base import load_frozen
    from sft.train import main

    asked = [f"model.name_or_path={base}", f"quantization={quantization}"]
    config = main.compose(["model=hf", *asked])
    load_frozen(config.model, config.quantization, dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] |= changed
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def based_on(base: Path, settings: list[str], *more: str) -> list[str]:
    """Replace the base of a run."""
    return [*without(settings, "model.name_or_path"), f"model.name_or_path={base}", *more]


@pytest.fixture
def short(llama: Path, tmp_path: Path) -> Path:
    """Give a base in bfloat16, as most are."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16).save_pretrained(
        tmp_path / "short"
    )
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "short")
    return tmp_path / "short"


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "norm"])
def test_a_module_that_is_saved_whole_answers_on_a_base_in_bfloat16(
    tmp_path: Path, short: Path, saving: list[str], name: str
) -> None:
    """As the merged model does; training saves the module in float32."""
    from sft.generate import main as generate
    from sft.merge import __main__ as merge

    run = tmp_path / "run"
    own = [f"lora.modules_to_save=[{name}]", f"output_dir={run}", "train.learning_rate=3e-2"]
    train(*based_on(short, without(saving, "train.learning_rate"), *own))
    assert {value.dtype for value in load_file(run / FILE).values()} == {torch.float32}
    merge.merge(merge.main.compose([f"run={run}"]))
    answers = [
        generate.run(generate.compose([which, "prompt=Repeat abc.", "max_new_tokens=8"]))
        for which in (f"run={run}", f"model={run / 'merged'}")
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("given", ["[320]", "[-1]", "[]", "{embed_tokens: [3], lm_head: [320]}"])
def test_rows_that_an_embedding_lacks_are_refused(
    tmp_path: Path, saving: list[str], given: str
) -> None:
    own = [f"lora.extra.trainable_token_indices={given}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=r"the rows 0 to 319|must be a list of rows"):
        train(*saving, *own)


@pytest.mark.parametrize(("quantization", "precision"), [("nf4", "fp32"), ("int8", "bf16")])
def test_files_that_are_quantised_train_as_what_they_were_made_of(
    tmp_path: Path, short: Path, saving: list[str], quantization: str, precision: str
) -> None:
    """Bit for bit, whatever precision the machine that quantised them computed in."""
    from sft.merge import __main__ as merge

    saving = [*without(saving, "precision"), f"precision={precision}"]
    expected, run = tmp_path / "expected", tmp_path / "run"
    files = stored(
        tmp_path / "files", short, quantization, torch.bfloat16, bnb_4bit_compute_dtype="float16"
    )
    train(*based_on(short, saving, f"quantization={quantization}"), f"output_dir={expected}")
    train(*based_on(files, saving), f"output_dir={run}")
    assert (run / FILE).read_bytes() == (expected / FILE).read_bytes()
    assert losses(run) == losses(expected)
    record = json.loads((run / "run.json").read_text())
    assert record["choices"]["quantization"]["value"] == quantization
    card, other = (json.loads((at / "adapter" / "sft.json").read_text()) for at in (run, expected))
    assert card["quantization"] == other["quantization"]
    if quantization == "int8":
        assert_goes_on(run, *based_on(files, saving))
        return
    with pytest.raises(MergeError, match=r"are already quantised.*\n.*check_base=false"):
        merge.merge(merge.main.compose([f"run={run}"]))
    onto = [f"base={short}", "check_base=false", f"output={tmp_path / 'merged'}"]
    merge.merge(merge.main.compose([f"run={run}", *onto]))
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert report["passed"] and report["onto"] == "dequantized"


@pytest.mark.parametrize(("more", "said"), [([], "plain computes"), (["<a>"], "rows of model")])
def test_a_list_of_modules_that_leaves_the_head_quantised_is_refused(
    tmp_path: Path, saving: list[str], more: list[str], said: str
) -> None:
    key = "quantization.extra.llm_int8_skip_modules"
    own = [*without(saving, "train.max_steps"), "quantization=nf4", "train.max_steps=1"]
    own += [f"model.new_tokens={more}", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=f"leaves lm_head quantised.*{said}") as raised:
        train(*own, f"{key}=[q_proj]")
    assert f"fix: {key}=[q_proj,lm_head]" in str(raised.value)
    train(*own, f"{key}=[q_proj,lm_head]")


def fp8(folder: Path, base: Path) -> tuple[Path, Path]:
    """Write a base with 8-bit floating-point weights and a scale for each block, and its values.

    Returns:
        The quantised base, and the same numbers in float32.
    """
    import shutil

    import torch
    from safetensors.torch import save_file

    plain = folder / "plain"
    quantised = folder / "fp8"
    for path in (plain, quantised):
        shutil.copytree(base, path)
    tensors = load_file(base / "model.safetensors")
    stored, values = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if "_proj" in name:
            blocks = weight.float().unflatten(0, (-1, 32)).unflatten(2, (-1, 32))
            scale = blocks.abs().amax((1, 3), keepdim=True) / 448
            small = (blocks / scale).to(torch.float8_e4m3fn)
            stored[name] = small.flatten(2).flatten(0, 1).contiguous()
            stored[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
            values[name] = (small.float() * scale).flatten(2).flatten(0, 1)
    save_file(stored, quantised / "model.safetensors", {"format": "pt"})
    save_file(values, plain / "model.safetensors", {"format": "pt"})
    content = json.loads((base / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    (quantised / "config.json").write_text(json.dumps(content))
    return quantised, plain


@pytest.mark.parametrize("lora", ["all-linear", "none"])
def test_fp8_files_are_dequantised(
    tmp_path: Path, short: Path, saving: list[str], lora: str
) -> None:
    files, plain = fp8(tmp_path, short)
    saving = [*saving, f"lora={lora}", "train.max_steps=3"]
    saving = [*without(saving, "train.max_steps=6", "train.save_"), "train.save_strategy=no"]
    train(*based_on(plain, saving), f"output_dir={tmp_path / 'expected'}")
    train(*based_on(files, saving), f"output_dir={tmp_path / 'run'}")
    assert losses(tmp_path / "run") == losses(tmp_path / "expected")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["choices"]["quantization"] == {
        "value": "none",
        "reason": "the model's fp8 files are dequantised, which takes 0.0 GiB for weights",
    }
    if lora == "none":
        content = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
        assert "quantization_config" not in content


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("gptq", "", "quantised by gptq, and sft cannot train on them\n.*WAS_QUANTISED"),
        ("awq", "quantization=nf4", "quantised by awq"),
        ("fp8", "quantization=nf4", r"are quantised already \(fp8\)\n.*quantization=none"),
        ("compressed-tensors", "", "pip install compressed-tensors"),
        ("bitsandbytes", "quantization=int8", "with load_in_4bit=true, bnb_4bit_quant_type=fp4"),
        ("bitsandbytes", "lora=none", r"cannot be trained; the files .*\n.*WAS_QUANTISED"),
        ("bitsandbytes", "lora.extra.init_lora_weights=olora", "changes the base weights"),
        ("bitsandbytes", "quantization.extra.llm_int8_threshold=5", "in another way"),
        ("bitsandbytes", "quantization=nf4", "with load_in_4bit=true, bnb_4bit_quant_type=fp4"),
    ],
)
def test_files_that_cannot_be_trained_are_refused(
    tmp_path: Path, llama: Path, rows: Path, method: str, settings: str, said: str
) -> None:
    """Before any weight loads: the folder has none."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(llama, base, ignore=shutil.ignore_patterns("*.safetensors"))
    content = json.loads((base / "config.json").read_text())
    content["quantization_config"] = {"quant_method": method, "load_in_4bit": True, "bits": 4}
    (base / "config.json").write_text(json.dumps(content))
    run = ["model=hf", f"model.name_or_path={base}", "dataset=jsonl", f"dataset.path={rows}"]
    with pytest.raises(ConfigError, match=said):
        train(*run, "template=chat", f"output_dir={tmp_path / 'run'}", *settings.split())


SOME = "model.trainable=[lm_head, 'model[.]layers[.]1[.]mlp']"


def model_of(run: Path) -> dict[str, Any]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
def test_only_the_weights_that_are_named_train(
    tmp_path: Path, llama: Path, saving: list[str], tied: bool
) -> None:
    """SGD's first step moves them as when all train, and leaves the others as they were."""
    base = build_model(tmp_path / "tied", "llama", tied=True) if tied else llama
    once = without(saving, "train.max_steps", "train.save_")
    once = based_on(base, once, "lora=none", "train.optim=sgd", "train.lr_scheduler_type=constant")
    once += ["train.max_steps=1", "train.warmup_steps=0", "train.max_grad_norm=0"]
    once += ["train.save_strategy=no"]
    every, some = tmp_path / "every", tmp_path / "some"
    train(*once, f"output_dir={every}")
    train(*once, SOME, "train.gradient_checkpointing=true", f"output_dir={some}")
    before, moved, found = load_file(base / "model.safetensors"), model_of(every), model_of(some)
    trained = {name for name, value in found.items() if not value.equal(before[name])}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    parts = ("gate_proj", "up_proj", "down_proj")
    assert trained == {head} | {f"model.layers.1.mlp.{part}.weight" for part in parts}
    for name in trained:
        assert (found[name] - moved[name]).abs().max() < 1e-6


def test_named_weights_train_under_zero_and_go_on(tmp_path: Path, saving: list[str]) -> None:
    some = [*without(saving, "train.learning_rate"), "train.learning_rate=1e-3"]
    some += ["lora=none", SOME]
    one, two = tmp_path / "one", tmp_path / "two"
    train(*some, f"output_dir={one}")
    run_warm("train", *some, "zero=stage3", f"output_dir={two}", ranks=2, cwd=tmp_path)
    assert losses(two) == pytest.approx(losses(one), rel=SAME_LOSS)
    expected = model_of(one)
    for name, value in model_of(two).items():
        assert (value - expected[name]).abs().max() < 1e-4, name
    assert_goes_on(one, *some)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("model.trainable=[model.layer.1.mlp]", "matches .* no weight's name; close are model.la"),
        ("model.trainable=[]", "or nothing is trained"),
        ("model.trainable=['(']", "is not a regular expression"),
        ("model.trainable=['(m+)+x']", "no weight's name"),
        ("model.trainable=['model.embed_tokens.weight$[:32000]']", "some rows of a weight"),
        ("model.trainable=[lm_head] lora=lora=all-linear", "has no effect with lora.enabled=true"),
    ],
)
def test_names_that_cannot_be_trained_are_refused(
    tmp_path: Path, llama: Path, rows: Path, settings: str, said: str
) -> None:
    run = ["model=hf", f"model.name_or_path={llama}", "dataset=jsonl", f"dataset.path={rows}"]
    run += ["template=chat", f"output_dir={tmp_path / 'run'}"]
    with pytest.raises(ConfigError, match=said):
        train(*run, *settings.split(" lora="), *[] if "lora=" in settings else ["lora=none"])


def kernel_of_the_hub(monkeypatch: pytest.MonkeyPatch, honest: bool) -> None:
    """Let Transformers get a kernel from the hub, which attends with PyTorch's sdpa."""
    import itertools
    import types

    import torch
    from transformers.integrations import hub_kernels

    def varlen(q: Any, k: Any, v: Any, cu_seqlens_q: Any, *_: Any, **options: Any) -> Any:
        bounds = cu_seqlens_q.tolist() if honest else [0, len(q)]
        parts = []
        for begin, end in itertools.pairwise(bounds):
            heads = (x[None, begin:end].transpose(1, 2) for x in (q, k, v))
            found = torch.nn.functional.scaled_dot_product_attention(
                *heads, is_causal=True, enable_gqa=True, scale=options.get("softmax_scale")
            )
            parts.append(found[0].transpose(0, 1))
        return torch.cat(parts)

    def dense(q: Any, k: Any, v: Any, **options: Any) -> Any:
        rows = zip(q, k, v, strict=True)
        bounds = torch.tensor([0, q.shape[1]])
        return torch.stack([varlen(*row, bounds, **options) for row in rows])

    module = types.ModuleType("kernel")
    module.flash_attn_func, module.flash_attn_varlen_func = dense, varlen  # type: ignore[attr-defined]
    installed = packages.installed
    monkeypatch.setattr(packages, "installed", lambda name: name == "kernels" or installed(name))
    for where in ("sft.plan.kernel", "transformers.modeling_utils", hub_kernels.__name__):
        monkeypatch.setattr(f"{where}.is_kernels_available", lambda: True)
    monkeypatch.setattr(hub_kernels, "get_kernel", lambda *_, **__: module)


HUB = ("model.attn_implementation=someone/flash-kernel@main", "model.trust_remote_code=true")


def test_a_kernel_of_the_hub_is_checked_with_packing(
    tmp_path: Path, saving: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = [*without(saving, "train.max_steps", "train.save_"), "train.max_steps=2"]
    packed = [*without(packed, "precision"), "precision=bf16", "dataset.packing=bfd"]
    packed += ["train.save_strategy=no", "dataset.max_length=96"]
    train(*packed, f"output_dir={tmp_path / 'ours'}")
    kernel_of_the_hub(monkeypatch, honest=True)
    train(*packed, *HUB, f"output_dir={tmp_path / 'theirs'}")
    assert losses(tmp_path / "theirs") == pytest.approx(losses(tmp_path / "ours"), rel=2e-3)
    record = json.loads((tmp_path / "theirs" / "run.json").read_text())
    assert record["choices"]["model.attn_implementation"]["value"] == HUB[0].partition("=")[2]
    monkeypatch.undo()
    kernel_of_the_hub(monkeypatch, honest=False)
    with pytest.raises(ModelError, match="other-flash, documents that are packed together"):
        other = "model.attn_implementation=someone/other-flash"
        train(*packed, other, HUB[1], f"output_dir={tmp_path / 'leaks'}")


def test_flash_attention_from_the_hub_needs_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers takes it from there if only the package kernels is installed."""
    from sft.train import main

    asked = ["model=tiny", "model.attn_implementation=flash_attention_2"]
    with pytest.raises(ConfigError, match="needs the package flash-attn or kernels"):
        main.compose(asked)
    kernel_of_the_hub(monkeypatch, honest=True)
    with pytest.raises(ConfigError, match="needs your consent"):
        main.compose(asked)
    main.compose([*asked, HUB[1]])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ((HUB[0],), "needs your consent"),
        (HUB, "pip install kernels"),
        ((*HUB, "precision=fp32"), "has no float32 kernel"),
        (("model.attn_implementation=a/b/c",), "must be one of"),
        (("model.attn_implementation=./kernel",), "needs your consent"),
    ],
)
def test_a_kernel_of_the_hub_needs_consent_and_its_package(
    settings: tuple[str, ...], said: str
) -> None:
    from sft.train import main

    with pytest.raises(ConfigError, match=said):
        main.compose(["model=tiny", *settings])


def test_values_of_config_json_are_replaced(tmp_path: Path, llama: Path, saving: list[str]) -> None:
    """As if the base's file had them; the merged model's has."""
    import shutil

    from sft.merge import __main__ as merge

    base = tmp_path / "base"
    shutil.copytree(llama, base)
    content = json.loads((base / "config.json").read_text())
    scaled = {"rope_theta": 500.0, "rope_type": "linear", "factor": 4.0}
    content |= {"rope_parameters": scaled, "rms_norm_eps": 1e-3}
    (base / "config.json").write_text(json.dumps(content))
    given = [
        "model.config.rope_theta=500",
        "model.config.rope_scaling={type: linear, factor: 4.0}",
        "model.config.rms_norm_eps=1e-3",
    ]
    expected, run = tmp_path / "expected", tmp_path / "run"
    train(*based_on(base, saving), f"output_dir={expected}")
    train(*saving, *given, f"output_dir={run}")
    assert (run / FILE).read_bytes() == (expected / FILE).read_bytes()
    with pytest.raises(RunError, match=r"model\.config\.rms_norm_eps"):
        train(*saving, *given[:2], f"output_dir={run}")
    assert_goes_on(run, *saving, *given)
    shutil.copytree(run, tmp_path / "other")
    with pytest.raises(RunError) as raised:
        train(*saving, f"output_dir={tmp_path / 'other'}")
    (allowed,) = re.findall(r"'(resume\.allow=.*)'", str(raised.value))
    prove.cut_back(tmp_path / "other", 4)
    train(*saving, f"output_dir={tmp_path / 'other'}", allowed)
    merge.merge(merge.main.compose([f"run={run}"]))
    written = json.loads((run / "merged" / "config.json").read_text())
    assert written["rope_parameters"] == scaled and written["rms_norm_eps"] == 1e-3
    assert not {"rope_theta", "rope_scaling"} & written.keys()
    assert json.loads((run / "merged" / "merge_report.json").read_text())["passed"]


def test_rotary_embeddings_of_one_kind_of_layer_are_replaced(
    tmp_path: Path, saving: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the base's file had them."""
    import shutil

    sizes = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
    kinds = ["sliding_attention", "full_attention"]
    monkeypatch.setitem(FAMILIES, "gemma3_text", sizes | {"layer_types": kinds})
    base, other = build_model(tmp_path / "base", "gemma3_text", tied=True), tmp_path / "other"
    shutil.copytree(base, other)
    content = json.loads((other / "config.json").read_text())
    content["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 4.0}
    (other / "config.json").write_text(json.dumps(content))
    name, scaled = "model.config.rope_parameters", "={rope_type: linear, factor: 4.0}"
    short = [*without(saving, "train.max_steps", "train.save_"), "train.max_steps=2"]
    short += ["train.save_strategy=no"]
    given = based_on(base, short, f"{name}.full_attention{scaled}")
    train(*given, f"output_dir={tmp_path / 'run'}")
    train(*based_on(other, short), f"output_dir={tmp_path / 'expected'}")
    train(*based_on(base, short), f"output_dir={tmp_path / 'plain'}")
    assert losses(tmp_path / "run") == losses(tmp_path / "expected")
    assert losses(tmp_path / "run") != losses(tmp_path / "plain")
    with pytest.raises(ConfigError, match="did you mean full_attention"):
        train(*based_on(base, short, f"{name}.full_atention{scaled}"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("model.config.rope_tetha=1e4", "no entry of the model's config\n.*rope_theta"),
        ("model.config.rms_norm_epsilon=1", "did you mean rms_norm_eps"),
        ("model.config.rope_theta=high", "must be a number"),
        ("model.config.rope_scaling=2", "must be a mapping"),
        ("model.config.rope_scaling={rope_type: linear, faktor: 2}", "did you mean factor"),
        ("model.config.rope_scaling={rope_type: linear}", "Transformers refuses these values"),
        ("model.config.attention_bias=1", "must be true or false, as false"),
        ("model.config.attention_bias=true", "changes the shape of model.layers.0"),
        ("model.config.max_position_embeddings=true", "must be a whole number, as 2048"),
        ("model.config.hidden_act=[gelu]", "must be a text, as silu"),
        ("model.config.vocab_size=400", "changes the shapes of weights"),
        ("model.config.num_attention_heads=8", "changes the shapes of weights"),
        ("model.config.dtype=float16", "leave it out: set precision=bf16"),
        ("model.config.use_cache=false", "training sets it"),
        ("model.config._name_or_path=x", "internal to Transformers"),
        ("model.config.eos_token_id=3", "set model.eos_token=TOKEN"),
        ("model.config.quantization_config={quant_method: gptq}", "set quantization=nf4"),
    ],
)
def test_values_that_config_json_cannot_have_are_refused(
    tmp_path: Path, llama: Path, rows: Path, settings: str, said: str
) -> None:
    run = ["model=hf", f"model.name_or_path={llama}", "dataset=jsonl", f"dataset.path={rows}"]
    with pytest.raises(ConfigError, match=said):
        train(*run, "template=chat", f"output_dir={tmp_path / 'run'}", settings)


def test_a_random_model_has_the_shapes_that_are_set(
    tmp_path: Path, llama: Path, saving: list[str]
) -> None:
    short = [*without(saving, "train.max_steps", "train.save_"), "train.max_steps=1"]
    short += ["train.save_strategy=no", "lora=none", "model.pretrained=false"]
    train(*short, "model.config.intermediate_size=96", f"output_dir={tmp_path / 'run'}")
    assert model_of(tmp_path / "run")["model.layers.0.mlp.up_proj.weight"].shape == (96, 64)
    content = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert content["intermediate_size"] == 96
