"""The first pass finds what the loss depends on and disturbs nothing; what is planted is found."""

import contextlib
import copy
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import small_models
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from sft.config import zero
from sft.config.settings import (
    Config,
    LoraSection,
    ModelConfig,
    QuantizationConfig,
    TrainConfig,
    ZeroConfig,
)
from sft.data.collator import Collator
from sft.errors import ConfigError
from sft.fast import head
from sft.model import adapter, experts
from sft.model.base import load_frozen
from sft.model.quantization import quantization_config
from sft.plan import schedule
from sft.training import build, first_pass, left_out

SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64},
    **{"intermediate_size": 48, "ffn_dim": 48, "word_embed_proj_dim": 32},
}


def trainer_of(family: str = "llama", **settings: Any) -> Any:
    """Build what the first pass needs of a trainer, with LoRA on every linear layer."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **settings}))
    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    model = get_peft_model(base, lora)
    head.install(model.get_base_model(), "chunked")
    return SimpleNamespace(
        model=model,
        model_wrapped=model,
        data_collator=Collator(0, loss_positions=True),
        args=SimpleNamespace(device=torch.device("cpu")),
        accelerator=SimpleNamespace(autocast=contextlib.nullcontext),
    )


def data(longest: int = 20) -> Any:
    """Give rows of a few tokens."""
    counts = SimpleNamespace(longest=longest)
    return SimpleNamespace(
        train=SimpleNamespace(dataset=[{"input_ids": [5, 6, 7, 8]}], counts=counts)
    )


def test_all_adapters_of_a_plain_model_are_reached() -> None:
    trainer = trainer_of()
    before = copy.deepcopy(trainer.model.state_dict())
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    assert first_pass.unreached(trainer, trainer.model, data()) == []
    left_out.leave_out(trainer, data())
    assert torch.get_rng_state().equal(states[0]) and random.getstate() == states[1]
    assert all(map(np.array_equal, np.random.get_state(), states[2]))
    after = trainer.model.state_dict()
    assert after.keys() == before.keys()
    assert all(after[name].equal(value) for name, value in before.items())
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert trainer.model.training


def test_recomputing_and_layerdrop_are_off_during_the_pass() -> None:
    """OPT would leave out every layer, and reentrant checkpoints hide the parameters."""
    trainer = trainer_of("opt", layerdrop=1.0)
    trainer.model.gradient_checkpointing_enable({"use_reentrant": True})
    trainer.model.enable_input_require_grads()
    switched = [m for m in trainer.model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert first_pass.unreached(trainer, trainer.model, data()) == []
    assert switched and all(module.gradient_checkpointing for module in switched)
    assert trainer.model.get_base_model().model.decoder.layerdrop == 1.0


def skipped(trainer: Any, name: str) -> None:
    """Let layers called ``name`` be computed from their base weight, as fused kernels do."""
    for path, module in trainer.model.named_modules():
        if path.endswith(f".{name}"):
            module.forward = module.base_layer.forward


def test_a_layer_that_is_not_called_is_left_out() -> None:
    trainer = trainer_of()
    skipped(trainer, "o_proj")
    settings = trainer.model.peft_config["default"]
    settings.exclude_modules = {"model.other"}
    left_out.leave_out(trainer, data())
    assert settings.exclude_modules == (
        "(.*[.])?model[.]other|model.layers.[0-9]+.self_attn.o_proj"
    )
    adapted = [name for name, _ in trainer.model.named_parameters() if "lora_B" in name]
    assert len(adapted) == 12 and not [name for name in adapted if "o_proj" in name]
    assert first_pass.unreached(trainer, trainer.model, data()) == []


def test_nothing_that_is_reached_is_refused() -> None:
    trainer = trainer_of()
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        skipped(trainer, name)
    trainer.model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="would be trained, although it is not a part"):
        left_out.leave_out(trainer, data())
    trainer.model.get_input_embeddings().weight.requires_grad_(False)
    trainer.model.enable_input_require_grads()
    with pytest.raises(ConfigError, match="no gradient reaches any of its adapters"):
        left_out.leave_out(trainer, data())


def test_a_frozen_weight_that_is_trained_is_refused() -> None:
    trainer = trainer_of()
    trainer.model.get_base_model().model.norm.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"model.norm would be trained.*not a part") as refused:
        left_out.require_reached(trainer, data())
    assert refused.value.problems[0].fix == "lora.modules_to_save=[norm]"


def test_a_saved_module_that_is_not_reached_is_refused() -> None:
    trainer = trainer_of()
    model = trainer.model.get_base_model()
    model.model.unused = torch.nn.Linear(4, 4)
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["unused"])
    trainer.model = get_peft_model(trainer.model.unload(), lora)
    head.install(trainer.model.get_base_model(), "chunked")
    with pytest.raises(ConfigError, match=r"no gradient reaches model.unused") as refused:
        left_out.leave_out(trainer, data())
    assert refused.value.problems[0].fix == "lora.modules_to_save=null"


def test_one_expert_speaks_for_all_of_its_layer() -> None:
    """Nine tokens reach few of 64 experts; every layer has a number of its own."""
    name = first_pass._expert
    assert name("model.layers.3.mlp.experts.17.up_proj.lora_A.default.weight") == (
        "model.layers.3.mlp.experts.*.up_proj.lora_A.default.weight"
    )
    assert name("model.layers.3.self_attn.q_proj.lora_A.default.weight") == (
        "model.layers.3.self_attn.q_proj.lora_A.default.weight"
    )


@pytest.mark.parametrize(
    ("left", "kept", "found"),
    [
        (["a.vision.0.x", "a.vision.1.y"], ["a.text.0.x"], ["a.vision.*"]),
        (["l.0.m.out", "l.1.m.out"], ["l.0.m.in", "l.1.m.in"], ["l.[0-9]+.m.out"]),
        (["l.0.m.out"], ["l.0.m.in", "l.1.m.out"], ["l.0.m.out"]),
        (["v.x", "t.3.k"], ["t.2.k", "t.3.q"], ["t.3.k", "v.*"]),
    ],
)
def test_patterns_match_what_is_left_out_only(
    left: list[str], kept: list[str], found: list[str]
) -> None:
    assert left_out.patterns(left, kept) == found
    whole = "|".join(found)
    assert all(re.fullmatch(whole, path) for path in left)
    assert not any(re.fullmatch(whole, path) for path in kept)


# What PEFT, Transformers and DeepSpeed are given


def test_first_values_of_stacked_experts_cannot_come_from_a_weight() -> None:
    """PEFT would end in an AttributeError once the weights are loaded."""
    config = Config(lora=LoraSection(extra={"init_lora_weights": "pissa"}))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small_models.small_config("deepseek_v3"))
    with pytest.raises(ConfigError, match=r"linear layers only, and model.layers.1.mlp.experts"):
        adapter.lora_config(config, model)
    config.lora.target_modules = "attention"
    assert adapter.lora_config(config, model) is not None
    config.lora.rank_pattern = {"q_a_proj": 17}  # it has 16 outputs
    with pytest.raises(ConfigError, match=r"16, less than .* 17\n    fix: .*q_a_proj: 16}"):
        adapter.lora_config(config, model)


ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
MLP = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("targets", "layers", "adapted"),
    [
        ("all-linear", [1], {f"1.{name}" for name in ATTENTION | MLP}),
        ("attention", 0, {f"0.{name}" for name in ATTENTION}),
        (r".*\.[qv]_proj", [0, 1], {f"{n}.self_attn.{x}_proj" for n in (0, 1) for x in "qv"}),
        ("all-linear", [], {f"{layer}.{name}" for layer in (0, 1) for name in ATTENTION | MLP}),
        # The names alone would adapt k_proj of layer 1 too.
        (
            r".*layers\.0\.self_attn\..*|.*layers\.1\..*q_proj",
            [0, 1],
            {*(f"0.{name}" for name in ATTENTION), "1.self_attn.q_proj"},
        ),
    ],
)
def test_layers_can_be_chosen_with_any_targets(
    targets: str, layers: Any, adapted: set[str]
) -> None:
    extra = {"layers_to_transform": layers}
    config = Config(lora=LoraSection(target_modules=targets, extra=extra))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    made = adapter.lora_config(config, model)
    assert made is not None
    tried = adapter.attached(made, model).named_modules()
    found = {path.partition("layers.")[2] for path, module in tried if hasattr(module, "lora_A")}
    assert found == adapted


def test_8_bit_layers_take_inputs_of_four_dimensions(tmp_path: Path) -> None:
    """The compressed keys and values of DeepSeek-V3 have four; bitsandbytes fails on them."""
    small_models.build(tmp_path, "deepseek_v3")
    where = ModelConfig(name_or_path=str(tmp_path))
    model: Any = load_frozen(where, QuantizationConfig(load_in_8bit=True))
    plain: Any = load_frozen(where, QuantizationConfig())
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        found, wanted = (one(input_ids=ids).logits for one in (model, plain))
    assert float((found - wanted).abs().max()) < 0.05 * float(wanted.abs().max())


def test_libraries_get_copies() -> None:
    config = Config()
    config.lora = LoraSection(rank_pattern={"q_proj": 2}, extra={"target_parameters": ["x"]})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    made = adapter.lora_config(config, model)
    assert made is not None
    made.rank_pattern["k_proj"] = 3
    made.target_parameters.append("y")
    assert config.lora.rank_pattern == {"q_proj": 2}
    assert config.lora.extra == {"target_parameters": ["x"]}
    over = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    read = zero.read(ZeroConfig("stage2.json", over))
    assert read is not None
    read["zero_optimization"]["offload_optimizer"]["device"] = "none"
    assert over["zero_optimization"]["offload_optimizer"]["device"] == "cpu"
    bits = QuantizationConfig(load_in_8bit=True, extra={"llm_int8_skip_modules": ["a"]})
    quantization_config(bits, torch.float32).llm_int8_skip_modules.append("b")
    assert bits.extra == {"llm_int8_skip_modules": ["a"]}


def test_whole_numbers_become_floats_where_trl_wants_floats() -> None:
    given = {"router_aux_loss_coef": 0, "adam_beta1": 1, "eval_delay": 2, "ddp_timeout": 9}
    made = build._floats({**given, "torch_compile": True, "unknown": 1})
    assert [type(made[name]) for name in given] == [float, float, float, int]
    assert made == {**given, "torch_compile": True, "unknown": 1}


@pytest.mark.parametrize(
    ("train", "samples", "steps", "warmup"),
    [
        (TrainConfig(global_batch_size=4), 9, (3, 9), None),
        (TrainConfig(global_batch_size=4, num_train_epochs=0.5), 9, (3, 2), None),
        (TrainConfig(global_batch_size=4, num_train_epochs=1), 4, (1, 1), 0),
        (TrainConfig(global_batch_size=4, max_steps=1), 9, (3, 1), 0),
        (TrainConfig(global_batch_size=4, max_steps=1, warmup_steps=0), 9, (3, 1), None),
    ],
)
def test_a_run_of_one_step_has_no_warm_up(
    train: TrainConfig, samples: int, steps: tuple[int, int], warmup: int | None
) -> None:
    assert schedule.planned_steps(train, samples) == steps
    found = schedule.choose_warmup(train, samples)
    assert (found and found.value) == warmup


def test_warm_up_steps_of_a_run_of_one_step_are_refused() -> None:
    with pytest.raises(ConfigError, match="the run has one step, whose learning rate would be 0"):
        schedule.choose_warmup(TrainConfig(num_train_epochs=1, warmup_steps=3), 4)


@pytest.mark.parametrize(
    ("config", "coefficient", "rule"),
    [
        ({}, 0.1, "returns no router logits"),
        ({"output_router_logits": False, "router_aux_loss_coef": 0.1}, None, "no num_experts"),
        ({"output_router_logits": False}, None, None),
        ({"output_router_logits": False, "router_aux_loss_coef": 0.1}, 0, None),
        (
            {"output_router_logits": False, "router_aux_loss_coef": 0.1, "num_local_experts": 4},
            None,
            None,
        ),
    ],
)
def test_the_balancing_loss_is_refused_where_trl_cannot_compute_it(
    config: dict[str, Any], coefficient: float | None, rule: str | None
) -> None:
    text = SimpleNamespace(**config)
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    settings = Config()
    if coefficient is not None:
        settings.train.extra["router_aux_loss_coef"] = coefficient
    if rule is None:
        experts.check_balance(settings, model)
        return
    with pytest.raises(ConfigError, match=rule):
        experts.check_balance(settings, model)
