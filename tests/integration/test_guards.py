"""Each guard of a run sees the fault that it exists for, in several families and in bf16.

The faults of isolation are planted in tests/unit/test_isolation.py, those of the LM head in
tests/unit/test_head.py, ranks that part in test_ranks.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import peft_model
from support import build_adapter, build_model
from transformers import AutoModelForCausalLM

from sft.errors import CheckpointError, MergeError
from sft.merge import __main__ as merge
from sft.merge.change import Change
from sft.merge.report import REPORT
from sft.train import main, train

BASES: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": "all-linear"},
    "gpt2": {"target_modules": ["c_attn", "c_proj"]},  # its weights are transposed
    "qwen3_moe": {
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    },
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Give a base of a family, stored in bf16."""
    folder = tmp_path_factory.mktemp("bases")

    def base_of(family: str) -> Path:
        path = folder / family
        if not path.exists():
            build_model(path, family, tied=False)
            AutoModelForCausalLM.from_pretrained(path).bfloat16().save_pretrained(path)
        return path

    return base_of


@pytest.mark.parametrize("fault", ["lost", "doubled", "swapped"])
@pytest.mark.parametrize("family", BASES)
def test_a_wrong_tile_of_a_merge_in_bf16(
    tmp_path: Path,
    bases: Callable[[str], Path],
    family: str,
    fault: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all changed weights one is written wrongly."""
    base = bases(family)
    adapter = build_adapter(tmp_path / "adapter", base, **BASES[family])
    honest = Change._add_products
    places: list[int] = []

    def dishonest(self: Change, tile: torch.Tensor, *rest: Any) -> None:
        before = tile.clone()
        honest(self, tile, *rest)
        if not places:
            places.append(id(self))
        if id(self) == places[0]:
            changed = tile - before
            tile.copy_(before + {"lost": 0, "doubled": 2, "swapped": -1}[fault] * changed)

    command = [f"adapter={adapter}", f"base={base}", f"output={tmp_path / 'out'}"]
    with monkeypatch.context() as planted:
        planted.setattr(Change, "_add_products", dishonest)
        with pytest.raises(MergeError, match=r"differs from base \+ adapter"):
            merge.merge(merge.main.compose(command))
    assert not (tmp_path / "out").exists() and places
    merge.merge(merge.main.compose(command))
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert report["passed"] and report["dtype"] == "bfloat16"


def lose(weights: dict[str, torch.Tensor], name: str) -> None:
    del weights[name]


def change(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name].clone()
    weights[name].view(-1)[-1] *= 1.01


def damage(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = torch.full_like(weights[name], torch.nan)


def empty(weights: dict[str, torch.Tensor], name: str) -> None:
    weights[name] = weights[name][:0]


@pytest.mark.parametrize(
    ("fault", "said"),
    [(lose, "1 missing"), (change, "1 not the model's"), (damage, "not finite"), (empty, "empty")],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_a_wrong_tensor_of_a_saved_adapter_in_bf16(
    tmp_path: Path,
    bases: Callable[[str], Path],
    rows: Path,
    family: str,
    fault: Callable[[dict[str, torch.Tensor], str], None],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One tensor goes wrong between the model and its file."""
    written = peft_model.safe_save_file

    def dishonest(weights: dict[str, torch.Tensor], *rest: Any, **options: Any) -> None:
        weights = dict(weights)
        fault(weights, max(name for name in weights if "lora_B" in name))
        written(weights, *rest, **options)

    run = tmp_path / "run"
    command = [
        *("model=hf", f"model.name_or_path={bases(family)}", f"output_dir={run}"),
        *("dataset=jsonl", f"dataset.path={rows}", "template=chat", "precision=bf16"),
        *("train.global_batch_size=4", "train.per_device_train_batch_size=4"),
        *("train.max_steps=2", "train.learning_rate=1e-2"),
    ]
    with monkeypatch.context() as planted:
        planted.setattr(peft_model, "safe_save_file", dishonest)
        with pytest.raises(CheckpointError, match=said):
            train(main.compose(command))
    assert not (run / "adapter").exists()
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
