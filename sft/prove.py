"""Proof, on a user's own settings, that a run which is cut off and resumed is the same run."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import checkpoint
from sft.checks import check
from sft.cli import Command
from sft.config import Config
from sft.errors import RunError
from sft.files import hash_of, read_records, write_text
from sft.rules import at_least, setting
from sft.trial import environment

# What the proof itself decides.
OWN = {
    *("steps", "ranks", "output_dir", "overwrite", "resume.checkpoint", "resume.allow"),
    *("train.max_steps", "train.save_strategy", "train.save_steps", "train.logging_steps"),
}

logger = logging.getLogger("sft")


@dataclass
class ProveConfig(Config):
    """A run's settings, and how far to train for the proof."""

    steps: int = setting(4, "optimizer steps; resumed after half of them", at_least(2))
    ranks: int = setting(1, "processes, as torchrun --nproc_per_node", at_least(1))


def prove(config: ProveConfig) -> None:
    """Train a few steps straight, then go on from their middle in a new process, and compare.

    All that a killed process leaves is its files. So the finished run is cut back to what a kill
    after half the steps would have left, and the same command is given again.

    Raises:
        RunError: A run failed, or the two are not the same.
    """
    half = config.steps // 2
    with tempfile.TemporaryDirectory(prefix="sft-prove-") as work:
        run = Path(work) / "run"
        command = [sys.executable, "-m"]
        if config.ranks > 1:
            command += ["torch.distributed.run", "--standalone"]
            command += ["--nproc_per_node", str(config.ranks), "-m"]
        given = [word for word in sys.argv[1:] if word.partition("=")[0].lstrip("+") not in OWN]
        command += ["sft.train", *given, f"output_dir={run}", f"train.max_steps={config.steps}"]
        command += ["train.save_strategy=steps", f"train.save_steps={half}"]
        command += ["train.logging_steps=1"]
        logger.info("training %s steps straight", config.steps)
        straight = _outcome(command, run)
        _cut_back(run, half)
        logger.info("going on from step %s in a new process", half)
        resumed = _outcome(command, run)
    differences = [
        f"step {one['step']}: {key} {one[key]} straight, {other.get(key)} resumed"
        for one, other in zip(straight["logged"], resumed["logged"], strict=False)
        for key in one
        if one[key] != other.get(key)
    ]
    if len(straight["logged"]) != len(resumed["logged"]):
        counts = len(straight["logged"]), len(resumed["logged"])
        differences.append(f"{counts[0]} lines logged straight, {counts[1]} resumed")
    differences += [
        f"{name} differs"
        for name in straight["files"]
        if straight["files"][name] != resumed["files"].get(name)
    ]
    if differences:
        raise RunError(
            "the resumed run is another than the straight one:\n"
            + "\n".join(f"    {line}" for line in differences[:10])
            + "\n    fix: please report this, with the settings; until then, do not resume them"
        )
    logger.info(
        "the same, bit for bit: losses, rates, gradient norms and evaluations of steps %s to %s, "
        "and %s",
        half + 1,
        config.steps,
        ", ".join(straight["files"]),
    )


def _outcome(command: list[str], run: Path) -> dict[str, Any]:
    """Train, and give what was logged and hashes of what was saved."""
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    if result.returncode:
        said = result.stderr.partition("error: ")[2] or result.stderr
        raise RunError(f"the run that was to be resumed failed: {said.strip()}")
    logged = [
        {key: value for key, value in record.items() if "seconds" not in key}
        for record in read_records(run / "metrics.jsonl")
        if "train_runtime" not in record  # the summary of one process
    ]
    saved = [path for kind in ("adapter", "model") for path in (run / kind).glob("*.safetensors")]
    return {"logged": logged, "files": {path.name: hash_of(path) for path in saved}}


def _cut_back(run: Path, step: int) -> None:
    """Leave what a kill right after a checkpoint leaves."""
    for path in checkpoint.checkpoints(run):
        if checkpoint.step_of(path) > step:
            shutil.rmtree(path)
    for kind in ("adapter", "model"):
        shutil.rmtree(run / kind, ignore_errors=True)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    write_text(run / "run.json", json.dumps({**record, "status": "running"}))


main = Command(
    name="prove",
    schema=ProveConfig,
    run=prove,
    check=check,
    config_name="train",
    summary="show that these settings resume exactly",
    examples=(
        "python -m sft.prove model=opt-125m dataset=alpaca",
        "python -m sft.prove model=opt-125m dataset=alpaca zero=stage2 ranks=4 steps=6",
    ),
)

if __name__ == "__main__":
    main()
