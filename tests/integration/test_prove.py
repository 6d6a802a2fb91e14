"""The proof that a resumed run is the same run, under each stage; and that it can fail."""

import json
import re
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import run_sft


@pytest.mark.parametrize(
    "settings",
    [
        ["zero=none", "precision=bf16", "train.per_device_train_batch_size=1", "ranks=null"],
        ["zero=stage1", "dataset.packing=bfd", "dataset.max_length=64"],
        ["zero=stage2", "train.optim=adamw_8bit", "train.dataloader_num_workers=2"],
        ["zero=stage3", "lora=none", "train.per_device_train_batch_size=1"],
    ],
    ids=lambda settings: settings[0],
)
def test_a_resumed_run_is_the_same_run(
    tmp_path: Path, saving: list[str], settings: list[str]
) -> None:
    """In a later epoch; with dropout, accumulation, packing, 16 bits, 8-bit Adam, all weights."""
    given = {item.partition("=")[0] for item in settings}
    command = [item for item in saving if item.partition("=")[0] not in given]
    command += [] if "ranks=null" in settings else ["ranks=2"]
    command += [*settings, "train.eval_strategy=steps", "train.eval_steps=1"]
    command += [] if "lora=none" in settings else ["lora.lora_dropout=0.1"]
    result = run_sft("prove", *command, cwd=tmp_path)
    assert "warning: step" not in result.stdout
    found = re.findall(r"bit for bit, on (\d) ranks?: .* evaluations of steps", result.stdout)
    assert found == (["1", "2"] if "ranks=null" in settings else ["2"])
    assert list(tmp_path.iterdir()) == []


def test_the_proof_can_fail(
    tmp_path: Path, saving: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft import checkpoint, prove
    from sft.errors import RunError

    honest = prove._cut_back

    def dishonest(run: Path, step: int) -> None:
        honest(run, step)
        path = checkpoint.path_of(run, step)
        file = path / "optimizer-00001.safetensors"
        tensors = load_file(file)
        name = next(key for key in tensors if key.startswith("exp_avg/") and "lora_B" in key)
        save_file({**tensors, name: tensors[name] * 1.001}, file)
        listed = checkpoint.manifest(path)
        listed["files"][file.name]["xxh3"] = checkpoint.hash_of(file)
        (path / checkpoint.MANIFEST).write_text(json.dumps(listed))

    monkeypatch.setattr(prove, "_cut_back", dishonest)
    command = [*saving, "ranks=1"]
    monkeypatch.setattr(sys, "argv", ["prove", *command])
    with pytest.raises(RunError, match=r"(?s)differs from the straight one:.*step 5: loss"):
        prove.prove(prove.main.compose(command))


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
    from sft.prove import _where

    assert _where(steps, epoch) == (stop, last)
