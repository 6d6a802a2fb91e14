"""A DeepSpeed JSON: merged with its overrides, and every key and combination checked."""

import collections
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.partitioned_param_coordinator import (
    PartitionedParameterCoordinator,
    ZeRoTraceMode,
)
from transformers import AutoConfig, AutoModelForCausalLM

from sft.config import verdicts, zero, zero_checks
from sft.config.paths import DS_CONFIG_DIR
from sft.config.settings import TrainConfig, ZeroConfig
from sft.errors import Problem
from sft.fast import zero3

STAGES = {
    "stage1.json": 1,
    "stage2.json": 2,
    "stage2_offload.json": 2,
    "stage3.json": 3,
    "stage3_offload.json": 3,
}


def found(
    config: str | None = "stage2.json",
    overrides: dict[str, Any] | None = None,
    optim: str = "adamw_torch",
    trains_base: bool = False,
) -> list[Problem]:
    return list(zero_checks.problems(ZeroConfig(config, overrides or {}), optim, trains_base))


def test_every_json_is_legal_for_lora_and_for_full_fine_tuning() -> None:
    files = {file.name for file in DS_CONFIG_DIR.glob("*.json")}
    assert files == STAGES.keys()
    for name, stage in STAGES.items():
        assert found(name, trains_base=False) == found(name, trains_base=True) == []
        ds_config = zero.read(ZeroConfig(name))
        assert zero.stage(ds_config) == stage
        assert ds_config is not None
        auto = {key for key, value in zero_checks._walk(ds_config) if value == "auto"}
        assert verdicts.DEEPSPEED_DECIDED.keys() - {"optimizer", "scheduler"} <= auto


def test_overrides_are_deep_merged() -> None:
    over = {"zero_optimization": {"overlap_comm": False, "offload_optimizer": {"device": "cpu"}}}
    merged = zero.read(ZeroConfig("stage2.json", over))
    assert merged is not None
    assert merged["zero_optimization"] == {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "offload_optimizer": {"device": "cpu"},
    }
    removed = {"zero_optimization": {"offload_param": None}}
    merged = zero.read(ZeroConfig("stage3_offload.json", removed))
    assert merged is not None
    assert "offload_param" not in merged["zero_optimization"]
    assert found("stage3_offload.json", removed) == []


@pytest.mark.parametrize(
    ("ds_config", "stage"),
    [
        (None, 0),
        ({}, 0),
        ({"zero_optimization": {"stage": 3}}, 3),
        ({"zero_optimization": "three"}, 0),
        ({"zero_optimization": {"stage": "three"}}, 0),
    ],
)
def test_stage(ds_config: dict[str, Any] | None, stage: int) -> None:
    assert zero.stage(ds_config) == stage


def test_without_a_json_there_is_nothing_to_read_or_override() -> None:
    assert zero.read(ZeroConfig()) is None
    assert found(None) == []
    assert found(None, {"steps_per_print": 1}) == [
        Problem(
            "zero.overrides={'steps_per_print': 1}", "there is no JSON to override", "zero=stage2"
        )
    ]


def test_a_missing_json_names_the_ones_there_are() -> None:
    path = DS_CONFIG_DIR / "stage5.json"
    assert found("stage5.json") == [
        Problem(
            "zero.config=stage5.json",
            f"there is no file {path}; sft has stage1, stage2, stage2_offload, stage3, "
            "stage3_offload",
            "zero=stage2",
        )
    ]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{", "is not valid JSON: Expecting property name"),
        ("[1]", "is not valid JSON: its top"),
        ('{"a":' * 900 + "1" + "}" * 900, "is not valid JSON: its sections are nested too deeply"),
    ],
)
def test_a_broken_json_is_refused(tmp_path: Path, text: str, rule: str) -> None:
    file = tmp_path / "mine.json"
    file.write_text(text)
    (problem,) = found(str(file))
    assert problem.setting == f"zero.config={file}"
    assert problem.rule.startswith(rule)
    assert problem.fix == f"correct {file}"


def users_json(tmp_path: Path, **changes: Any) -> str:
    ds_config = json.loads((DS_CONFIG_DIR / "stage2.json").read_text())
    for key, value in changes.items():
        if value is None:
            del ds_config[key]
        else:
            ds_config[key] = value
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(ds_config))
    return str(file)


