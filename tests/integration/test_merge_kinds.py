"""Every kind of adapter that is merged, against PEFT's own merge and against base + adapter."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support import TINY, build_adapter, build_model
from transformers import AutoModelForCausalLM

from sft.errors import MergeError
from sft.merge import __main__ as merge
from sft.merge import verify
from sft.merge.report import REPORT

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, of what these kinds are careful with

ATTENTION = ["q_proj", "v_proj"]
KINDS: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "lora": ("llama", False, {"target_modules": "all-linear"}),
    "patterns, rsLoRA": (
        "llama",
        False,
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 8},
            "alpha_pattern": {"up_proj": 3},
            "use_rslora": True,
        },
    ),
    "DoRA": ("llama", False, {"target_modules": "all-linear", "use_dora": True}),
    "PiSSA": ("llama", False, {"target_modules": "all-linear", "init_lora_weights": "pissa"}),
    "OLoRA": ("llama", False, {"target_modules": "all-linear", "init_lora_weights": "olora"}),
    "MiCA": ("llama", False, {"target_modules": "all-linear", "init_lora_weights": "mica"}),
    "VeLoRA": (
        "llama",
        False,
        {"target_modules": "all-linear", "velora_config": {"num_groups": 16}},
    ),
    "trained head": ("llama", False, {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}),
    "trained head, untied": (
        "llama",
        True,
        {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    ),
    "trained embedding, untied": (
        "llama",
        True,
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    ),
    "trained embedding, tied": (
        "llama",
        True,
        {
            "target_modules": ATTENTION,
            "modules_to_save": ["embed_tokens"],
            "ensure_weight_tying": True,
        },
    ),
    "embedding": ("llama", False, {"target_modules": [*ATTENTION, "embed_tokens"]}),
    "head": ("llama", False, {"target_modules": [*ATTENTION, "lm_head"]}),
    "tokens": ("llama", False, {"target_modules": ATTENTION, "trainable_token_indices": [3, 5]}),
    "tokens, tied": (
        "llama",
        True,
        {"target_modules": ATTENTION, "trainable_token_indices": [3, 5]},
    ),
    "biases": ("opt", True, {"target_modules": ATTENTION, "bias": "all"}),
    "LoRA's bias": ("opt", True, {"target_modules": ATTENTION, "lora_bias": True}),
    "Conv1D": ("gpt2", True, {"target_modules": ["c_attn", "c_proj"]}),
    "Conv1D, PiSSA": (
        "gpt2",
        True,
        {"target_modules": ["c_attn", "c_proj"], "init_lora_weights": "pissa"},
    ),
    "GPT-J": ("gptj", False, {"target_modules": "all-linear"}),
    "GPT-NeoX": ("gpt_neox", False, {"target_modules": "all-linear"}),
    "experts": (
        "qwen3_moe",
        False,
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}
# Of these PEFT's own merge rounds otherwise in the last place, or is another model: a tied weight
# gets both deltas of the embedding and the head, or one that only the embedding should have.
OTHERWISE: dict[str, tuple[str, bool, dict[str, Any]]] = {
    "embedding, DoRA": ("llama", False, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "Conv1D, DoRA": ("gpt2", True, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "embedding, untied": ("llama", True, {"target_modules": [*ATTENTION, "embed_tokens"]}),
    "embedding, tied": (
        "llama",
        True,
        {"target_modules": [*ATTENTION, "embed_tokens"], "ensure_weight_tying": True},
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def base_of(bases: Path, family: str, tied: bool) -> Path:
    path = bases / f"{family}-{tied}"
    return path if path.exists() else build_model(path, family, tied)


def merged(*overrides: str) -> dict[str, Any]:
    """Merge, and give the report."""
    config = merge.main.compose(list(overrides))
    merge.merge(config)
    report: dict[str, Any] = json.loads((Path(str(config.output)) / REPORT).read_text())
    return report


def peft(base: Path, adapter: Path) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(200).reshape(2, 100)
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("kind", [*KINDS, *OTHERWISE])
def test_merges_to_what_base_and_adapter_are(tmp_path: Path, bases: Path, kind: str) -> None:
    """PEFT's own merge has the same bits, but for the kinds where it cannot."""
    family, tied, settings = {**KINDS, **OTHERWISE}[kind]
    base = base_of(bases, family, tied)
    adapter = build_adapter(tmp_path / "adapter", base, **settings)
    out = tmp_path / "out"
    report = merged(f"adapter={adapter}", f"output={out}", f"base={base}")
    assert report["passed"] and report["adapter_effect"]["max_difference"] > 0.1
    assert report["greedy_texts"] == {"equal": 4, "of": 4}
    written = AutoModelForCausalLM.from_pretrained(out)
    live = peft(base, adapter)
    wanted = logits(live)
    assert (logits(written) - wanted).abs().max() < 3e-6 * wanted.abs().max()
    stays_tied = tied and "untied" not in kind
    assert written.config.tie_word_embeddings is stays_tied
    if kind in KINDS:
        theirs = live.merge_and_unload(safe_merge=True).state_dict()
        for name, tensor in written.state_dict().items():
            assert theirs[name].equal(tensor), name


