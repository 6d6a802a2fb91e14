"""Several runs in one process, as in a notebook: each computes what it does in its own process."""

import json
from pathlib import Path

from safetensors.torch import load_file
from support import losses
from warm import run_warm

NOTEBOOK = """
import json, sys
from sft.train import main, train
for line in open(sys.argv[1]):
    try:
        train(main.compose(json.loads(line)))
    except Exception as error:
        last = error  # kept, as a notebook keeps it, and with it the frames that hold the run
        print("refused:", error)
"""

# In this order: each could leave something behind that the next would take.
SETTINGS = {
    "stage2": ["zero=stage2"],
    "plain": ["lora.r=4", "train.learning_rate=5e-3"],
    "fails": [
        "zero=stage2",
        "train.max_grad_norm=0",
        "train.learning_rate=1e12",
        "lora.lora_alpha=1000000000000",
    ],
    "stage3": ["zero=stage3", "seed=7", "train.per_device_train_batch_size=1"],
    "bf16": ["precision=bf16", "train.gradient_checkpointing=true"],
}


def test_runs_of_one_process_compute_what_they_do_alone(tmp_path: Path, saving: list[str]) -> None:
    def command(name: str, folder: str) -> list[str]:
        own = [*SETTINGS[name], "train.max_steps=4", f"output_dir={tmp_path / folder / name}"]
        given = {item.partition("=")[0] for item in own}
        return [item for item in saving if item.partition("=")[0] not in given] + own

    cells = tmp_path / "cells.jsonl"
    cells.write_text("".join(json.dumps(command(name, "notebook")) + "\n" for name in SETTINGS))
    script = tmp_path / "notebook.py"
    script.write_text(NOTEBOOK)
    done = run_warm(str(script), str(cells), cwd=tmp_path)
    assert done.stdout.count("refused:") == 1 and "the loss is nan" in done.stdout, done.stdout
    for name in SETTINGS:
        if name == "fails":
            continue
        run, alone = tmp_path / "notebook" / name, tmp_path / "alone" / name
        run_warm("train", *command(name, "alone"), cwd=tmp_path)
        assert losses(run) == losses(alone), name
        one, other = (
            load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, alone)
        )
        assert one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one), name
        # A log file holds its own run and nothing of those after it.
        assert (run / "rank0.log").read_text().count("step 4/4  loss") == 1
