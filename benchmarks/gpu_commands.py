"""Stages of ``gpu.py`` that run the real commands, in parallel if there are enough cores.

On a CPU a command is forked from a process that has imported the libraries, which saves seconds; on
a GPU it is started as a user starts it.
"""

import functools
import importlib.util
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu_parts import WORK, Skip, end_tree, has_gpu, is_tiny, needs_gpu
from gpu_right import small_base

HERE = Path(__file__).resolve().parent
KILLED = "SIGKILL:sft.training.guard.Guard.on_step_end:before:6:all"  # two steps after a checkpoint
ENOUGH = 0.95  # of the demo's answers
# Losses under ZeRO beside those without it: there the adapter, too, is in 16 bits.
ZERO_BOUND = {"bf16": 0.02, "fp16": 0.02, "fp32": 1e-4}

deadline = float("inf")  # of the stages that run now, as time.monotonic() counts


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function only in the first thread; other threads get its result or its error."""
    lock, results = threading.Lock(), {}

    @functools.wraps(make)
    def made(*args: Any) -> Any:
        with lock:
            if args not in results:
                try:
                    results[args] = make(*args), None
                except Exception as error:  # every stage that needs the result fails with it
                    results[args] = None, error
        value, error = results[args]
        if error is not None:
            raise error
        return value

    return made


base = once(small_base)


def run(*words: str, fault: str = "") -> tuple[int, str]:
    """Run ``python -m`` with a module of sft and its settings; a fault is passed to ``inject.py``.

    Returns:
        The exit code and the output.
    """
    command = [str(HERE / "inject.py"), fault, *words] if fault else ["-m", *words]
    log = WORK / f"command-{threading.get_ident()}-{time.monotonic_ns()}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    left = deadline - time.monotonic()
    with log.open("wb") as file:
        if has_gpu():
            process: Any = subprocess.Popen(
                [sys.executable, *command], cwd=WORK, env=environment, stdout=file, stderr=file
            )
            try:
                code = process.wait(left)
            except subprocess.TimeoutExpired:
                end_tree(process.pid)  # sft.prove has children of its own
                code = None
        else:
            fork = multiprocessing.get_context("fork")
            process = fork.Process(target=_become, args=(command, environment, file.fileno()))
            process.start()
            process.join(min(left, 10000))
            code = process.exitcode
            process.kill()
            process.join()
    said = log.read_text(errors="replace")
    if code is None:
        raise TimeoutError(f"{' '.join(words[:2])} did not end:\n{said[-1500:]}")
    return code, said


def _become(command: list[str], environment: dict[str, str], log: int) -> None:
    """Run a ``python`` command line in this process, which has imported the libraries."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    os.chdir(WORK)
    code = 0
    try:
        if command[0] == "-m":
            sys.argv = [command[1], *command[2:]]
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def done(*words: str) -> str:
    """Run a command, and raise if it fails."""
    code, said = run(*words)
    if code:
        raise RuntimeError(f"{' '.join(words[:2])} ended with {code}:\n{said[-1500:]}")
    return said


def settings(*own: str) -> list[str]:
    """Return settings for eight steps, almost three epochs, with a checkpoint every two steps."""
    return [
        *("model=hf", f"model.name_or_path={base()}", "dataset=demo", "dataset.exact_match=0"),
        *("dataset.max_rows=24", "dataset.max_eval_rows=16", "train.max_steps=8"),
        *("train.global_batch_size=8", "train.per_device_train_batch_size=4"),
        *("train.logging_steps=1", "train.save_strategy=steps", "train.save_steps=2"),
        *("train.eval_strategy=steps", "train.eval_steps=4", "train.learning_rate=1e-3"),
        *own,
    ]


def logged(folder: Path, key: str) -> list[float]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record[key] for record in map(json.loads, lines) if key in record]


def resumed(name: str, *own: str) -> dict[str, Any]:
    """Kill a run by SIGKILL, run its command again, and compare with an undisturbed run."""
    from faults import outcome

    straight, killed = WORK / f"{name}-straight", WORK / f"{name}-killed"
    words = settings(*own)
    done("sft.train", *words, f"output_dir={straight}")
    code, said = run("sft.train", *words, f"output_dir={killed}", fault=KILLED)
    reached = len(logged(killed, "loss")) if code == -9 else -1
    if reached < 0:
        raise RuntimeError(f"the run was to be killed, and ended with {code}:\n{said[-1500:]}")
    again = done("sft.train", *words, f"output_dir={killed}")
    one, other = outcome(straight), outcome(killed)
    wrong = []
    if "resuming from" not in again:
        wrong.append("it began anew")
    if one[0] != other[0]:
        first = next((a for a, b in zip(one[0], other[0], strict=False) if a != b), None)
        wrong.append(f"logged lines differ, from {first} on")
    if one[1] != other[1]:
        wrong.append("the adapters differ")
    losses = logged(straight, "loss")
    return {"killed_after": reached, "losses": [losses[0], losses[-1]], "wrong": wrong}


