"""What is estimated is what the backward pass keeps, and decides whether it is recomputed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import build_model
from transformers import AutoModelForCausalLM

from sft.config.rules import Choice
from sft.errors import ConfigError
from sft.model.base import load_architecture
from sft.plan import memory
from sft.train import main

TOKENS = 256


def kept(model: Any) -> int:
    """Count the bytes that a forward pass keeps for the backward pass, but for parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model(torch.randint(0, 200, (1, TOKENS)), use_cache=False).last_hidden_state
    assert states.requires_grad
    return sum(
        tensor.untyped_storage().nbytes()
        for place, tensor in found.items()
        if place not in parameters
    )


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(
    # The estimate is of a gated MLP, the most there is: twice what OPT's and NeoX's keep of it.
    ("family", "most"),
    [("llama", 1.15), ("qwen3", 1.15), ("gpt_neox", 1.4), ("opt", 1.8)],
)
def test_activations(tmp_path: Path, family: str, most: float, kernel: str) -> None:
    changed = {"dropout": 0.0} if family == "opt" else {}
    folder = build_model(tmp_path, family, tied=True, **changed)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=kernel)
    lora = LoraConfig(r=4, target_modules="all-linear")
    base = get_peft_model(model, lora).get_base_model().base_model
    scored = TOKENS if kernel == "eager" else 0
    estimate = memory.activation_bytes(model.config, TOKENS, 4, scored)
    assert 0.95 < estimate / kept(base) < most


def test_architectures_without_heads_or_with_layers_of_their_own() -> None:
    mamba = SimpleNamespace(hidden_size=10, num_hidden_layers=3, intermediate_size=20)
    one = memory.activation_bytes(mamba, 1, 1)
    assert one == 3 * (6 * 10 + 4 * 10 + 4 * 20)
    mamba.intermediate_size = [20, 20, 20]  # Gemma 3n names each layer's
    assert memory.activation_bytes(mamba, 1, 1) == one


@pytest.mark.parametrize(
    ("overrides", "stage", "expected"),
    [
        ([], 0, 2),  # bf16, frozen
        ([], 3, 1),
        (["quantization=int8"], 0, 1),
        (["quantization=nf4"], 0, 0.57),
        (["lora=none"], 0, 12 + 4),  # float32 weights and moments, float32 gradients
        (["lora=none"], 1, 12 / 2 + 2 + 2),  # and a copy to compute with, its gradients
        (["lora=none"], 2, 12 / 2 + 2 / 2 + 2),
        (["lora=none"], 3, 12 / 2 + 2 / 2 + 2 / 2),
    ],
)
def test_bytes_of_a_parameter(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], stage: int, expected: float
) -> None:
    monkeypatch.setattr(memory, "world_size", lambda: 2)
    config = main.compose(overrides)
    assert memory.state_bytes(config, 1_000_000, 2, stage) == round(expected * 1_000_000)


def test_what_does_not_fit_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = main.compose(["train.per_device_train_batch_size=16"])
    architecture = load_architecture(config.model)

    def choice(**more: Any) -> Choice:
        return memory.choose_checkpointing(config, architecture, 128, 4, 0, **more)

    def chosen(**more: Any) -> bool:
        return bool(choice(**more).value)

    text = architecture.config.get_text_config()
    needed = memory.activation_bytes(text, 16 * 128, 4)
    needed += memory.state_bytes(config, architecture.num_parameters(), 4, 0)
    monkeypatch.setattr(memory, "available", lambda: round(1.31 * needed))
    assert not chosen()
    assert chosen(taken=needed) and chosen(keeps_scores=True)
    assert "of weights and optimizer state fit into" in choice().reason
    monkeypatch.setattr(memory, "available", lambda: round(1.29 * needed))
    assert chosen()
    assert "state plus a margin of 30% do not fit into" in choice().reason
    config.train.gradient_checkpointing = False
    assert choice() == Choice("train.gradient_checkpointing", False, "as set")
    monkeypatch.setattr(architecture, "supports_gradient_checkpointing", False, raising=False)
    assert choice().value is False
    config.train.gradient_checkpointing = "auto"
    assert choice().reason == "llama cannot recompute activations"
    config.train.gradient_checkpointing = True
    with pytest.raises(ConfigError, match=r"fix: train.gradient_checkpointing=false"):
        choice()
