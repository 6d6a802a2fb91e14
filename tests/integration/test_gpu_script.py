"""benchmarks/gpu.py on a CPU: every stage runs, and a fault loses its own row only."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm_python
from support import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu.py"
# These differ from stages that are run in a number or a name only: python benchmarks/gpu.py --tiny
# runs them too.
REPEATS = ["int8", "zero.stage1", "stage2_offload", "memory.llama", "memory.qwen3-4x"]
REPEATS += ["memory.qwen3-8x", "fast.opt", "attention.sdpa", "again"]
NEEDS_GPU = {"right.precision.fp16", "right.precision.qlora"}
NEEDS_GPU |= {"right.zero.stage2.fp16", "right.merge.gpu"}


def command(*words: str, python: str = sys.executable) -> list[str]:
    return [python, str(SCRIPT), *words]


def environment(work: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(work), "PYTHONPATH": str(ROOT)}


def measure(
    output: Path, *words: str, python: str = sys.executable
) -> tuple[int, list[dict[str, Any]]]:
    """Run the script, and give its exit code and rows; it must leave nothing else."""
    work = output.parent / "work"
    work.mkdir()
    done = subprocess.run(
        command("--output", str(output), *words, python=python),
        env=environment(work),
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert list(work.iterdir()) == [], done.stdout + done.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    begins = ("ok ", "failed ", "skipped ", "timeout ")
    lines = [line for line in done.stdout.splitlines() if line.startswith(begins)]
    printed = [line.split()[:2] for line in lines]
    assert [[row["status"], row["stage"]] for row in rows] == printed
    return done.returncode, rows


def named(*words: str) -> list[str]:
    listed = subprocess.run(command("--list", *words), capture_output=True, text=True, check=True)
    return [line.split()[0] for line in listed.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Give the rows of the list, repeats left out, from processes that need not import."""
    output = tmp_path_factory.mktemp("gpu") / "rows.jsonl"
    words = ("--tiny", "--budget", "100000", "--skip", *REPEATS)
    return measure(output, *words, python=warm_python.executable())[1]


def test_every_stage_gives_its_row(rows: list[dict[str, Any]]) -> None:
    assert [row["stage"] for row in rows] == named("--skip", *REPEATS)
    every = named()
    assert len(every) == len(set(every)) == 64
    assert sum(name.startswith("memory.") for name in every) >= 12
    failed = [row for row in rows if row["status"] not in ("ok", "skipped")]
    assert failed == []


def test_what_is_skipped_says_why(rows: list[dict[str, Any]]) -> None:
    why = {row["stage"]: row["why"] for row in rows if row["status"] == "skipped"}
    assert why.pop("fast.attention.flash_attention_2") == "flash_attn is not installed"
    assert why.pop("right.prove").endswith("the tests of sft.prove try it")
    assert why == dict.fromkeys(NEEDS_GPU, "needs CUDA")


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from numbers(each)
    elif isinstance(value, int | float):
        yield value


def test_the_figures_are_what_they_say(rows: list[dict[str, Any]]) -> None:
    assert all(math.isfinite(number) for number in numbers(rows))
    by_name = {row["stage"]: row for row in rows}
    right = [row for name, row in by_name.items() if name.startswith("right.attention.")]
    assert len(right) == 5 and all(row["others_bit_identical"] for row in right)
    assert all(row["log_prob_error"] < 1e-6 for row in right)
    assert by_name["right.kill"]["killed_after"] == 5
    trained = [row for name, row in by_name.items() if "tokens_per_second" in row]
    assert len(trained) >= 12 and all(row["tokens_per_second"] > 0 for row in trained)
    # One block has the median rate; and what TRL trains are the same rows.
    assert all(row["tokens_per_second"] in row["blocks"] for row in trained)
    assert by_name["fast.qwen3-0.6b.trl"]["ours_is"] > 0
    assert len(by_name["fast.llama-3.1-8b.profile"]["host_top_ten"]) == 10
    assert by_name["fast.llama-3.1-8b.recomputed"]["recomputed"] is True
    assert by_name["fast.llama-3.1-8b"]["recomputed"] is False
    memory = [row for name, row in by_name.items() if name.startswith("memory.")]
    assert len(memory) >= 4 and all(row["estimate_gib"] > 0 for row in memory)


def test_faults_and_a_small_budget_lose_their_own_rows_only(tmp_path: Path) -> None:
    words = ("--only", "planted", "machine.device", "right.demo", "--budget", "37")
    code, rows = measure(tmp_path / "rows.jsonl", *words)
    found = [(row["stage"], row["status"], row.get("error", row.get("why"))) for row in rows]
    assert [(name, status) for name, status, _ in found] == [
        ("planted.failure", "failed"),
        ("planted.hang", "timeout"),
        ("planted.death", "failed"),
        ("planted.wrong", "failed"),
        ("machine.device", "ok"),
        ("right.demo", "skipped"),
    ]
    assert [text.splitlines()[0] for _, _, text in found if text] == [
        "RuntimeError: planted",
        "ran out of its time",
        "its process ended with -9",
        "planted",
        "budget",
    ]
    assert rows[3]["figure"] == 1 and rows[4]["cpus"] > 0
    assert code == 1
    left = [p.info["pid"] for p in psutil.process_iter(["cmdline", "pid"]) if hangs(p)]
    assert left == []  # what the hanging stage had started


def hangs(process: psutil.Process) -> bool:
    return "600.25" in (process.info["cmdline"] or [])


def test_a_signal_keeps_the_rows_and_leaves_nothing(tmp_path: Path) -> None:
    output, work = tmp_path / "rows.jsonl", tmp_path / "work"
    work.mkdir()
    words = command("--output", str(output), "--only", "planted", "right.demo")
    process = subprocess.Popen(words, env=environment(work), stdout=subprocess.DEVNULL)
    while not output.is_file() or not output.read_text().endswith("\n"):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert json.loads(output.read_text().splitlines()[0])["stage"] == "planted.failure"
    assert list(work.iterdir()) == []


def test_a_name_that_is_none_is_refused() -> None:
    done = subprocess.run(command("--only", "nf5"), capture_output=True, text=True)
    assert done.returncode == 1 and "no stage has nf5 in its name" in done.stderr


def test_rows_that_cannot_be_kept_are_not_measured(tmp_path: Path) -> None:
    words = command("--only", "machine.device", "--output", str(tmp_path / "absent" / "rows.jsonl"))
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "rows.jsonl cannot be written" in done.stderr
    assert done.stdout == ""


def test_the_operations_of_a_step_are_counted_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch counts them, but for the half of all pairs that causal attention does not need."""
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoConfig, AutoModelForCausalLM

    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_fast

    fields = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    config = AutoConfig.for_model("llama", **fields)
    base = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    tokens = 50
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(tokens)[None]).logits.sum().backward()
    attention = 6 * 3 * 64 * tokens
    needed = gpu_fast.flop_per_token(model, [tokens], trained=1.0) + attention
    assert counter.get_total_flops() == pytest.approx(tokens * needed, rel=5e-3)
