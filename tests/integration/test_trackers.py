"""A run that is killed and resumed, through the command, has each step once at its trackers."""

from pathlib import Path

import pytest
import trackers as sent
from support import ROOT, records
from warm import run_warm

from sft.config import packages

INJECT = str(ROOT / "benchmarks" / "inject.py")


def test_a_killed_and_resumed_run_has_each_step_once(
    tmp_path: Path, saving: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorboard", "wandb"):
        if not packages.installed(name):
            pytest.skip(f"not installed: {name}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    command = ["sft.train", *saving, f"output_dir={run}", "tracker=[tensorboard,wandb]"]
    fault = "SIGKILL:sft.training.guard.Guard.on_step_end:before:4:0"  # after checkpoint-2
    assert run_warm(INJECT, fault, *command, cwd=tmp_path, check=False).returncode != 0
    said = run_warm("train", *command[1:], cwd=tmp_path).stdout
    assert "resuming from" in said and f"tracker tensorboard: tensorboard --logdir {run}" in said
    logged = {
        (key.replace("eval_", "eval/") if "eval_" in key else f"train/{key}", record["step"])
        for record in records(run)
        for key in record.keys() - {"step", "time"}
    }
    assert len(logged) > 6 * 5
    for name in ("tensorboard", "wandb"):
        assert sent.READERS[name](run) == dict.fromkeys(logged, 1), name
