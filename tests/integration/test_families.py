"""OPT, GPT-J, NeoX, Llama, Qwen and GPT-2, tied and untied: each trains, saves and merges."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support import FAMILIES, build_model, losses
from transformers import AutoModelForCausalLM

from sft import train
from sft.merge import __main__ as merge

# GPT-J's head has a bias and is never tied.
CASES = [(family, tied) for family in FAMILIES for tied in (True, False)]
CASES.remove(("gptj", True))


@pytest.mark.parametrize(("family", "tied"), CASES)
@pytest.mark.parametrize("lora", ["attention", "all-linear"])
def test_family_trains_saves_and_merges(
    tmp_path: Path, rows: Path, family: str, tied: bool, lora: str
) -> None:
    base = build_model(tmp_path / "base", family, tied)
    run = tmp_path / "run"
    train.train(
        train.main.compose(
            [
                *("model=hf", f"model.name_or_path={base}", f"lora={lora}", f"output_dir={run}"),
                *("dataset=jsonl", f"dataset.path={rows}", "template=chat"),
                *("train.global_batch_size=4", "train.max_steps=6", "train.warmup_steps=0"),
                *("train.logging_steps=1", "train.learning_rate=2e-2", "train.save_strategy=no"),
                "precision=fp32",
            ]
        )
    )
    found = losses(run)
    assert len(found) == 6 and found[-1] < found[0] - 0.5

    merge.merge(merge.main.compose([f"run={run}"]))
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert report["passed"] and report["adapter_effect"]["max_difference"] > 1e-2

    ids = torch.arange(200).reshape(2, 100)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(run / "merged")
    with torch.no_grad():
        difference = (adapted(ids).logits - merged(ids).logits).abs().max().item()
    assert difference < 1e-4
    assert merged.config.tie_word_embeddings is tied
    shared = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert shared is tied


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # the base is stored in float32
def test_quantised_base_trains_and_merges(
    tmp_path: Path,
    rows: Path,
    llama: Path,
    quantization: str,
    precision: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    train.train(
        train.main.compose(
            [
                *("model=hf", f"model.name_or_path={llama}", f"quantization={quantization}"),
                *("dataset=jsonl", f"dataset.path={rows}", "template=chat", f"output_dir={run}"),
                *("train.global_batch_size=4", "train.max_steps=8", "train.warmup_steps=0"),
                *("train.logging_steps=1", "train.learning_rate=2e-2", "train.save_strategy=no"),
                f"precision={precision}",
            ]
        )
    )
    found = losses(run)
    assert found[-1] < found[0] - 0.5
    assert {record.name for record in caplog.records} <= {"sft"}  # nothing of bitsandbytes
    merge.merge(merge.main.compose([f"run={run}"]))
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert report["passed"] and report["onto"] == "dequantized"
    merge.merge(
        merge.main.compose(
            [f"run={run}", f"output={tmp_path / 'original'}", "quantized_base=original"]
        )
    )
    other = json.loads((tmp_path / "original" / "merge_report.json").read_text())
    assert other["passed"] and other["onto"] == "original"
    # The default is nearer to what was trained: for 8 bits, whose forward pass rounds its inputs
    # too, both are measured against that pass.
    near = report.get("from_training", report)["mean_difference"]
    assert near < 0.9 * other["from_training"]["mean_difference"]
    assert (
        json.loads((run / "merged" / "config.json").read_text()).get("quantization_config") is None
    )


@pytest.mark.parametrize("stored", [True, False])
def test_4_bit_layers_keep_the_layout_of_training(
    tmp_path: Path, llama: Path, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for, or in the base's files; as on a processor with AVX512-BF16."""
    import bitsandbytes
    from transformers import AutoConfig

    from sft.config.settings import Config, ModelConfig
    from sft.model.base import load_base, load_frozen

    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    config = train.main.compose(["model=hf", f"model.name_or_path={llama}", "quantization=nf4"])
    if stored:
        base = tmp_path / "base"
        load_frozen(config.model, config.quantization).save_pretrained(base)
        config = Config(model=ModelConfig(name_or_path=str(base)))
    architecture = AutoConfig.from_pretrained(config.model.name_or_path)
    model = load_base(config, architecture, "fp32", None)
    layers = [item for item in model.modules() if isinstance(item, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_full_fine_tuning_writes_a_model(tmp_path: Path, rows: Path, llama: Path) -> None:
    run = tmp_path / "run"
    train.train(
        train.main.compose(
            [
                *("model=hf", f"model.name_or_path={llama}", "lora=none", "train=full"),
                *("dataset=jsonl", f"dataset.path={rows}", "template=chat", f"output_dir={run}"),
                *("train.global_batch_size=4", "train.max_steps=4", "train.logging_steps=1"),
                *("train.learning_rate=1e-3", "model.pretrained=false"),
            ]
        )
    )
    found = losses(run)
    assert found[-1] < found[0]
    AutoModelForCausalLM.from_pretrained(run / "model")
    with pytest.raises(merge.MergeError, match="trained every weight"):
        merge.merge(merge.main.compose([f"run={run}"]))