@pytest.mark.parametrize("kind", ["lora", "experts", "trained head", "embedding, tied", "DoRA"])
def test_what_is_streamed_is_what_is_loaded(
    tmp_path: Path, bases: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models' weights read layer by layer, and all at once by the libraries."""
    family, tied, settings = {**KINDS, **OTHERWISE}[kind]
    base = base_of(bases, family, tied)
    adapter = build_adapter(tmp_path / "adapter", base, **settings)
    command = [f"adapter={adapter}", f"base={base}"]
    whole = merged(*command, f"output={tmp_path / 'whole'}")
    monkeypatch.setattr(verify, "RESIDENT", 0)
    monkeypatch.setattr(verify, "GREEDY_TOKENS_STREAMED", verify.GREEDY_TOKENS)
    streamed = merged(*command, f"output={tmp_path / 'streamed'}")
    assert whole.pop("weights_loaded") == "whole"
    assert streamed.pop("weights_loaded") == "layer by layer"
    assert streamed["passed"] and streamed["greedy_texts"] == whole["greedy_texts"]
    effects = [report["adapter_effect"] for report in (streamed, whole)]
    assert effects[0] == pytest.approx(effects[1], rel=1e-5)
    assert streamed["max_difference"] == pytest.approx(whole["max_difference"], abs=2e-6)


def test_16_bits_are_rounded_once(tmp_path: Path, bases: Path) -> None:
    """As near to the exact sum as 16 bits can be, and no further from it than PEFT's merge."""
    exact_base = base_of(bases, "llama", False)
    base = bases / "llama-bfloat16"
    AutoModelForCausalLM.from_pretrained(exact_base, dtype=torch.bfloat16).save_pretrained(base)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (base / file).write_bytes((exact_base / file).read_bytes())
    adapter = build_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    report = merged(f"adapter={adapter}", f"output={tmp_path / 'out'}", f"base={base}")
    assert report["dtype"] == "bfloat16"
    assert report["max_difference"] < report["allowed_difference"]
    ours = load_file(tmp_path / "out" / "model.safetensors")
    half = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), adapter
    ).merge_and_unload()
    name = "model.layers.0.mlp.up_proj.weight"
    factors = load_file(adapter / "adapter_model.safetensors")
    start = "base_model.model.model.layers.0.mlp.up_proj.lora_"
    exact = load_file(base / "model.safetensors")[name].double()
    exact += 2 * factors[f"{start}B.weight"].double() @ factors[f"{start}A.weight"].double()
    errors = [(tensor.double() - exact).abs() for tensor in (ours[name], half.state_dict()[name])]
    assert errors[0].mean() <= errors[1].mean()
    assert ours[name].equal(exact.float().bfloat16())
    untouched = "model.embed_tokens.weight"
    assert ours[untouched].equal(load_file(base / "model.safetensors")[untouched])


