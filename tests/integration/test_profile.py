"""A run that is profiled: stopped, resumed, and trained to the same bytes."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from support import ROOT
from warm import run_warm

from sft.files import read_records

INJECT = str(ROOT / "benchmarks" / "inject.py")


def trace(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file) as opened:
        events: list[dict[str, Any]] = json.load(opened)["traceEvents"]
    return events


def test_a_profiled_run_that_is_stopped_and_resumed_trains_the_same(
    tmp_path: Path, saving: list[str]
) -> None:
    plain, run = tmp_path / "plain", tmp_path / "run"
    run_warm("train", *saving, f"output_dir={plain}", ranks=2, cwd=tmp_path)
    profiled = [*saving, "profile=[torch,system]", "profile.start=2", "profile.interval=0.1"]
    profiled += [f"output_dir={run}"]
    # Within the window of steps 2 to 4.
    fault = "SIGUSR1:sft.training.guard.Guard.on_step_end:before:3:0"
    stopped = run_warm(INJECT, fault, "sft.train", *profiled, ranks=2, cwd=tmp_path, check=False)
    assert stopped.returncode == 75, stopped.stderr
    assert "profile=torch: the trace of steps 2 to 3 is in" in stopped.stdout
    assert "USDT" not in stopped.stdout + stopped.stderr  # what the library of traces prints
    folder = run / "profile"
    names = ("operations_rank{}.json", "operations_rank{}.txt", "trace_rank{}.json.gz")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.keys() == {name.format(rank) for name in names for rank in (0, 1)}
    for rank in (0, 1):
        events = trace(folder / f"trace_rank{rank}.json.gz")
        ranges = Counter(e["name"] for e in events if e.get("cat") == "user_annotation")
        assert {ranges[f"ProfilerStep#{step}"] for step in (2, 3)} == {1}
        assert sum(count for name, count in ranges.items() if name.startswith("Profiler")) == 2
        # Four rows in micro-batches of two on two ranks: one micro-batch in a step.
        assert [ranges[p] for p in ("data", "forward", "backward", "optimizer")] == [2] * 4
        ops = Counter(e["name"] for e in events if e.get("cat") == "cpu_op")
        assert ops["aten::mm"] >= 2 * 2 and ops["aten::embedding"] >= 2
        told = json.loads((folder / f"operations_rank{rank}.json").read_text())
        assert told["steps"] == [2, 3]
    before = read_records(run / "system.jsonl")

    run_warm("train", *profiled, ranks=2, cwd=tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files
    after = read_records(run / "system.jsonl")
    assert len(before) >= 2 and after[: len(before)] == before and len(after) > len(before)
    assert [record["time"] for record in after] == sorted(record["time"] for record in after)
    assert {record["gpus"] == [] for record in after} == {True}
    adapters = [(path / "adapter" / "adapter_model.safetensors") for path in (plain, run)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_steps_after_the_last_one_are_refused_before_weights_load(
    tmp_path: Path, saving: list[str]
) -> None:
    command = [item for item in saving if not item.startswith("train.max_steps")]
    command += ["profile=torch", "profile.start=50"]
    done = run_warm("train", *command, "output_dir=run", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "profile.start=50\n    is after the last step, 12\n" in done.stderr
    assert not (tmp_path / "run").exists()
