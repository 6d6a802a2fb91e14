"""DeepSpeed JSONs in the shape of those that other tools ship: taken, or refused with a fix."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from deepspeed.runtime.config import DeepSpeedConfig
from unit.test_checks import legal_config

from sft.config import zero, zero_checks, zero_json
from sft.config.checks import check
from sft.config.settings import Config, ZeroConfig
from sft.errors import ConfigError, Problem
from sft.model.precision import needs_masters
from sft.train import main
from sft.training import build

AUTO_BATCH = dict.fromkeys(
    (
        *("train_batch_size", "train_micro_batch_size_per_gpu"),
        *("gradient_accumulation_steps", "gradient_clipping"),
    ),
    "auto",
)
SCALE = {"loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}
FP16 = {"enabled": "auto", "initial_scale_power": 16, **SCALE}
FP16_32 = {"enabled": "auto", "auto_cast": False, "initial_scale_power": 32, **SCALE}
BF16 = {"enabled": "auto"}
CPU = {"device": "cpu", "pin_memory": True}
NO_DEVICE = {"device": "none", "pin_memory": True}
BUCKETS = {
    "allgather_partitions": True,
    "allgather_bucket_size": 5e8,
    "reduce_scatter": True,
    "reduce_bucket_size": 5e8,
    "contiguous_gradients": True,
}
SIZES3 = {
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
}
STAGE2 = {"stage": 2, "overlap_comm": True, **BUCKETS}
STAGE3 = {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, **SIZES3}
GATHER = "stage3_gather_16bit_weights_on_model_save"
OPTIMIZER = {
    "type": "AdamW",
    "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
}
WARMUP = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto")
DECAY = {"type": "WarmupDecayLR", "params": {**WARMUP, "total_num_steps": "auto"}}
PRINTS = {"steps_per_print": 2000, "wall_clock_breakdown": False}
# Keys of a tutorial's monitor, which DeepSpeed does not read.
MONITOR = {
    "comms_config": {"verbose": False},
    "monitor_config": {"enabled": True, "csv_monitor": {"enabled": False}},
}
RECOMPUTE = dict.fromkeys(
    ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization"), False
)
AXOLOTL3 = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 0,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "max_live_parameters": 0,
    "max_reuse_distance": 0,
    "gather_16bit_weights_on_model_save": True,
}
AXOLOTL = {**AUTO_BATCH, "wall_clock_breakdown": False}
FACTORY = {**AUTO_BATCH, "zero_allow_untested_optimizer": True, "fp16": FP16, "bf16": BF16}
SWIFT = {**AUTO_BATCH, **PRINTS, "fp16": FP16, "bf16": BF16}
KEPT = {"zero_force_ds_cpu_optimizer": False, "zero_allow_untested_optimizer": True}

KINDS: dict[str, dict[str, Any]] = {
    # Transformers: its documentation, which names numbers, and its tests
    "transformers_zero2": {
        **{"fp16": {**FP16, "enabled": True}, **PRINTS},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": 3e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_min_lr": 0, "warmup_max_lr": 3e-5, "warmup_num_steps": 500},
        },
        "zero_optimization": {**STAGE2, "allgather_bucket_size": 2e8, "cpu_offload": True},
    },
    "transformers_zero3": {
        **{**AUTO_BATCH, **PRINTS, "fp16": FP16, "bf16": BF16},
        **{"optimizer": OPTIMIZER, "scheduler": {"type": "WarmupLR", "params": WARMUP}},
        "zero_optimization": {
            **STAGE3,
            "offload_optimizer": CPU,
            "offload_param": CPU,
            "stage3_gather_fp16_weights_on_model_save": True,
        },
    },
    # Axolotl
    "axolotl_zero1": {
        **{**AXOLOTL, "fp16": FP16_32, "bf16": BF16},
        "zero_optimization": {"stage": 1, "overlap_comm": True},
    },
    "axolotl_zero1_torch_compile": {
        **{**AXOLOTL, "fp16": FP16_32, "bf16": BF16},
        "compile": {"disable": False, "backend": "inductor"},
        "zero_optimization": {"stage": 1, "overlap_comm": True},
    },
    "axolotl_zero2": {
        **{**AXOLOTL, "fp16": FP16_32, "bf16": BF16},
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu"},
            "contiguous_gradients": True,
            "overlap_comm": True,
        },
    },
    "axolotl_zero2_torch_compile": {
        **{**AXOLOTL, "fp16": FP16_32, "bf16": BF16},
        "compile": {"disable": False, "backend": "inductor"},
        "zero_optimization": {"stage": 2, "contiguous_gradients": True, "overlap_comm": True},
    },
    "axolotl_zero3": {
        **{**AXOLOTL, "fp16": FP16_32, "bf16": BF16},
        "zero_optimization": {**STAGE3, "sub_group_size": 0, GATHER: True},
    },
    "axolotl_zero3_bf16": {
        **{**AXOLOTL, "bf16": {"enabled": True}},
        "zero_optimization": AXOLOTL3,
    },
    "axolotl_zero3_bf16_cpuoffload_all": {
        **{**AXOLOTL, **KEPT, "bf16": {"enabled": True}},
        "zero_optimization": {**AXOLOTL3, "offload_optimizer": CPU, "offload_param": CPU},
    },
    "axolotl_zero3_bf16_cpuoffload_params": {
        **{**AXOLOTL, **KEPT, "bf16": {"enabled": True}},
        "zero_optimization": {**AXOLOTL3, "offload_param": CPU},
    },
    # LLaMA-Factory
    "factory_z0": {
        **{**FACTORY, **MONITOR},
        "zero_optimization": {
            **{**STAGE2, "stage": 0, "overlap_comm": False},
            "round_robin_gradients": True,
        },
    },
    "factory_z2": {**FACTORY, "zero_optimization": {**STAGE2, "round_robin_gradients": True}},
    "factory_z2_offload": {
        **FACTORY,
        "zero_optimization": {**STAGE2, "offload_optimizer": CPU, "round_robin_gradients": True},
    },
    "factory_z3": {**FACTORY, "zero_optimization": {**STAGE3, GATHER: True}},
    "factory_z3_offload": {
        **{**FACTORY, **MONITOR},
        "zero_optimization": {
            **{**STAGE3, "offload_optimizer": CPU, "offload_param": CPU},
            GATHER: True,
        },
    },
    "factory_z3_fp8": {
        **{"train_micro_batch_size_per_gpu": "auto", "gradient_clipping": 0.001},
        **{"bf16": {"enabled": False}, "fp16": {**FP16, "enabled": False}},
        **{"fp8": {"enabled": True}, "zero_force_ds_cpu_optimizer": True},
        "zero_optimization": {**STAGE3, "offload_optimizer": {"device": "cpu"}, GATHER: True},
    },
    # ms-swift
    "swift_zero0": {**SWIFT, "zero_optimization": {**STAGE2, "stage": 0, "overlap_comm": False}},
    "swift_zero1": {
        **SWIFT,
        "zero_optimization": {**STAGE2, "stage": 1, "offload_optimizer": NO_DEVICE},
    },
    "swift_zero2_offload": {**SWIFT, "zero_optimization": {**STAGE2, "offload_optimizer": CPU}},
    "swift_zero3": {
        **SWIFT,
        "zero_optimization": {
            **{**STAGE3, "offload_optimizer": NO_DEVICE, "offload_param": NO_DEVICE},
            **{"zero_quantized_weights": False, "zero_quantized_gradients": False, GATHER: True},
        },
    },
    # FastChat and Alpaca
    "fastchat_lora_s2": {
        **{**AUTO_BATCH, **PRINTS, "bf16": BF16, "scheduler": DECAY},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "torch_adam": True, "adam_w_mode": True},
        },
        "zero_optimization": {
            **{**STAGE2, "allgather_bucket_size": 2e8, "reduce_bucket_size": "auto"},
            "offload_optimizer": {"device": "cpu"},
        },
    },
    "fastchat_lora_s3": {
        **{**AUTO_BATCH, **PRINTS, "bf16": BF16, "optimizer": OPTIMIZER, "scheduler": DECAY},
        "zero_optimization": {
            **{**STAGE3, "offload_optimizer": CPU, "offload_param": CPU, GATHER: "auto"},
        },
    },
    "alpaca_offload": {
        **{**AUTO_BATCH, "bf16": BF16, "optimizer": OPTIMIZER, "scheduler": DECAY},
        **{"steps_per_print": 5, "wall_clock_breakdown": False},
        "zero_optimization": {
            **{**STAGE3, "offload_optimizer": CPU, "offload_param": CPU, GATHER: False},
        },
    },
    # DeepSpeed-Chat, which fills in its numbers
    "deepspeed_chat": {
        **{"train_batch_size": 16, "train_micro_batch_size_per_gpu": 8, "steps_per_print": 10},
        **{"fp16": {"enabled": True, "loss_scale_window": 100}, "gradient_clipping": 1.0},
        **{"prescale_gradients": False, "wall_clock_breakdown": False},
        "hybrid_engine": {"enabled": False, "max_out_tokens": 512, "inference_tp_size": 1},
        "tensorboard": {"enabled": False, "output_path": "logs/", "job_name": "sft"},
        "zero_optimization": {
            "stage": 3,
            "offload_param": {"device": "none"},
            "offload_optimizer": {"device": "none"},
            "stage3_param_persistence_threshold": 1e4,
            "stage3_max_live_parameters": 3e7,
            "stage3_prefetch_bucket_size": 3e7,
            "memory_efficient_linear": False,
        },
    },
    # Accelerate, and a hand-written one of several tutorials
    "accelerate_zero3": {
        **{"train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto"},
        **{"gradient_accumulation_steps": 8, "gradient_clipping": 1.0},
        "zero_optimization": {
            **{"stage": 3, "offload_optimizer": {"device": "none"}},
            **{"offload_param": {"device": "none"}, GATHER: True},
        },
        "bf16": {"enabled": "auto"},
    },
    "tutorial_bfloat16": {
        **{"_comment": "8 GPUs", "train_batch_size": 128, "gradient_accumulation_steps": 4},
        **{"bfloat16": {"enabled": True}, "fp16": {"enabled": False}},
        **{"amp": {"enabled": False}, "elasticity": {"enabled": False, "micro_batch_size": 1}},
        "activation_checkpointing": {**RECOMPUTE, "number_checkpoints": None, "profile": False},
        "flops_profiler": {"enabled": False, "profile_step": 1, "output_file": None},
        "wandb": {"enabled": True, "project": "mine"},
        "zero_optimization": {**STAGE2, "load_from_fp32_weights": True},
    },
    "tutorial_without_zero": {
        **{"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4},
        **{"fp16": {"enabled": True}, "optimizer": {"type": "Adam", "params": {"lr": 1e-4}}},
    },
    "tutorial_oldest": {**AUTO_BATCH, "zero_optimization": True, "fp16": {"enabled": True}},
}
# Kinds that cannot be taken as they are, and the number of their problems.
OFFLOADED = {
    "tutorial_nvme": {
        **{**AUTO_BATCH, "fp16": FP16},
        "zero_optimization": {
            **STAGE3,
            "offload_optimizer": {"device": "nvme", "nvme_path": "/nvme", "buffer_count": 4},
            "offload_param": {"device": "nvme", "nvme_path": "/nvme", "buffer_size": 1e8},
            "aio": {"block_size": 262144, "queue_depth": 32, "thread_count": 1},
        },
    },
    "factory_z2_autotp": {
        **{**FACTORY, "_comment": "supported models", "tensor_parallel": {"autotp_size": 2}},
        "zero_optimization": {**STAGE2, "round_robin_gradients": True},
    },
    "factory_z3_alst": {
        **{**AUTO_BATCH, "bf16": {"enabled": True, "loss_scale": 0}, "optimizer": OPTIMIZER},
        "sequence_parallel": {"enabled": True, "size": 4, "mode": "ulysses"},
        "zero_optimization": {**STAGE3, "offload_optimizer": CPU, "offload_param": CPU},
    },
    "tutorial_stage2_params": {
        **{**AUTO_BATCH, "optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-4}}},
        "curriculum_learning": {"enabled": True, "curriculum_type": "seqlen"},
        "zero_optimization": {
            **{**STAGE2, "offload_optimizer": CPU, "mics_shard_size": 8},
            "offload_param": {**CPU, "fast_init": False},
        },
    },
}
REFUSED = {
    "tutorial_nvme": 2,
    "factory_z2_autotp": 1,
    "factory_z3_alst": 2,
    "tutorial_stage2_params": 5,
}


def config_with(tmp_path: Path, ds_config: dict[str, Any], **settings: Any) -> Config:
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(ds_config))
    config = legal_config(zero__config=str(file), **settings)
    return config


def settled(config: Config, precision: str = "bf16") -> tuple[dict[str, Any], list[str]]:
    return zero_json.settled(zero_json.given(config.zero), config, precision)


def filled(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Fill in what the Trainer fills in, so that DeepSpeed itself can check the result."""
    values = {
        **{"train_batch_size": 32, "train_micro_batch_size_per_gpu": 4},
        **{"gradient_accumulation_steps": 8, "gradient_clipping": 1.0},
    }
    result = {**copy.deepcopy(ds_config), **values}
    result["bf16"]["enabled"], result["fp16"]["enabled"] = True, False
    return result


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 25 and len(REFUSED) == len(OFFLOADED) == 4


