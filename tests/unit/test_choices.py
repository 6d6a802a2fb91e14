"""What auto decides: one choice a setting, the same for all that reads it, in one aligned block."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sft import ranks
from sft.config.paths import DS_CONFIG_DIR
from sft.config.rules import declared
from sft.config.settings import Config, fill_names
from sft.data import artefact
from sft.data.prepare import prepare
from sft.data.prepared import Prepared
from sft.data.template import Template
from sft.fast import linear
from sft.model.base import load_architecture
from sft.model.tokenizer import load_tokenizer
from sft.plan import choices, memory
from sft.train import main

FEW = ("dataset.max_rows=16", "dataset.max_eval_rows=4", "dataset.num_proc=1")


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """An Intel CPU with AVX2 and 8 GiB."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": "Intel", "avx2": True})
    monkeypatch.setattr(memory, "available", lambda: 8 << 30)
    monkeypatch.setattr(linear, "available", lambda: 8 << 30)


def prepared_for(config: Config) -> Prepared:
    template = Template(config.template, load_tokenizer(config.model), config.dataset.format)
    return prepare(config.dataset, template, config.seed)


def decided(*overrides: str, begun: dict[str, str] | None = None) -> choices.Choices:
    config = main.compose([*FEW, *overrides])
    fill_names(config)
    architecture = load_architecture(config.model)
    precision = choices.choose_precision(config, architecture, begun or {})
    return choices.decide(config, architecture, precision, prepared_for(config))


def values(chosen: choices.Choices) -> dict[str, Any]:
    return {each.setting: each.value for each in chosen}


def test_the_block_is_aligned_and_reasons_go_on_below_themselves() -> None:
    chosen = decided("lora=none", "train.gradient_checkpointing=true")
    lines = chosen.lines(80)
    assert max(map(len, lines)) <= 80
    assert chosen.lines(200)[:4] == [
        "precision                     fp32     the CPU has no bf16",
        "train.extra.tf32              false    there is no GPU with TF32",
        "dataset.packing               none     each row is a sample; bfd joins rows up to "
        "dataset.max_length",
        "model.attn_implementation     packed   rows are joined without padding",
    ]
    assert lines[2:4] == [
        "dataset.packing               none     each row is a sample; bfd joins rows up",
        " " * 39 + "to dataset.max_length",
    ]
    assert "lora.enabled                  false    as set" in lines
    assert "model.frozen_linear           plain    there is no adapter" in lines
    assert "train.gradient_checkpointing  true     as set" in lines
    assert len(chosen.lines(200)) == len(list(chosen)) == 10
    assert max(map(len, chosen.lines(20))) < 80  # a very narrow terminal is not obeyed


def test_a_long_value_moves_only_its_own_reason(tmp_path: Path) -> None:
    path = tmp_path / "stage2_of_my_own.json"
    shutil.copyfile(DS_CONFIG_DIR / "stage2.json", path)
    lines = decided(f"zero.config={path}").lines(200)
    assert lines[0] == f"{'precision':<30}{'fp32':<22}the CPU has no bf16"
    assert lines[2] == f"{'zero.config':<30}{path}  as set"


def test_every_choice_is_of_a_setting_and_is_what_json_holds() -> None:
    settings = {name for name, _ in declared(Config)} | {"train.extra.tf32"}
    chosen = decided("zero=stage3", "train.extra.torch_compile=true")
    record = json.loads(json.dumps(chosen.record()))
    assert record.keys() <= settings
    assert record["zero.config"]["value"] == "stage3.json"
    assert record["zero.config"]["reason"].startswith(
        "as set; sizes in elements, chosen for the model: "
    )
    section = chosen.ds_config and chosen.ds_config["zero_optimization"]
    assert section and "auto" not in (
        section["stage3_prefetch_bucket_size"],
        section["stage3_param_persistence_threshold"],
    )
    assert chosen.stage == 3 and not chosen.fused_adapters
    assert "auto" not in values(chosen).values()
    assert decided().fused_adapters


@pytest.mark.parametrize(
    ("overrides", "setting", "value", "reason"),
    [
        (["precision=fp32"], "precision", "fp32", "as set"),
        (["precision=bf16"], "precision", "bf16", "computed in float32 and rounded"),
        (
            ["precision=bf16", "lora=none"],
            "precision",
            "bf16",
            "trained weights are stored in float32",
        ),
        (["dataset.packing=bfd"], "dataset.packing", "bfd", "as set"),
        (["model.attn_implementation=sdpa"], "model.attn_implementation", "sdpa", "as set"),
        (["model.attn_implementation=sdpa"], "train.padding_free", False, "cannot separate"),
        (["train.padding_free=false"], "train.padding_free", False, "as set"),
        (["train.padding_free=false"], "model.attn_implementation", None, "rows are padded"),
        (
            ["train.padding_free=false", "dataset.packing=bfd"],
            "model.attn_implementation",
            "packed",
            "samples hold several documents",
        ),
        (
            ["train.extra.torch_compile_mode=default"],
            "lora.enabled",
            True,
            "by PEFT: torch.compile",
        ),
        (["lora.use_dora=true"], "lora.enabled", True, "PEFT: DoRA and lora_bias add more"),
        (["quantization=nf4"], "lora.enabled", True, "by PEFT on quantised layers"),
        (["lora=none"], "lora.enabled", False, "as set"),
        (["model.lm_head=plain"], "model.lm_head", "plain", "as set"),
        (
            ["dataset.eval_path=null", "dataset.exact_match=0"],
            "train.eval_strategy",
            "no",
            "no held",
        ),
        (["train.extra.tf32=false"], "train.extra.tf32", False, "as set"),
        (["train.eval_strategy=no"], "train.eval_strategy", "no", "before and after training"),
    ],
)
def test_what_is_chosen_and_why(
    overrides: list[str], setting: str, value: Any, reason: str
) -> None:
    chosen = decided(*overrides)
    assert values(chosen)[setting] == value
    assert reason in chosen.record()[setting]["reason"]


def test_a_resumed_run_keeps_its_precision() -> None:
    begun = {"precision": "bf16", "products": "native"}
    chosen = decided(begun=begun)
    assert chosen.precision.value == "bf16"
    assert chosen.precision.products == "widened"  # this processor has no bf16
    assert chosen.precision.reason.startswith("the run began with it")


def test_all_ranks_recompute_if_one_must(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def exchange(value: Any, timeout: float) -> list[Any]:
        given.append(timeout)
        return [value, [True, "9 GiB do not fit into 1 GiB free"]]

    monkeypatch.setattr(memory, "exchange", exchange)
    chosen = decided("train.extra.ddp_timeout=60").checkpointing
    assert chosen.value is True and chosen.reason.startswith(
        "rank 1 has too little memory, and all"
    )
    assert chosen.reason.endswith("9 GiB do not fit into 1 GiB free")
    assert decided("train.gradient_checkpointing=false").checkpointing.value is False
    assert given == [60]  # a value that is set is the same on all ranks
    assert ranks.TIMEOUT == 1800


def test_prepared_data_has_its_own_packing(tmp_path: Path) -> None:
    config = main.compose([*FEW, "dataset.packing=bfd"])
    artefact.save(prepared_for(config), tmp_path / "made")
    again = dataclasses.replace(
        config.dataset, path=str(tmp_path / "made"), eval_path=None, packing="auto"
    )
    config.dataset = again
    found = choices._packing(config)
    assert (found.value, found.reason) == ("bfd", "dataset.path was prepared with it")
