"""Sweeps that train: the embedded model, two steps a trial."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python

pytestmark = pytest.mark.usefixtures("warm_ranks")
SHORT = [
    "train.max_steps=2",
    "train.global_batch_size=16",
    "dataset.max_rows=64",
    "dataset.max_eval_rows=8",
    "dataset.exact_match=0",
]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]


def sft_train(
    folder: Path, *arguments: str, python: str, torchrun: tuple[str, ...] | list[str] = ()
) -> subprocess.CompletedProcess[str]:
    command = [python, "-m", *torchrun, "sft.train", *arguments, *SHORT]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )


def read(path: Path) -> dict:  # type: ignore[type-arg]
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_a_failed_trial_stops_no_other_and_nothing_trains_twice(tmp_path: Path) -> None:
    python = warm_python.executable()
    command = ("-m", "lora.target_modules=attention,mlp,all-linear")  # mlp is no linear layer
    done = sft_train(tmp_path, *command, python=python)
    assert done.returncode == 1, done.stdout + done.stderr
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert folder.name.startswith("lora.target_modules=attention,mlp,all-linear+")
    trials = json.loads((folder / "sweep.json").read_text())
    values = ("attention", "mlp", "all-linear")
    assert [item["overrides"] for item in trials] == [[f"lora.target_modules={x}"] for x in values]
    assert [item["status"] for item in trials] == ["finished", "failed", "finished"]
    assert "lora.target_modules=mlp\n    matches no module" in trials[1]["message"]
    assert not (tmp_path / trials[1]["output_dir"]).exists()
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    for item, targets in (
        (trials[0], attention),
        (trials[2], attention | {"up_proj", "gate_proj", "down_proj"}),
    ):
        record = read(tmp_path / item["output_dir"] / "run.json")
        assert (record["status"], record["ranks"]) == ("finished", 1)
        assert item["final"] == record["final"]
        assert item["final"]["eval_loss"] > 0
        adapter = read(tmp_path / item["output_dir"] / "adapter" / "adapter_config.json")
        assert {name.rpartition(".")[2] for name in adapter["target_modules"]} == targets
    assert trials[0]["final"]["eval_loss"] != trials[2]["final"]["eval_loss"]
    assert "trial 2/3  lora.target_modules=mlp  failed after" in done.stdout
    assert done.stdout.count("best") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "error: " not in done.stderr  # the table has it: some trials finished

    sizes = [os.stat(tmp_path / item["log"]).st_size for item in trials]
    again = sft_train(tmp_path, *command, python=python)
    assert again.returncode == 1
    assert again.stdout.count("  finished before, eval loss") == 2
    after = json.loads((folder / "sweep.json").read_text())
    assert [item["final"] for item in after] == [item["final"] for item in trials]
    grown = [os.stat(tmp_path / item["log"]).st_size for item in after]
    assert [new > old for new, old in zip(grown, sizes, strict=True)] == [False, True, False]


def test_under_torchrun_each_trial_trains_once_on_as_many_ranks(tmp_path: Path) -> None:
    """The launchers of the sweep and of its trials start as a user starts them."""
    command = ("-m", "seed=1,2", "hydra.sweep.dir=sweep")
    done = sft_train(tmp_path, *command, python=sys.executable, torchrun=TORCHRUN)
    assert done.returncode == 0, done.stdout + done.stderr
    started = [line for line in done.stdout.splitlines() if line.endswith("  started")]
    assert started == ["trial 1/2  seed=1  started", "trial 2/2  seed=2  started"]
    for seed in (1, 2):
        record = read(tmp_path / "sweep" / f"seed={seed}" / "run.json")
        assert (record["status"], record["ranks"]) == ("finished", 2)
        log = (tmp_path / "sweep" / f"seed={seed}.log").read_text()
        assert log.count("first sample") == 1
        lines = (tmp_path / "sweep" / f"seed={seed}" / "metrics.jsonl").read_text().splitlines()
        assert sum("train_loss" in json.loads(line) for line in lines) == 1