@pytest.mark.parametrize("trains_base", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_json_of_another_tool_is_taken(kind: str, trains_base: bool, tmp_path: Path) -> None:
    config = config_with(tmp_path, KINDS[kind])
    config.lora.enabled = not trains_base
    assert check(config) == []
    given = zero_json.given(config.zero)
    build.require(config)
    made, lines = settled(config)
    assert zero.stage(made) == int(given.get("zero_optimization", {}).get("stage", 0))
    read = DeepSpeedConfig(filled(made))  # type: ignore[no-untyped-call]
    assert read.zero_optimization_stage == zero.stage(made)
    assert read.optimizer_name is read.scheduler_name is None
    if trains_base and zero.stage(made) == 3:
        assert read.zero_config.gather_16bit_weights_on_model_save
    for line in lines:
        assert line.startswith("theirs.json"), line


@pytest.mark.parametrize("kind", OFFLOADED)
def test_a_json_that_cannot_be_taken_is_refused_with_fixes_that_work(
    kind: str, tmp_path: Path
) -> None:
    config = config_with(tmp_path, OFFLOADED[kind])
    problems = check(config)
    assert len(problems) == REFUSED[kind]
    for problem in problems:
        apply(config, problem)
    assert check(config) == []
    made, _ = settled(config)
    DeepSpeedConfig(filled(made))  # type: ignore[no-untyped-call]


def apply(config: Config, problem: Problem) -> None:
    """Do what a fix says: an override of the JSON, as the command line would merge it."""
    key, _, value = problem.fix.partition("=")
    *above, leaf = key.removeprefix("zero.overrides.").split(".")
    assert key.startswith("zero.overrides."), problem
    node = config.zero.overrides
    for name in above:
        node = node.setdefault(name, {})
    node[leaf] = yaml.safe_load(value)


def test_what_settings_decide_is_said_with_both_values(tmp_path: Path) -> None:
    config = config_with(tmp_path, KINDS["transformers_zero2"])
    config.train.weight_decay = 0.01
    assert settled(config, "fp32")[1] == [
        "theirs.json says fp16.enabled=true; precision=fp32 decides",
        "theirs.json says optimizer=AdamW lr=3e-05 betas=[0.8, 0.999] eps=1e-08 "
        "weight_decay=3e-07; train.optim=adamw_torch_fused, train.learning_rate=0.0002, "
        "train.extra.adam_beta1=0.9, train.extra.adam_beta2=0.999, "
        "train.extra.adam_epsilon=1e-08, train.weight_decay=0.01 decide",
        "theirs.json says scheduler=WarmupLR warmup_min_lr=0 warmup_max_lr=3e-05 "
        "warmup_num_steps=500; train.lr_scheduler_type=cosine, train.learning_rate=0.0002, "
        "train.warmup_steps=0.03 decide",
    ]
    assert settled(config, "fp16")[1][0].startswith("theirs.json says optimizer=")
    config = config_with(tmp_path, KINDS["deepspeed_chat"])
    assert settled(config, "fp16")[1] == [
        "theirs.json says train_batch_size=16; train.global_batch_size=32 decides",
        "theirs.json says train_micro_batch_size_per_gpu=8; "
        "train.per_device_train_batch_size=4 decides",
    ]
    config.train.global_batch_size, config.train.per_device_train_batch_size = 16, 8
    assert settled(config, "fp16")[1] == []


def test_what_has_no_effect_is_said_unless_it_is_off(tmp_path: Path) -> None:
    config = config_with(tmp_path, KINDS["tutorial_bfloat16"])
    made, lines = settled(config)
    assert lines == [
        "theirs.json: wandb is not used: metrics are logged by sft; "
        "tracker=tensorboard is the setting",
        "theirs.json: zero_optimization.load_from_fp32_weights is not used: sft writes its own "
        "checkpoints, which DeepSpeed does not read",
        "theirs.json says train_batch_size=128; train.global_batch_size=32 decides",
        "theirs.json says gradient_accumulation_steps=4; train.global_batch_size=32 decides",
    ]
    assert made.keys() == {
        *AUTO_BATCH,
        *("bf16", "fp16", "flops_profiler", "zero_optimization"),
    }


def test_other_names_of_a_key_are_read(tmp_path: Path) -> None:
    section = {
        **{"stage": 3, "gather_16bit_weights_on_model_save": True, "prefetch_bucket_size": 7},
        **{"cpu_offload": True, "cpu_offload_param": True, "cpu_offload_use_pin_memory": False},
        **{"max_live_parameters": 5, "stage3_max_live_parameters": 6},
    }
    config = config_with(tmp_path, {"zero_optimization": section, "bfloat16": {"enabled": True}})
    unpinned = {"device": "cpu", "pin_memory": False}
    assert zero_json.given(config.zero) == {
        "bf16": {"enabled": True},
        "zero_optimization": {
            "stage": 3,
            GATHER: True,
            "stage3_prefetch_bucket_size": 7,
            "stage3_max_live_parameters": 6,
            "offload_optimizer": unpinned,
            "offload_param": unpinned,
        },
    }
    # An override means the same key under either name.
    config.zero.overrides = {"zero_optimization": {"cpu_offload": False, GATHER: False}}
    section = zero_json.given(config.zero)["zero_optimization"]
    assert "offload_optimizer" not in section and section[GATHER] is False


def test_offloading_keeps_the_optimizer_of_the_run(tmp_path: Path) -> None:
    config = config_with(tmp_path, KINDS["factory_z3_fp8"], train__optim="adafactor")
    assert check(config) == []
    made, lines = settled(config)
    assert made["zero_force_ds_cpu_optimizer"] is False
    assert (
        "theirs.json offloads the optimizer: zero_force_ds_cpu_optimizer=false keeps "
        "train.optim=adafactor" in lines
    )


def test_stage_0_is_plain_ddp(tmp_path: Path) -> None:
    for kind in ("factory_z0", "swift_zero0", "tutorial_without_zero"):
        config = config_with(tmp_path, KINDS[kind])
        assert zero.read(config.zero) is None
        choice, ds_config = zero.choose(config, None, "fp32")  # type: ignore[arg-type]
        assert ds_config is None and choice is not None and choice.value is None
        config.lora.enabled = False
        assert needs_masters(config)  # of weights that DeepSpeed does not keep
        reason = choice.reason.splitlines()[0]
        assert reason.endswith("theirs.json has ZeRO stage 0, so that the run is one of zero=none")


def test_a_value_that_deepspeed_refuses_is_refused_before_weights_load(tmp_path: Path) -> None:
    section = {**STAGE3, "reduce_bucket_size": 0, "overlap_comm": "sometimes"}
    section["offload_param"] = {"device": "gpu"}
    kind = {"zero_optimization": section, "fp16": {"enabled": True, "loss_scale": -1}}
    config = config_with(tmp_path, kind)
    assert check(config) == []
    with pytest.raises(ConfigError) as error:
        build.require(config)
    assert {problem.setting for problem in error.value.problems} == {
        "theirs.json: zero_optimization.reduce_bucket_size=0",
        "theirs.json: zero_optimization.overlap_comm=sometimes",
        "theirs.json: zero_optimization.offload_param.device=gpu",
        "theirs.json: fp16.loss_scale=-1",
    }
    for problem in error.value.problems:
        apply(config, problem)
    assert check(config) == []
    build.require(config)


def test_the_fixes_work_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "theirs.json"
    for kind in OFFLOADED.values():
        file.write_text(json.dumps(kind))
        with pytest.raises(ConfigError) as error:
            main.compose([f"zero.config={file}"])
        fixes = [problem.fix for problem in error.value.problems]
        assert main.compose([f"zero.config={file}", *fixes]).zero.config == str(file)


def test_what_the_run_decides_is_refused_in_an_override() -> None:
    over = {"bf16": {"enabled": True}, "gradient_clipping": 0.5, "compile": {"backend": "eager"}}
    over |= {"scheduler": {"type": "WarmupLR"}}
    found = zero_checks.problems(ZeroConfig("stage2.json", over), "adamw_torch", False)
    assert {(p.setting.partition("=")[0], p.fix) for p in found} == {
        ("zero.overrides.bf16.enabled", "precision=bf16, without zero.overrides.bf16.enabled"),
        (
            "zero.overrides.gradient_clipping",
            "train.max_grad_norm=0.5, without zero.overrides.gradient_clipping",
        ),
        (
            "zero.overrides.compile",
            "train.extra.torch_compile=true, without zero.overrides.compile",
        ),
        (
            "zero.overrides.scheduler",
            "train.lr_scheduler_type=..., without zero.overrides.scheduler",
        ),
    }


@pytest.mark.parametrize(
    ("kind", "fix"),
    [
        ({"zero_optimization": 3}, "zero=stage3"),
        ({"zero_optimization": [1]}, "zero=stage2"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
            "zero.overrides.zero_optimization.offload_optimizer.device=cpu",
        ),
    ],
)
def test_a_section_that_is_no_object_keeps_its_meaning(kind: Any, fix: str, tmp_path: Path) -> None:
    assert fix in [problem.fix for problem in check(config_with(tmp_path, kind))]


def test_a_stage_is_a_number_of_any_type_and_a_long_value_is_cut_off(tmp_path: Path) -> None:
    config = config_with(tmp_path, {"zero_optimization": {"stage": 2.0}})
    assert check(config) == [] and zero.stage(zero.read(config.zero)) == 2
    [problem] = check(config_with(tmp_path, {"mine": "x" * 100_000}))
    assert len(problem.setting) < 120
