"""Measure CPU time per token on two ranks relative to one rank, for each ZeRO stage.

    python benchmarks/ranks.py --rows ROWS.jsonl --tokenizer FOLDER [--model opt-125m]
        [--zero none stage1 stage2 stage3] [--ranks 2] [--steps 4] [--warmup 1] [--runs 3]
        [--micro 4]

Rows, model and settings are those of ``step.py``. Each rank has one thread and takes ``--micro``
rows per step; an epoch has ``--steps`` steps, and ``--warmup`` epochs are not counted. A single
rank takes the same rows in proportionally more steps.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import step


def only(given: argparse.Namespace) -> None:
    """Train in this process as one rank, and write the measurements to a file."""
    from transformers import AutoTokenizer

    meter = step.Meter(given.warmup)
    step.watch_trainer(meter, AutoTokenizer.from_pretrained(given.folder).pad_token_id)
    ranks, rank = int(os.environ["WORLD_SIZE"]), os.environ["RANK"]
    settings = {"zero": given.only, "train.global_batch_size": str(given.micro * ranks)}
    step.ours(given, meter, Path(given.output), **settings)
    Path(given.output, f"{rank}.json").write_text(json.dumps(meter.result()))


def measured(stage: str, ranks: int, given: argparse.Namespace, folder: str) -> tuple[float, float]:
    """Return CPU-seconds per token over all ranks, and the largest rank's peak memory in GiB."""
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(ranks), __file__, "--only", stage]
        command += ["--folder", folder, "--output", output, "--rows", f"{folder}/rows.jsonl"]
        for key in ("warmup", "micro", "precision"):
            command += [f"--{key}", str(getattr(given, key))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        if result.returncode:
            sys.exit(f"{stage}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
        found = [json.loads(path.read_text()) for path in Path(output).glob("*.json")]
    assert len(found) == ranks
    return sum(f["cpu"] for f in found) / sum(f["tokens"] for f in found), max(
        f["peak"] for f in found
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--model", choices=step.MODELS, default="opt-125m")
    parser.add_argument("--zero", nargs="+", default=["none", "stage1", "stage2", "stage3"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only")
    parser.add_argument("--folder")
    parser.add_argument("--output")
    given = parser.parse_args()
    given.rows = str(Path(given.rows).resolve())
    if given.only:
        only(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        step.build(given.model, given.tokenizer, Path(folder))
        count = given.steps * given.micro * given.ranks
        step.take(given.rows, count, Path(folder, "rows.jsonl"))
        cases = [("none", 1), *((stage, given.ranks) for stage in given.zero)]
        runs: dict[tuple[str, int], list[tuple[float, float]]] = {case: [] for case in cases}
        for _ in range(given.runs):
            for case in cases:
                runs[case].append(measured(*case, given, folder))
    alone = statistics.median(cost for cost, _ in runs["none", 1])
    print(f"{given.model}, {given.precision}, {given.micro} rows a rank and step")
    print(f"{'zero':<10}{'ranks':>6}{'CPU-ms/token':>14}{'of one rank':>13}{'peak GiB':>10}")
    for (stage, ranks), found in runs.items():
        cost = statistics.median(cost for cost, _ in found)
        peak = statistics.median(peak for _, peak in found)
        print(f"{stage:<10}{ranks:>6}{1000 * cost:>14.2f}{cost / alone:>13.2f}{peak:>10.2f}")


if __name__ == "__main__":
    main()