@pytest.mark.parametrize(
    ("changes", "setting", "rule", "fix"),
    [
        (
            {"zero_optimisation": {"stage": 3}},
            "mine.json: zero_optimisation={'stage': 3}",
            "sft knows no DeepSpeed key zero_optimisation",
            "did you mean zero_optimization?",
        ),
        (
            {"bf16": {"enable": True, "enabled": "auto"}},
            "mine.json: bf16.enable=True",
            "bf16 has no key enable",
            "did you mean enabled?",
        ),
        (
            {"bf16": True},
            "mine.json: bf16=True",
            "must be a JSON object",
            "zero.overrides.bf16=null",
        ),
        (
            {"aio": {"block_sise": 1}},
            "mine.json: aio.block_sise=1",
            "aio has no key block_sise",
            "did you mean block_size?",
        ),
        (
            {"sequence_parallel": {"size": 4}},
            "mine.json: sequence_parallel={'size': 4}",
            "sft knows no DeepSpeed key sequence_parallel",
            "zero.overrides.sequence_parallel=null",
        ),
        (
            {"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-4}}},
            "mine.json: optimizer=OneBitAdam",
            "Transformers makes the optimizer, and train.optim=adamw_torch_fused is a different "
            "one",
            "zero.overrides.optimizer=null",
        ),
        (
            {"optimizer": {"type": "Lion"}},
            "mine.json: optimizer=Lion",
            "Transformers makes the optimizer, and train.optim=adamw_torch_fused is a different "
            "one",
            "train.optim=lion_32bit",
        ),
        (
            {"tensor_parallel": {"autotp_size": 2}},
            "mine.json: tensor_parallel={'autotp_size': 2}",
            "AutoTP computes a wrong loss: the fused LM head reads one shard of the vocabulary",
            "zero.overrides.tensor_parallel=null",
        ),
        (
            {"autotuning": {"enabled": True}},
            "mine.json: autotuning={'enabled': True}",
            "autotuning would change the batch, which train.global_batch_size sets",
            "zero.overrides.autotuning=null",
        ),
        (
            {"zero_optimization": {"stage": "3"}},
            "mine.json: zero_optimization",
            "stage must be 1, 2 or 3, or 0 for plain DDP",
            "zero=stage2",
        ),
    ],
)
def test_a_users_json_is_checked(
    tmp_path: Path, changes: dict[str, Any], setting: str, rule: str, fix: str
) -> None:
    problems = found(users_json(tmp_path, **changes), optim=TrainConfig().optim)
    assert problems == [Problem(setting, rule, fix)]


def test_a_users_json_without_an_fp16_section_is_fine(tmp_path: Path) -> None:
    assert found(users_json(tmp_path, fp16=None)) == []


@pytest.mark.parametrize(
    ("section", "setting", "rule", "fix"),
    [
        (
            {"overlap_com": True},
            "zero.overrides.zero_optimization.overlap_com=True",
            "zero_optimization has no key overlap_com",
            "did you mean overlap_comm?",
        ),
        (
            {"offload_optimizer": {"devise": "cpu"}},
            "zero.overrides.zero_optimization.offload_optimizer.devise=cpu",
            "zero_optimization.offload_optimizer has no key devise",
            "did you mean device?",
        ),
        (
            {"offload_optimizer": "cpu"},
            "zero.overrides.zero_optimization.offload_optimizer=cpu",
            "must be a JSON object",
            "zero_optimization.offload_optimizer.KEY=VALUE",
        ),
        (
            {"mystery": {"a": {"b": 1}}},
            "zero.overrides.zero_optimization.mystery={'a': {'b': 1}}",
            "zero_optimization has no key mystery",
            "remove it",
        ),
        (
            {"overlap_comm": {"a": 1}},
            "zero.overrides.zero_optimization.overlap_comm.a=1",
            "zero_optimization.overlap_comm has no nested keys",
            "remove it",
        ),
        (
            {"zenflow": {"topk_ratio": 0.1}},
            "zero.overrides.zero_optimization.zenflow={'topk_ratio': 0.1}",
            "ZenFlow changes the losses of the stage",
            "remove it",
        ),
        (
            {"stage": 4},
            "stage2.json: zero_optimization",
            "stage must be 1, 2 or 3, or 0 for plain DDP",
            "zero=stage2",
        ),
        (
            {"offload_param": {"device": "cpu"}},
            "stage2.json: offload_param",
            "needs ZeRO stage 3, and the stage is 2",
            "zero.overrides.zero_optimization.offload_param=null",
        ),
        (
            {"offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}},
            "stage2.json: offload_optimizer",
            "a checkpoint of sft cannot include optimizer state on NVMe",
            "zero.overrides.zero_optimization.offload_optimizer.device=cpu",
        ),
        (
            {"stage": 3, "offload_param": {"device": "nvme"}},
            "stage2.json: offload_param",
            "device nvme needs nvme_path, a folder on the NVMe disk",
            "zero.overrides.zero_optimization.offload_param.device=cpu",
        ),
    ],
)
def test_overrides_are_checked(section: dict[str, Any], setting: str, rule: str, fix: str) -> None:
    assert found(overrides={"zero_optimization": section}) == [Problem(setting, rule, fix)]


def test_an_unknown_top_level_key_is_refused_once() -> None:
    assert found(overrides={"mystery": {"a": {"b": 1}}}) == [
        Problem(
            "zero.overrides.mystery={'a': {'b': 1}}",
            "sft knows no DeepSpeed key mystery",
            "remove it",
        )
    ]


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_torch_8bit", "adafactor"])
def test_offloading_must_not_replace_the_optimizer(optim: str) -> None:
    force = {"zero_force_ds_cpu_optimizer": True}
    assert found("stage2_offload.json", force, optim) == [
        Problem(
            f"train.optim={optim}",
            "stage2_offload.json offloads the optimizer, so DeepSpeed would use DeepSpeedCPUAdam",
            "zero.overrides.zero_force_ds_cpu_optimizer=false",
        )
    ]
    assert found("stage2_offload.json", {}, optim) == []
    assert found("stage2_offload.json", force, "adamw_torch_fused") == []
    assert found("stage2.json", force, optim) == []


def test_full_fine_tuning_under_stage_3_must_gather_its_weights() -> None:
    key = "stage3_gather_16bit_weights_on_model_save"
    off = {"zero_optimization": {key: False}}
    assert found("stage3.json", off, trains_base=True) == [
        Problem(
            f"stage3.json: {key}=False",
            "must be true: lora=none under ZeRO stage 3 gathers the weights to save them",
            f"zero.overrides.zero_optimization.{key}=true",
        )
    ]
    assert found("stage3.json", off) == []


def test_all_problems_of_a_json_come_at_once() -> None:
    overrides = {"optimizer": {"type": "Adam"}, "a": 1}
    overrides |= {"zero_optimization": {"b": 2, "stage": 9}}
    rules = [problem.rule for problem in found(overrides=overrides)]
    assert rules == [
        "zero_optimization has no key b",
        "train.optim decides it",
        "sft knows no DeepSpeed key a",
        "stage must be 1, 2 or 3, or 0 for plain DDP",
    ]


class Order(torch.nn.Module):
    """Two layers as DeepSpeed marks them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(2))
        for number, layer in enumerate(self.layers):
            layer.ds_external_parameters = lambda: []
            layer.weight.ds_id, layer.weight.ds_persist = number, False
            layer.weight.ds_numel = layer.weight.numel()


def to_release(coordinator: Any, order: list[Any], step: int) -> set[int]:
    """Ask DeepSpeed what the module that was used last may release, once it knows the order."""
    name = f"_{PartitionedParameterCoordinator.__name__}__"
    setattr(coordinator, f"{name}submodule_order", tuple(order))
    decided: set[int] = getattr(coordinator, f"{name}params_to_release")(order[step - 1], step)
    return decided


def coordinator() -> Any:
    made = object.__new__(PartitionedParameterCoordinator)
    name = f"_{PartitionedParameterCoordinator.__name__}__"
    setattr(made, f"{name}trace_mode", ZeRoTraceMode.COMPLETE)
    setattr(made, f"{name}most_recent_step_id_param_fetched_for", collections.defaultdict(int))
    setattr(made, f"{name}max_reuse_dist_in_numel", 1000)
    return made


def test_an_evaluation_does_not_decide_what_training_releases(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, second = Order().layers
    evaluation, training = [first, second], [first, second, second, first]
    stock = getattr(PartitionedParameterCoordinator, zero3.DECIDE)
    monkeypatch.setattr(PartitionedParameterCoordinator, zero3.DECIDE, stock)
    zero3.learn_each_way()
    made = coordinator()
    assert to_release(made, evaluation, 1) == {0}
    for _ in range(2):
        assert to_release(made, training, 1) == set()  # soon used again, going back
        assert to_release(made, training, 4) == {0}
    once = getattr(PartitionedParameterCoordinator, zero3.DECIDE)
    zero3.learn_each_way()
    assert getattr(PartitionedParameterCoordinator, zero3.DECIDE) is once


@pytest.mark.parametrize("rank, kept", [(8, 8 * 3072), (512, 768 * 768 - 1), (0, 7680)])
def test_stage_3_is_sized_to_the_model(rank: int, kept: int) -> None:
    fields = {"hidden_size": 768, "num_hidden_layers": 3, "num_attention_heads": 12}
    fields |= {"ffn_dim": 3072, "vocab_size": 5000, "word_embed_proj_dim": 768}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **fields))
    asked = zero.read(ZeroConfig("stage3.json"))
    assert asked is not None
    section = zero.sized(asked, model, rank)["zero_optimization"]
    assert section["stage3_param_persistence_threshold"] == kept
    layer = sum(weight.numel() for weight in model.model.decoder.layers[0].parameters())
    assert layer <= section["stage3_prefetch_bucket_size"] <= 1.1 * layer
    assert section["reduce_bucket_size"] == "auto"
    over = {"zero_optimization": {"stage3_prefetch_bucket_size": 7}}
    chosen = zero.read(ZeroConfig("stage3.json", over))
    assert chosen is not None
    sized = zero.sized(chosen, model, rank)["zero_optimization"]
    assert sized["stage3_prefetch_bucket_size"] == 7
