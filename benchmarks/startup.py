"""Measure the time of a whole command that trains one step: sft and a hand-written script.

    python benchmarks/startup.py --rows ROWS.jsonl [--runs 5]

Both train LoRA on the embedded model for one step of eight of the rows (``prompt``, ``completion``)
and save the adapter; each runs once before, so that data is cached and files are in memory. The
first start under ZeRO has an empty folder of compiled ops. ``--help`` and the error for an invalid
setting are timed too.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"
BY_HAND = """
import sys
import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

model, rows, folder = sys.argv[1:]
args = SFTConfig(
    folder, max_steps=1, use_cpu=not torch.cuda.is_available(), bf16=False, save_strategy="no",
    gradient_checkpointing=False, disable_tqdm=True,
)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
    args,
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    processing_class=AutoTokenizer.from_pretrained(model),
    peft_config=LoraConfig(r=8, target_modules="all-linear"),
)
trainer.train()
trainer.save_model(folder)
"""


def seconds(command: list[str], may_fail: bool = False, **environment: str) -> float:
    """Time a command."""
    began = time.perf_counter()
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if result.returncode and not may_fail:
        sys.exit(f"{' '.join(command)}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--runs", type=int, default=5)
    given = parser.parse_args()
    rows = str(Path(given.rows).resolve())
    with tempfile.TemporaryDirectory() as folder:
        ours = [
            *(sys.executable, "-m", "sft.train", "model=hf", f"model.name_or_path={TINY}"),
            *("dataset=jsonl", f"dataset.path={rows}", "dataset.eval_fraction=0"),
            *("dataset.overlong=truncate", "dataset.stop_above.nothing_trained=1"),
            *("dataset.stop_above.answer_cut=1", "train.per_device_train_batch_size=8"),
            *("train.global_batch_size=8", "train.max_steps=1", "train.warmup_steps=0"),
            *("train.save_strategy=no", f"output_dir={folder}/ours", "overwrite=true"),
            "precision=fp32",
        ]
        commands = {
            "by hand": [sys.executable, "-c", BY_HAND, str(TINY), rows, f"{folder}/hand"],
            "ours": ours,
            "ours, zero=stage2": [*ours, "zero=stage2"],
        }
        local = {"HF_HUB_OFFLINE": "1", "SFT_CACHE_DIR": f"{folder}/cache"}
        local |= {"HF_DATASETS_CACHE": f"{folder}/datasets"}
        found: dict[str, list[float]] = {name: [] for name in commands}
        for run in range(given.runs + 1):
            for name, command in commands.items():
                extensions = f"{folder}/extensions{run}"
                took = seconds(command, **local, TORCH_EXTENSIONS_DIR=extensions)
                if run:
                    found[name].append(took)
        medians = {name: statistics.median(times) for name, times in found.items()}
        for name, median in medians.items():
            print(f"{name:<22}{median:>8.2f} s{median / medians['by hand']:>8.2f} x by hand")
        for name, last in (("--help", "--help"), ("a refused setting", "lora.rr=8")):
            times = [seconds([*ours, last], may_fail=True, **local) for _ in range(given.runs)]
            print(f"{name:<22}{statistics.median(times):>8.2f} s")


if __name__ == "__main__":
    main()
