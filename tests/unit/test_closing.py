"""The last lines of a run, read from the files of its folder."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from sft import process
from sft.run import closing


def folder_of(path: Path, run: dict[str, Any], records: list[dict[str, Any]]) -> Path:
    base = {"status": "finished", "seconds": 20.0, "resumed": [], "final": {"steps": 30}}
    (path / "run.json").write_text(json.dumps(base | run))
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in records))
    (path / "adapter").mkdir()
    return path


def test_a_run_of_two_starts_counts_the_time_of_both(tmp_path: Path) -> None:
    parts = {"seconds_data": 5.0, "seconds_compute": 70.0, "seconds_other": 5.0}
    idle = {"seconds_per_step": 8.0, "seconds_left": 900.0}
    records: list[dict[str, Any]] = [
        {"step": 0, "eval_loss": 4.0},
        {"step": 10, "loss": 2.0, "num_tokens": 8000.0, **parts, **idle},
        {"step": 10, "eval_loss": 1.5},
        {"step": 30, "loss": 1.0, "num_tokens": 16000.0, **parts, "memory_resident": 3 << 30},
        {"step": 30, "eval_loss": 1.75},
    ]
    best = {"metric": "eval_loss", "value": 1.5, "step": 10, "written": True}
    folder = folder_of(tmp_path, {"resumed": [{"from": "checkpoint-10"}], "best": best}, records)
    for step in (10, 30):
        (folder / f"checkpoint-{step}").mkdir()
    lines = closing.finished(folder)
    assert lines[0] == "finished in 2 min 40 s, in 2 starts: 30 steps, 16,000 tokens, 100 tokens/s"
    assert lines[1] == (
        "    eval loss    1.7500 at step 30, the last; 1.5000 at step 10, the best; the "
        "weights of step 10 are written"
    )
    assert lines[2] == "    peak memory  3.0 GiB of a process"
    assert lines[4].endswith(f"{folder}/checkpoint-10, {folder}/checkpoint-30")
    assert f"    next         sft generate run={folder} prompt='...'" in lines
    assert f"                 sft merge run={folder}" in lines


def test_the_written_weights_are_not_taken_for_those_before_training(tmp_path: Path) -> None:
    """These have the smallest loss here; an evaluation that is not a number is never the best."""
    values = {0: 1.0, 10: math.nan, 20: 3.0, 30: 3.5}
    records = [{"step": step, "eval_loss": value} for step, value in values.items()]
    best = {"metric": "eval_loss", "value": 3.0, "step": 20, "written": True}
    assert closing.finished(folder_of(tmp_path, {"best": best}, records))[1] == (
        "    eval loss  3.5000 at step 30, the last; 1.0000 at step 0, the best; 3.0000 at step "
        "20, which is written"
    )


def test_a_run_without_evaluations_or_figures_of_time(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {}, [{"step": 30, "loss": 1.0, "num_tokens": 600.0}])
    best = {"metric": "exact_match", "value": 0.5, "step": 20, "written": False}
    assert closing.finished(folder)[0] == "finished in 20 s: 30 steps, 600 tokens, 30 tokens/s"
    (folder / "adapter").rmdir()
    folder_of(folder, {"resumed": [{}], "best": best}, [])
    lines = closing.finished(folder)
    assert lines[0] == "finished in 20 s after the last of 2 starts: 30 steps"
    assert lines[1] == "    exact match  0.5000 at step 20, the best"
    assert closing.stopped(folder) == []


def test_the_command_is_the_one_that_a_user_gave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "sft"
    program.parent.mkdir()
    program.touch(0o755)
    python = str(program.parent / "python")
    monkeypatch.setattr(sys, "orig_argv", [python, str(program), "train", "lora.r=8", "a=b c"])
    assert process.command_line() == f"{program} train lora.r=8 'a=b c'"
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    assert process.command_line() == "sft train lora.r=8 'a=b c'"
    monkeypatch.setattr(sys, "orig_argv", [python, "-m", "sft.train"])
    assert process.command_line() == f"{python} -m sft.train"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")  # here, the parent of this process
    assert process.command_line() != f"{python} -m sft.train"