def test_several_adapters_are_weighed(tmp_path: Path, bases: Path) -> None:
    base = base_of(bases, "llama", False)
    one = build_adapter(tmp_path / "one", base, target_modules="all-linear")
    other = build_adapter(tmp_path / "other", base, seed=2, target_modules=ATTENTION, r=2)
    report = merged(
        f"adapter=[{one},{other}]",
        "weights=[0.7,0.3]",
        f"output={tmp_path / 'out'}",
        f"base={base}",
    )
    assert report["passed"] and report["weights"] == [0.7, 0.3]
    model = peft(base, one)
    model.load_adapter(str(other), "other")
    model.add_weighted_adapter(["default", "other"], [0.7, 0.3], "sum", "cat")
    model.set_adapter("sum")
    wanted = logits(model)
    got = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (got - wanted).abs().max() < 3e-6 * wanted.abs().max()
    dora = build_adapter(tmp_path / "dora", base, target_modules=ATTENTION, use_dora=True)
    with pytest.raises(MergeError, match="dora has use_dora, which can be neither scaled"):
        merged(f"adapter=[{one},{dora}]", f"output={tmp_path / 'no'}", f"base={base}")


def test_tokens_added_to_the_vocabulary_are_carried_over(tmp_path: Path, bases: Path) -> None:
    from peft import LoraConfig, get_peft_model

    for tied in (False, True):
        base = base_of(bases, "llama", tied)
        model = AutoModelForCausalLM.from_pretrained(base)
        rows = model.get_input_embeddings().weight.shape[0]
        model.resize_token_embeddings(rows + 3)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        adapter, out = tmp_path / f"adapter-{tied}", tmp_path / f"out-{tied}"
        adapted.save_pretrained(adapter, save_embedding_layers=True)
        assert merged(f"adapter={adapter}", f"output={out}", f"base={base}")["passed"]
        written = AutoModelForCausalLM.from_pretrained(out)
        assert written.config.vocab_size == rows + 3
        assert written.config.tie_word_embeddings is tied
        wanted = logits(adapted.eval())
        assert (logits(written) - wanted).abs().max() < 3e-6 * wanted.abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_qalora": True, "qalora_group_size": 16}, "uses use_qalora, which cannot be merged"),
        ({"alora_invocation_tokens": [1, 2]}, "uses alora_invocation_tokens, which cannot"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "uses layer_replication, which cannot be merged"),
        ({"init_lora_weights": "pissa_niter_2"}, "has init_lora_weights=pissa_niter_2"),
        ({"lora_bias": True}, "lora_bias=true, but .*q_proj has no bias"),
    ],
)
def test_what_is_not_merged_is_refused_by_name(
    tmp_path: Path, bases: Path, settings: dict[str, Any], message: str
) -> None:
    base = base_of(bases, "llama", False)
    adapter = build_adapter(tmp_path / "adapter", base, target_modules=ATTENTION, **settings)
    with pytest.raises(MergeError, match=message):
        merged(f"adapter={adapter}", f"output={tmp_path / 'out'}", f"base={base}")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("method", "settings", "reason"),
    [
        ("mxfp4", {}, r"the files of .*base are already quantised \(mxfp4\)"),
        ("fp8", {}, r"the files of .*base are already quantised \(fp8\)"),
        (None, {"use_qalora": True}, "this run's adapter uses use_qalora, which cannot be merged"),
        (None, {"init_lora_weights": "corda"}, "this run's adapter has init_lora_weights=corda"),
        (None, {}, None),
    ],
)
def test_what_a_merge_would_refuse_is_said_before_training(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    method: str | None,
    settings: dict[str, Any],
    reason: str | None,
) -> None:
    from peft import LoraConfig
    from transformers import AutoConfig

    from sft.merge import refusals
    from sft.train import main

    caplog.set_level("INFO", "sft")
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    content = json.loads((base / "config.json").read_text())
    if method:
        content["quantization_config"] = {"quant_method": method}
        (base / "config.json").write_text(json.dumps(content))
    architecture, lora = AutoConfig.from_pretrained(base), LoraConfig(**settings)
    config = main.compose(["model=hf", f"model.name_or_path={base}"])
    refusals.say_before_training(config, architecture, lora)
    said = [line for line in caplog.messages if "sft merge will refuse" in line]
    assert len(said) == (reason is not None)
    refusals.say_before_training(config, architecture, None)  # no adapter, nothing to merge
    config.train.merge = True
    if reason is None:
        refusals.say_before_training(config, architecture, lora)
        return
    assert re.search(f"warning: .*: {reason}(.|\n)*fix: ", said[0])
    with pytest.raises(
        MergeError, match=f"train.merge=true: {reason}(.|\n)*fix: train.merge=false"
    ):
        refusals.say_before_training(config, architecture, lora)


