"""Each reference recipe trains end to end on the embedded model and a few rows of its own kind."""

import json
from pathlib import Path

import pytest
from support import ROOT, losses
from warm import run_warm

TEXT = ["dataset=text", "dataset.path=text.txt", "dataset.max_length=64"]
# What replaces the recipe's model, data and length, and the steps that then follow.
RECIPES = {
    "opt-125m_wikitext": (TEXT, 3),
    "gpt-j-6b_tiny-shakespeare": (TEXT, 1),
    "gpt-neox-20b": ([*TEXT, "dataset.name=null", "dataset.subset=null"], 1),
    "text-folder": (["dataset.path=texts", "dataset.max_length=64"], 1),
    "lora_prompt-response": (["dataset.path=rows.jsonl", "dataset.max_length=64"], 5),
}
GRID = "opt-125m_wikitext_grid"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give text, a folder of texts, and prompt/response rows."""
    text = "".join(f"Line {i} of a text that says little, {i} times over.\n" for i in range(40))
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "texts" / "more").mkdir(parents=True)
    for i in range(10):
        path = tmp_path / "texts" / ("more" if i % 2 else "") / f"{i}.txt"
        path.write_text(text[i * 20 :][:400])
    rows = [{"prompt": f"Write {i} a.", "response": "a" * i} for i in range(1, 10)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_every_recipe_is_here() -> None:
    found = {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert found == {*RECIPES, GRID}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs_on_two_ranks(folder: Path, name: str) -> None:
    replaced, steps = RECIPES[name]
    result = run_warm(
        "train",
        *(f"experiment={name}", "model=tiny", *replaced, "output_dir=run", "train.logging_steps=1"),
        ranks=2,
        cwd=folder,
    )
    record = json.loads((folder / "run" / "run.json").read_text())
    assert record["status"] == "finished" and record["ranks"] == 2
    assert record["final"]["steps"] == steps, result.stdout
    assert len(losses(folder / "run")) == steps
    assert record["final"]["eval_loss"] < 20
    kind = "adapter" if name in ("gpt-neox-20b", "lora_prompt-response") else "model"
    assert (folder / "run" / kind).is_dir()


def test_grid_keeps_the_global_batch(folder: Path) -> None:
    """Four trials, one per micro-batch, each with the same batch and so the same loss."""
    run_warm(
        "train",
        *("-m", f"experiment={GRID}", "model=tiny", *TEXT, "hydra.sweep.dir=grid"),
        *("train.max_steps=2", "train.warmup_steps=0", "precision=fp32"),
        cwd=folder,
    )
    trials = json.loads((folder / "grid" / "sweep.json").read_text())
    assert [trial["overrides"] for trial in trials] == [
        [f"train.per_device_train_batch_size={size}"] for size in (2, 4, 8, 16)
    ]
    assert {trial["status"] for trial in trials} == {"finished"}
    found = [trial["final"]["eval_loss"] for trial in trials]
    assert found == pytest.approx([found[0]] * 4, abs=1e-4)  # tiny has no dropout
