"""The proof that a resumed run is the same run, under each stage; and that it can fail."""

import json
import re
import sys
from pathlib import Path

import pytest
import warm_python
from safetensors.torch import load_file, save_file
from warm import run_warm

from sft import prove
from sft.checkpoint import folders
from sft.errors import CheckpointError, ConfigError, RunError
from sft.files import hash_of

pytestmark = pytest.mark.usefixtures("warm_ranks")
WORKERS = ["train.dataloader_num_workers=2", "train.extra.dataloader_persistent_workers=true"]


@pytest.mark.parametrize(
    "settings",
    [
        ["zero=stage1", "dataset.packing=bfd", "dataset.max_length=64", "dataset.max_rows=18"],
        ["zero=stage2", "train.optim=adamw_8bit", *WORKERS],
        ["zero=stage3", "lora=none", "train.per_device_train_batch_size=1"],
    ],
    ids=lambda settings: settings[0],
)
def test_a_resumed_run_is_the_same_run(
    tmp_path: Path, saving: list[str], settings: list[str]
) -> None:
    """On 2 ranks, in a later epoch; accumulation, packing, workers, 8-bit Adam, all weights."""
    run = tmp_path / "run"
    command = {
        **dict(item.split("=", 1) for item in [*saving, "dataset.max_rows=12"]),
        **{"train.max_steps": "5", "train.save_steps": "3", "lora.lora_dropout": "0.1"},
        **{"train.eval_strategy": "steps", "train.eval_steps": "1", "output_dir": str(run)},
        **dict(item.split("=", 1) for item in settings),
    }
    words = [
        f"{key}={value}"
        for key, value in command.items()
        if not (key == "lora.lora_dropout" and "lora" in command)
    ]
    run_warm("train", *words, ranks=2, cwd=tmp_path)
    straight = prove.outcome(run)
    state = json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())
    assert 1 < state["epoch"] < 2, state["epoch"]
    prove.cut_back(run, 3)
    again = run_warm("train", *words, ranks=2, cwd=tmp_path)
    assert "checkpoint-3" in again.stdout
    assert prove.differences(straight, prove.outcome(run)) == []


def test_the_proof_on_one_rank_and_on_two(tmp_path: Path, saving: list[str]) -> None:
    """As a user calls it, with 16 bits and dropout."""
    command = [item for item in saving if item.partition("=")[0] != "precision"]
    command += ["precision=bf16", "lora.lora_dropout=0.1", "train.eval_strategy=epoch"]
    result = run_warm("prove", *command, cwd=tmp_path)
    assert "warning: step" not in result.stdout
    found = re.findall(r"bit for bit, on (\d) ranks?: .* evaluations of steps", result.stdout)
    assert found == ["1", "2"]
    assert list(tmp_path.iterdir()) == []


def test_the_proof_can_fail(
    tmp_path: Path, saving: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = prove.cut_back

    def dishonest(run: Path, step: int) -> None:
        honest(run, step)
        path = folders.path_of(run, step)
        file = path / "optimizer-00001.safetensors"
        tensors = load_file(file)
        name = next(key for key in tensors if key.startswith("exp_avg/") and "lora_B" in key)
        save_file({**tensors, name: tensors[name] * 1.001}, file)
        listed = folders.manifest(path)
        listed["files"][file.name]["xxh3"] = hash_of(file)
        (path / folders.MANIFEST).write_text(json.dumps(listed))

    monkeypatch.setattr(prove, "cut_back", dishonest)
    monkeypatch.setattr(sys, "executable", warm_python.executable())
    command = [*saving, "ranks=1"]
    monkeypatch.setattr(sys, "argv", ["prove", *command])
    with pytest.raises(RunError, match=r"(?s)differs from the uninterrupted one:.*step 5: loss"):
        prove.prove(prove.main.compose(command))


def test_why_two_ranks_are_not_proven_is_said(
    saving: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "sft")
    batch = "train.global_batch_size"
    given = [item for item in saving if not item.startswith(batch)]
    assert prove._one_and_two(prove.main.compose([*given, f"{batch}=4"])) == [1, 2]
    assert prove._one_and_two(prove.main.compose([*given, f"{batch}=2"])) == [1]
    assert caplog.messages == [
        "warning: this is proven on one rank only: two ranks need train.global_batch_size to be a "
        "multiple of 4"
    ]


def test_what_cannot_be_proven_is_refused(tmp_path: Path, saving: list[str]) -> None:
    with pytest.raises(ConfigError, match="not a multiple of 2 per rank x 3 ranks"):
        prove.main.compose([*saving, "ranks=3"])
    with pytest.raises(CheckpointError, match=r"manifest.json is missing"):
        prove.cut_back(tmp_path, 3)  # a run would begin anew, and of course end alike


@pytest.mark.parametrize(
    ("steps", "epoch", "stop", "last"),
    [
        (None, 3, 4, 7),  # in the middle of the second epoch, and into the third
        (None, 2, 3, 5),
        (None, 400, 2, 4),  # rows that cannot be limited: not in two epochs of them
        (None, 1, 2, 4),  # an epoch of one step has no middle
        (10, 3, 5, 10),
        (4, 3, 2, 4),
    ],
)
def test_the_proof_stops_in_the_middle_of_a_later_epoch(
    steps: int | None, epoch: int, stop: int, last: int
) -> None:
    assert prove._where(steps, epoch) == (stop, last)