def test_a_base_whose_files_are_quantised_is_refused_by_training_and_by_the_merge(
    tmp_path: Path, bases: Path
) -> None:
    from sft.train import main, train

    base = tmp_path / "base"
    shutil.copytree(base_of(bases, "llama", False), base)
    adapter = build_adapter(tmp_path / "adapter", base, target_modules=ATTENTION)
    content = json.loads((base / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "mxfp4"}
    (base / "config.json").write_text(json.dumps(content))
    with pytest.raises(MergeError, match="already quantised"):
        merged(f"adapter={adapter}", f"output={tmp_path / 'out'}", f"base={base}")
    config = ["model=hf", f"model.name_or_path={base}", "train.merge=true"]
    with pytest.raises(MergeError, match="already quantised"):
        train(main.compose([*config, f"output_dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


def test_names_that_a_renaming_would_change_are_kept(tmp_path: Path) -> None:
    """Transformers renames mlp.shared_expert. in Laguna's old files, and matches shared_experts."""
    base = small_models.build(tmp_path / "base", "laguna", torch.float32)
    adapter = build_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    assert any(
        ".shared_experts." in name for name in load_file(adapter / "adapter_model.safetensors")
    )
    report = merged(f"adapter={adapter}", f"output={tmp_path / 'out'}", f"base={base}")
    assert report["passed"] and report["adapter_effect"]["max_difference"] > 1e-2


def test_a_base_with_its_own_code_is_merged_and_verified(tmp_path: Path, bases: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(base_of(bases, "llama", False), base)
    adapter = build_adapter(tmp_path / "adapter", base, target_modules=ATTENTION)
    (base / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    content = json.loads((base / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.Own"}
    content |= {"model_type": "own", "architectures": ["Own"], "auto_map": names}
    (base / "config.json").write_text(json.dumps(content))
    given = (f"adapter={adapter}", f"output={tmp_path / 'out'}", f"base={base}")
    report = merged(*given, "trust_remote_code=true")
    assert report["passed"] and report["weights_loaded"] == "whole"
    assert (tmp_path / "out" / "modeling_own.py").is_file()


def test_another_kind_of_adapter_generates_and_is_not_merged(tmp_path: Path, bases: Path) -> None:
    from peft import IA3Config, get_peft_model
    from transformers import AutoTokenizer

    from sft.generate import main as generate

    base = base_of(bases, "llama", False)
    settings = IA3Config(target_modules=ATTENTION, feedforward_modules=[])
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(
        tmp_path / "adapter"
    )
    with pytest.raises(MergeError, match="is IA3, not LoRA"):
        merged(f"adapter={tmp_path / 'adapter'}", f"output={tmp_path / 'out'}", f"base={base}")
    AutoTokenizer.from_pretrained(TINY).save_pretrained(tmp_path / "adapter")
    generate(
        [
            *(f"adapter={tmp_path / 'adapter'}", f"base={base}", "prompt=a", "max_new_tokens=2"),
            *("raw=true", f"output={tmp_path / 'answers.jsonl'}"),
        ]
    )
    [answer] = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(answer).keys() == {"prompt", "generated"}


@pytest.mark.parametrize("rank", [1, 8, 256])
def test_a_tile_of_zeros_does_not_decide_how_products_are_added(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers' products are zero; added in one pass or in two, they give the same bits."""
    from sft.merge import change

    monkeypatch.setattr(change, "_one_pass", {})
    torch.manual_seed(0)
    right, base = torch.randn(rank, 512), torch.randn(64, 512)

    def merged(left: torch.Tensor) -> torch.Tensor:
        tile = base.clone()
        products = [change.LowRank(left[None], right[None], 1.0)]
        change.Change(products=products).apply(tile, 0, 0, None, torch.empty_like(tile))
        return tile

    assert merged(torch.zeros(64, rank)).equal(base)
    assert change._one_pass == {}
    for _ in range(3):  # the first decides, the others use what it decided
        left = torch.randn(64, rank)
        assert merged(left).equal(base + left @ right)
    assert len(change._one_pass) == 1
