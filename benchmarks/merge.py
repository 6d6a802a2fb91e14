"""Measure time and peak memory of merging a 1.5 B model: sft, PEFT, and `cp` of the same files.

    python benchmarks/merge.py --folder SCRATCH [--runs 3] [--skip peft verified]

The model has Qwen2.5-1.5B's shape, with random bf16 weights in files of 1 GB; the adapter is LoRA
of rank 16 on all linear layers. These run alternately: cp; the steps of a merge without planning,
one more step each time ("read": read every matrix that changes; "copied": and write it unchanged;
"least": and convert it to float32 and back between; "sums": and add B A); sft without the
comparison; PEFT as its documentation merges (from_pretrained in bf16, merge_and_unload,
save_pretrained). At the end, sft runs once with the comparison. The files are in the page cache
before each run, and the result is on the disk when the clock stops. The files of earlier runs are
deleted, so that each run has the same free memory. "seconds" excludes imports, "command" is the
whole command, "CPU" is that of all threads, without imports if the tool reports that. Peak memory
is that of the whole process.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}

PEFT = """
import sys, time, os
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
began = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(out, max_shard_size="1GB")
for name in os.listdir(out):
    handle = os.open(os.path.join(out, name), os.O_RDONLY); os.fsync(handle); os.close(handle)
print("seconds", time.perf_counter() - began)
"""

STEPS = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
import torch
base, out, steps = sys.argv[1:]
RANK = 16
threads, TILE, CHUNK = torch.get_num_threads(), 1 << 18, 1 << 25  # numbers, bytes
torch.set_num_threads(1)

def change(read, write, start, stop, columns):
    rows = TILE // columns
    raw = torch.empty(2 * rows * columns, dtype=torch.uint8)
    tile = torch.empty(rows, columns)
    left, right = torch.ones(rows, RANK), torch.ones(RANK, columns)
    for place in range(start, stop, len(raw)):
        some = raw[: stop - place]
        os.preadv(read, [some.numpy()], place)
        if steps in ("least", "sums"):
            numbers = some.view(torch.bfloat16).view(-1, columns)
            wide = tile[: len(numbers)].copy_(numbers)
            if steps == "sums":
                wide.addmm_(left[: len(numbers)], right)
            numbers.copy_(wide)
        if steps != "read":
            os.pwrite(write, some.numpy(), place)

def copy(read, write, start, stop, columns):
    while start < stop and steps != "read":
        start += os.copy_file_range(read, write, stop - start, start, start)

began, used = time.perf_counter(), time.process_time()
os.mkdir(out)
with ThreadPoolExecutor(threads) as workers, ThreadPoolExecutor(1) as disk:
    for name in sorted(n for n in os.listdir(base) if n.endswith(".safetensors")):
        read = os.open(os.path.join(base, name), os.O_RDONLY)
        write = os.open(os.path.join(out, name), os.O_RDWR | os.O_CREAT)
        length = int.from_bytes(os.pread(read, 8, 0), "little")
        entries = json.loads(os.pread(read, length, 8))
        entries.pop("__metadata__", None)
        jobs = [workers.submit(copy, read, write, 0, 8 + length, 1)]
        for key, entry in entries.items():
            start, stop = (8 + length + place for place in entry["data_offsets"])
            how, columns = change if "_proj.weight" in key else copy, entry["shape"][-1]
            chunk = CHUNK // (2 * columns) * 2 * columns
            for low in range(start, stop, chunk):
                high = min(low + chunk, stop)
                jobs.append(workers.submit(how, read, write, low, high, columns))
        def finish(write=write, jobs=jobs):
            for count, job in enumerate(jobs, 1):
                job.result()
                if count % 8 == 0:
                    os.fdatasync(write)
            os.fsync(write)
        last = disk.submit(finish)
    last.result()
print("seconds", time.process_time() - used, time.perf_counter() - began)
"""


