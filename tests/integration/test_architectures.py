"""A sample of families trains one step exactly as Transformers and PEFT do, merges and answers.

The whole table is made by benchmarks/architectures.py, which these tests call.
"""

from pathlib import Path
from typing import Any

import architectures
import pytest
from architectures_page import PARTS, total

from sft.fast import isolation
from sft.training import trainer

# What a family stands for, and whether its rows are joined by default on a CPU.
SAMPLE = {
    "llama": ("dense", True),
    "hyperclovax": ("custom scaling", True),
    "gemma3_text": ("sliding windows", True),
    "gemma4_text": ("layers of different shapes", True),
    "llama4_text": ("chunks", False),
    "mixtral": ("experts", True),
    "granitemoe": ("experts under other names", True),
    "qwen2_moe": ("a shared expert", True),
    "afmoe": ("an adapter on a router's parameter", True),
    "deepseek_v32": ("an indexer", False),
    "lfm2": ("convolutions", False),
    "qwen3_next": ("delta rule and attention", False),
    "granitemoehybrid": ("states and experts", False),
    "doge": ("a mask of its own", False),
    "rwkv": ("a state, without attention masks", False),
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_family_is_exact(kind: str, tmp_path: Path) -> None:
    result = architectures.compare(kind, "fp32", tmp_path, ways=("default",))
    found = {part: result[part] for part in PARTS if part in result}
    assert total(result) == "exact", found
    assert {part for part in found if "figure" in found[part]} >= {"default", "eval", "answers"}
    assert result["joined"] is SAMPLE[kind][1]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("xlm", "xlm is not causal"),
        ("reformer", "reformer cannot be trained on a text of 9 tokens"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(kind: str, said: str, tmp_path: Path) -> None:
    result = architectures.compare(kind, "fp32", tmp_path, ways=("default",))
    assert total(result) == "refused"
    assert result["default"]["message"].startswith(said)


def test_padding_that_only_the_cache_shows_is_found_in_bf16(tmp_path: Path) -> None:
    """GIT's mask is wrong from the second token on; in bf16 the mean over tokens hid it."""
    result = architectures.compare("git", "bf16", tmp_path, ways=("default",))
    assert result["answers"] == {"verdict": "exact", "figure": 0.0, "bound": 2.0**-5}


def test_a_gradient_that_is_one_percent_off_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault is in the gradient of one of the fourteen adapters."""
    stock = trainer.Trainer.training_step

    def training_step(self: Any, model: Any, *arguments: Any, **named: Any) -> Any:
        loss = stock(self, model, *arguments, **named)
        for name, weight in model.named_parameters():
            if weight.grad is not None and "layers.1.self_attn.q_proj.lora_B" in name:
                weight.grad *= 1.01
        return loss

    monkeypatch.setattr(trainer.Trainer, "training_step", training_step)
    result = architectures.compare("llama", "fp32", tmp_path, ways=("default",))
    assert total(result) == "wrong"
    assert result["default"]["verdict"] == "wrong" and result["eval"]["verdict"] == "exact"
    assert 1e-4 < result["default"]["figure"] < 1e-2


def test_positions_that_no_guard_caught_are_wrong_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CamemBERT's rows are joined although it counts positions in its own way."""
    monkeypatch.setattr(isolation, "prove_isolation", lambda probe, may_pad: None)
    result = architectures.compare("camembert", "bf16", tmp_path, ways=("default",))
    assert result["joined"] is True and total(result) == "wrong"
    assert result["default"]["figure"] > 2 * result["default"]["bound"]


def test_a_refusal_after_training_is_wrong() -> None:
    exact, refused = {"verdict": "exact"}, {"verdict": "refused"}
    assert total({"default": exact, "other": refused, "merge": exact}) == "exact"
    assert total({"default": exact, "merge": refused}) == "wrong"
    assert total({"default": refused, "other": refused}) == "refused"
