"""Measure the time and size of a checkpoint relative to the Trainer's own of the same state.

    python benchmarks/saving.py --rows ROWS.jsonl --tokenizer FOLDER [--model opt-125m]
        [--zero none stage2] [--lora all-linear none] [--runs 5]

One rank trains two steps and then saves alternately with sft, which gathers, writes, reads back,
hashes and waits for the disk, and with Transformers' ``Trainer._save_checkpoint``, which only
gathers and writes. Both are timed until they return, and until the files are on the disk
(``sync``).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import step


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def only(given: argparse.Namespace) -> None:
    """Train in this process, save in both ways, and write the measurements to a file."""
    import transformers

    from sft.checkpoint import folders
    from sft.training.trainer import Trainer

    ours = Trainer._save_checkpoint
    found: dict[str, list[list[float]]] = {"ours": [], "trainer": []}

    def both(self: Trainer, model: object, trial: object) -> None:
        output, limit = self.args.output_dir, self.args.save_total_limit
        for _ in range(given.runs):
            for name in found:
                self.args.output_dir = f"{given.output}/{name}"
                self._saved = None
                folder = folders.path_of(self.args.output_dir, self.state.global_step)
                shutil.rmtree(folder, ignore_errors=True)
                folder.parent.mkdir(exist_ok=True)
                os.sync()
                begin = time.perf_counter()
                if name == "ours":
                    ours(self, model, trial)
                else:
                    transformers.Trainer._save_checkpoint(self, model, trial)
                returned = time.perf_counter() - begin
                os.sync()
                found[name].append([returned, time.perf_counter() - begin])
        self.args.output_dir, self.args.save_total_limit = output, limit
        sizes = {
            name: size(folders.path_of(f"{given.output}/{name}", self.state.global_step))
            for name in found
        }
        Path(given.output, "result.json").write_text(json.dumps([found, sizes]))

    Trainer._save_checkpoint = both  # type: ignore[method-assign]
    settings = {"zero": given.only, "lora": given.lora[0], "train.save_strategy": "steps"}
    settings |= {"train.save_steps": "2", "train.max_steps": "2"}
    step.ours(given, step.Meter(0), Path(given.output), **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--model", choices=step.MODELS, default="opt-125m")
    parser.add_argument("--zero", nargs="+", default=["none", "stage2"])
    parser.add_argument("--lora", nargs="+", default=["all-linear", "none"])
    parser.add_argument("--runs", type=int, default=5)
    for name in ("--only", "--folder", "--output"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.micro, given.precision = 2, "fp32"
    given.rows = str(Path(given.rows).resolve())
    if given.only:
        only(given)
        return
    print("| | trained | ours s | Trainer s | until on disk | ours MiB | Trainer MiB |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "model")
        step.build(given.model, given.tokenizer, folder)
        for lora in given.lora:
            for stage in given.zero:
                output = Path(work, f"{lora}-{stage}")
                output.mkdir()
                command = [sys.executable, __file__, "--only", stage, "--lora", lora]
                command += ["--rows", given.rows, "--folder", str(folder)]
                command += ["--output", str(output), "--runs", str(given.runs)]
                result = subprocess.run(
                    command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True
                )
                if result.returncode:
                    sys.exit(result.stderr.decode()[-4000:])
                times, sizes = json.loads((output / "result.json").read_text())
                (ours, ours_disk), (theirs, their_disk) = (
                    [statistics.median(column) for column in zip(*times[name], strict=True)]
                    for name in ("ours", "trainer")
                )
                mine, their = (sizes[name] / 2**20 for name in ("ours", "trainer"))
                print(
                    f"| `zero={stage}` | {'LoRA' if lora != 'none' else 'all'} | {ours:.2f} "
                    f"| {theirs:.2f} ({ours / theirs:.2f}) | {ours_disk:.2f}, {their_disk:.2f} "
                    f"({ours_disk / their_disk:.2f}) | {mine:.1f} | {their:.1f} "
                    f"({mine / their:.2f}) |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