def build(folder: Path) -> None:
    """Write the model and the adapter; runs in a separate process, see ``call``."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    base, adapter = folder / "base", folder / "adapter"
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(base, max_shard_size="1GB")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets" / "tiny")
    tokenizer.save_pretrained(base)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    adapted.save_pretrained(adapter)


def call(command: list[str]) -> tuple[float, float, str]:
    """Run a command; return its wall seconds, peak MiB and output.

    On Linux a new program inherits the peak memory of the process that started it (exec preserves
    ru_maxrss), so this process must stay small: it imports torch only after the last measurement.
    """
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert own < 100, (
        f"this process has used {own:.0f} MiB, which its children's peak would include"
    )
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    assert status == 0, output
    return time.perf_counter() - began, usage.ru_maxrss / 1024, output


def copy(base: Path, out: Path) -> dict[str, float]:
    files = sorted(base.glob("*.safetensors"))
    out.mkdir()
    began, used = time.perf_counter(), sum(os.times()[:4])
    subprocess.run(["cp", *map(str, files), str(out)], check=True)
    for file in out.iterdir():
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    return {"seconds": time.perf_counter() - began, "CPU": sum(os.times()[:4]) - used}


def ours(base: Path, adapter: Path, out: Path, verify: str) -> dict[str, float]:
    command = [sys.executable, "-m", "sft.merge", f"adapter={adapter}", f"output={out}"]
    wall, peak, _ = call([*command, f"base={base}", f"verify={verify}"])
    report = json.loads((out / "merge_report.json").read_text())
    key = "seconds" if verify == "true" else "seconds_merging"
    return {"seconds": report[key], "command": wall, "peak": peak}


def script(code: str, *arguments: Path | str) -> dict[str, float]:
    wall, peak, output = call([sys.executable, "-c", code, *map(str, arguments)])
    *used, seconds = map(float, output.rpartition("seconds")[2].split())
    return {"seconds": seconds, "command": wall, "peak": peak} | ({"CPU": used[0]} if used else {})


def equal(one: Path, other: Path) -> tuple[int, int]:
    """Count the tensors that are bitwise equal, and all tensors."""
    from safetensors import safe_open

    def tensors(folder: Path) -> dict[str, Path]:
        return {
            name: path
            for path in folder.glob("*.safetensors")
            for name in safe_open(path, "pt").keys()
        }

    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    same = sum(
        safe_open(first[name], "pt")
        .get_tensor(name)
        .equal(safe_open(second[name], "pt").get_tensor(name))
        for name in first
    )
    return same, len(first)


def measure(name: str, tool: Any, base: Path, found: dict[str, list[dict[str, float]]]) -> None:
    """Run a tool with the base in the page cache and no pending writes."""
    subprocess.run(["sync"], check=True)
    for file in base.glob("*.safetensors"):
        subprocess.run(["cat", str(file)], stdout=subprocess.DEVNULL, check=True)
    found[name].append(tool())
    print(name, {key: round(value, 2) for key, value in found[name][-1].items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="scratch, about 15 GB")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--skip", nargs="*", default=[], choices=["steps", "peft", "verified"])
    arguments = parser.parse_args()
    base, adapter = arguments.folder / "base", arguments.folder / "adapter"
    if not (adapter / "adapter_model.safetensors").is_file():
        builder = multiprocessing.get_context("spawn").Process(
            target=build, args=(arguments.folder,)
        )
        builder.start()
        builder.join()
        assert builder.exitcode == 0
    steps = ["read", "copied", "least", "sums"]
    out = {name: arguments.folder / name for name in ("cp", *steps, "ours", "peft", "verified")}
    tools = {
        "cp": lambda: copy(base, out["cp"]),
        **{step: lambda step=step: script(STEPS, base, out[step], step) for step in steps},
        "ours": lambda: ours(base, adapter, out["ours"], "false"),
        "peft": lambda: script(PEFT, base, adapter, out["peft"]),
        "verified": lambda: ours(base, adapter, out["verified"], "true"),
    }
    skipped = {*arguments.skip, *(steps if "steps" in arguments.skip else ())}
    tools = {name: tool for name, tool in tools.items() if name not in skipped}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in tools}
    for _ in range(arguments.runs):
        for name in (name for name in tools if name != "verified"):
            for other in out.keys() - ({"ours"} if name == "peft" else set()):  # these are compared
                shutil.rmtree(out[other], ignore_errors=True)
            measure(name, tools[name], base, found)
    if "verified" in tools:
        measure("verified", tools["verified"], base, found)

    def median(name: str, key: str) -> float:
        return statistics.median(run[key] for run in found[name])

    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    print(f"\n{size / 1e9:.2f} GB; medians of {arguments.runs}")
    heads = ["seconds", "/ cp", "CPU", "command", "MiB"] + ["/ PEFT", "PEFT /"] * ("peft" in tools)
    print(" " * 10 + "".join(f"{head:>9}" for head in heads))
    for name in tools:
        seconds = median(name, "seconds")
        line = f"{name:10}{seconds:9.2f}{seconds / median('cp', 'seconds'):9.2f}"
        line += f"{median(name, 'CPU'):9.2f}" if "CPU" in found[name][0] else " " * 9
        if name != "cp":
            peak = median(name, "peak")
            line += f"{median(name, 'command'):9.1f}{peak:9.0f}"
            if "peft" in tools:
                line += f"{seconds / median('peft', 'seconds'):9.2f}"
                line += f"{median('peft', 'peak') / peak:9.2f}"
        print(line)
    if "peft" in tools:
        same, count = equal(out["ours"], out["peft"])
        print(f"tensors the same to the bit as PEFT's: {same} of {count}")


if __name__ == "__main__":
    main()
