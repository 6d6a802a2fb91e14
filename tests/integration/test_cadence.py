"""Runs that evaluate and save several times an epoch, or after a share of all steps."""

from pathlib import Path

import pytest
from support import ROOT, records
from warm import run_warm

INJECT = str(ROOT / "benchmarks" / "inject.py")


@pytest.fixture
def five_steps(saving: list[str], rows: Path) -> list[str]:
    """Give the settings of epochs of five steps: 18 of 24 rows, four in each step."""
    own = ("max_steps", "save_s", "eval_fraction")
    settings = [item for item in saving if not any(name in item for name in own)]
    return [*settings, "dataset.eval_fraction=0.25", "train.num_train_epochs=2"]


def evaluated(run: Path) -> list[int]:
    return [record["step"] for record in records(run) if "eval_loss" in record]


def saved(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


def test_points_within_epochs_are_the_same_in_a_run_that_is_resumed_with_other_ranks(
    tmp_path: Path, five_steps: list[str]
) -> None:
    from sft import prove

    straight, run = tmp_path / "straight", tmp_path / "run"
    command = [*five_steps, "train.evals_per_epoch=2", "train.saves_per_epoch=3"]
    command += ["train.save_total_limit=null"]
    done = run_warm("train", *command, f"output_dir={straight}", cwd=tmp_path)
    assert "after steps 3, 5 of the 5 of each epoch" in done.stdout + done.stderr
    assert evaluated(straight) == [0, 3, 5, 8, 10]
    assert saved(straight) == [2, 4, 5, 7, 9, 10]
    # A signal after step 3 saves it without the evaluation that is due, which the next start does.
    fault = "SIGUSR1:sft.training.guard.Guard.on_step_end:before:3:0"
    stopped = run_warm(
        INJECT, fault, "sft.train", *command, f"output_dir={run}", cwd=tmp_path, check=False
    )
    assert stopped.returncode == 75
    assert (evaluated(run), saved(run)) == ([0], [2, 3])
    run_warm("train", *command, f"output_dir={run}", cwd=tmp_path, ranks=2)
    assert evaluated(run) == evaluated(straight)
    assert saved(run) == [2, 3, 4, 5, 7, 9, 10]
    values = [
        [record["eval_loss"] for record in records(folder) if "eval_loss" in record]
        for folder in (run, straight)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4)
    prove.cut_back(run, 7)
    longer = ["train.max_steps=13", "resume.allow=[train.max_steps]", f"output_dir={run}"]
    run_warm("train", *command, *longer, cwd=tmp_path)
    assert evaluated(run) == [0, 3, 5, 8, 10, 13]
    assert saved(run) == [2, 3, 4, 5, 7, 9, 10, 12, 13]


def test_shares_of_all_steps_and_a_single_checkpoint(tmp_path: Path, five_steps: list[str]) -> None:
    command = [*five_steps, "train.eval_strategy=steps", "train.eval_steps=0.25"]
    command += ["train.save_strategy=steps", "train.save_steps=0.5", "train.save_total_limit=1"]
    command = [item for item in command if not item.startswith("train.logging_steps")]
    run = tmp_path / "run"
    run_warm("train", *command, "train.logging_steps=0.34", f"output_dir={run}", cwd=tmp_path)
    assert evaluated(run) == [0, 3, 6, 9, 10]
    assert [record["step"] for record in records(run) if "loss" in record] == [4, 8]
    text = (run / "config.yaml").read_text()
    assert "eval_steps: 0.25\n" in text
    assert "warmup_steps: 0.03\n" in text
    losses = {
        record["step"]: record["eval_loss"] for record in records(run) if record.get("eval_loss")
    }
    best = min((step for step in losses if step), key=losses.__getitem__)
    assert saved(run) == sorted({10} | ({best} & {5, 10}))


def test_the_newest_checkpoint_stays_beside_a_best_one(
    tmp_path: Path, five_steps: list[str]
) -> None:
    """Step 10 is saved before its evaluation, when that of step 5 is the best one."""
    command = [*five_steps, "train.eval_strategy=epoch", "train.save_total_limit=1"]
    command += ["train.save_strategy=steps", "train.save_steps=1", f"output_dir={tmp_path / 'run'}"]
    run_warm("train", *command, cwd=tmp_path)
    assert saved(tmp_path / "run") == [5, 10]
    longer = ["train.num_train_epochs=3", "resume.allow=[train.num_train_epochs]"]
    run_warm("train", *(item for item in command if "epochs" not in item), *longer, cwd=tmp_path)
    assert evaluated(tmp_path / "run") == [0, 5, 10, 15]
