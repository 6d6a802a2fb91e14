"""Small models and rows that every integration test shares."""

import json
from pathlib import Path

import pytest
from support import build_model


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a small untied Llama."""
    return build_model(tmp_path_factory.mktemp("models") / "llama", "llama", tied=False)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give 24 prompt/completion rows of different lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        {"prompt": f"Repeat {'abc' * (1 + i % 5)}.", "completion": f"{'abc' * (1 + i % 5)} {i}"}
        for i in range(24)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def saving(llama: Path, rows: Path) -> list[str]:
    """Give the settings of six steps that are saved every second one."""
    return [
        *("model=hf", f"model.name_or_path={llama}", "template=chat"),
        *("dataset=jsonl", f"dataset.path={rows}", "dataset.eval_fraction=0.34"),
        *("train.global_batch_size=4", "train.per_device_train_batch_size=2"),
        *("train.learning_rate=1e-2", "train.logging_steps=1", "train.max_steps=6"),
        *("train.save_strategy=steps", "train.save_steps=2", "precision=fp32"),
        "train.max_forgetting=null",
    ]