def kill() -> dict[str, Any]:
    """Check that a run with dropout resumes bit for bit after a kill."""
    return resumed("kill", "lora.lora_dropout=0.1")


def prove() -> dict[str, Any]:
    """Check the same with ``sft.prove``."""
    if is_tiny():
        raise Skip("it starts processes that import everything; the tests of sft.prove try it")
    return {"said": done("sft.prove", *settings("steps=4")).strip().splitlines()[-1]}


def merged(run_dir: Path, output: str, *own: str) -> dict[str, Any]:
    """Merge a run, and return the report of the verification."""
    done("sft.merge", f"run={run_dir}", f"output={run_dir / output}", *own)
    found: dict[str, Any] = json.loads((run_dir / output / "merge_report.json").read_text())
    return found


def quantized(kind: str) -> dict[str, Any]:
    """Train on a 4- or 8-bit base, resume, and merge."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise Skip("bitsandbytes is not installed")
    found = resumed(kind, f"quantization={kind}")
    report = merged(WORK / f"{kind}-straight", "merged")
    found |= {"merge_differs": report["max_difference"], "allowed": report["allowed_difference"]}
    if report["passed"] is not True:
        found["wrong"].append(f"the merge was not verified: {report.get('reason')}")
    return found


@once
def without_zero(precision: str) -> Path:
    """Train the run without ZeRO with which runs under ZeRO are compared."""
    folder = WORK / f"no-zero-{precision}"
    done("sft.train", *settings(f"precision={precision}"), f"output_dir={folder}")
    return folder


def zero(stage: str, precision: str = "auto") -> dict[str, Any]:
    """Train on one rank under a ZeRO stage, and compare the losses."""
    if precision == "fp16":
        needs_gpu()
    folder = WORK / f"zero-{stage}-{precision}"
    own = [f"zero={stage}", f"precision={precision}", f"output_dir={folder}"]
    done("sft.train", *settings(), *own)
    plain = without_zero(precision)
    losses, expected = logged(folder, "loss"), logged(plain, "loss")
    used = json.loads((plain / "run.json").read_text())["identity"]["precision"]
    pairs = list(zip(losses, expected, strict=True))
    apart = max(abs(a / b - 1) for a, b in pairs)
    wrong = []
    if not apart <= ZERO_BOUND[used]:
        wrong.append(f"losses are {apart:.2g} from those without ZeRO, over {ZERO_BOUND[used]}")
    return {"losses": [losses[0], losses[-1]], "apart": apart, "precision": used, "wrong": wrong}


@once
def demo_run() -> Path:
    folder = WORK / "demo"
    few = ["train.max_steps=4", "dataset.exact_match=4", "dataset.max_rows=64"]
    few += ["dataset.max_eval_rows=8"]
    done("sft.train", f"output_dir={folder}", *(few if is_tiny() else []))
    return folder


def demo() -> dict[str, Any]:
    """Train the embedded model on the embedded data, as ``python -m sft.train`` does."""
    matches = logged(demo_run(), "exact_match")
    found = {"before": matches[0], "after": matches[-1], "wrong": []}
    found["eval_loss"] = logged(demo_run(), "eval_loss")[-1]
    if not is_tiny() and not (matches[0] == 0 and matches[-1] > ENOUGH):
        found["wrong"].append(f"exact match {matches[0]} to {matches[-1]}, not 0 to {ENOUGH}")
    return found


def merge() -> dict[str, Any]:
    """Merge the demo's adapter on the CPU, verified."""
    report = merged(demo_run(), "merged-cpu")
    found = {name: report[name] for name in ("max_difference", "allowed_difference", "kl")}
    return {**found, "wrong": [] if report["passed"] is True else [str(report.get("reason"))]}


def merge_on_gpu() -> dict[str, Any]:
    """Merge the adapter on the GPU, and compare all weights with the merge on the CPU."""
    needs_gpu()
    import torch
    from safetensors.torch import load_file

    merged(demo_run(), "merged-gpu", "device=cuda")
    merged(demo_run(), "merged-here", "device=cpu", "verify=false")
    one, other = (
        load_file(demo_run() / name / "model.safetensors") for name in ("merged-gpu", "merged-here")
    )
    same = [name for name in other if torch.equal(one[name], other[name])]
    most = max(float((one[name] - other[name]).abs().max()) for name in other)
    scale = max(float(other[name].abs().max()) for name in other)
    found = {"tensors": len(other), "bit_identical": len(same), "largest_apart": most, "wrong": []}
    # A product of rank 8 is summed in another order there, and rounded once.
    if one.keys() != other.keys() or not most <= 2**-20 * scale:
        found["wrong"].append(f"weights differ by {most:.3g}, the largest weight is {scale:.3g}")
    return found
