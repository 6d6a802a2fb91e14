"""The proof that a resumed run is the same run, under each stage; and that it can fail."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support import run_sft


@pytest.mark.parametrize(
    "settings",
    [
        ["zero=none", "precision=bf16", "train.per_device_train_batch_size=1"],
        ["zero=stage1", "dataset.packing=bfd", "dataset.max_length=128"],
        ["zero=stage2", "train.optim=adamw_8bit"],
        ["zero=stage3", "lora=none", "train.per_device_train_batch_size=1"],
    ],
    ids=lambda settings: settings[0],
)
def test_a_resumed_run_is_the_same_run(
    tmp_path: Path, saving: list[str], settings: list[str]
) -> None:
    """Two ranks; with dropout, accumulation, packing, 16 bits, 8-bit Adam, all weights trained."""
    given = {item.partition("=")[0] for item in settings}
    command = [item for item in saving if item.partition("=")[0] not in given]
    command += [*settings, "train.eval_strategy=steps", "train.eval_steps=1"]
    command += [] if "lora=none" in settings else ["lora.lora_dropout=0.1"]
    result = run_sft("prove", *command, "ranks=2", "steps=4", cwd=tmp_path)
    assert "the same, bit for bit: losses, rates, gradient norms" in result.stdout
    assert "evaluations of steps 3 to 4, and " in result.stdout
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
    monkeypatch.setattr(sys, "argv", ["prove", *saving, "steps=4"])
    with pytest.raises(RunError, match=r"(?s)another than the straight one:.*step 4: loss"):
        prove.prove(prove.main.compose([*saving, "steps=4"]))
