"""A run's folder with everything that a page can show, made without training."""

import json
import math
import random
from pathlib import Path
from typing import Any

from sft.config import saved
from sft.config.settings import Config

START = 1_790_000_000.0
VERSIONS = {"python": "3.11.7", "sft": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.23.0"}
PROMPT = "Write this word backwards: <b>robot</b>\n<script>alert(1)</script>"
OPERATIONS = {
    "steps": [3, 4, 5],
    "device": "cuda",
    "phases": [{"name": "forward", "calls": 6, "seconds": 0.5758}],
    "operations": [
        {"name": name, "calls": 96, "cpu_seconds": 0.1, "cuda_seconds": 0.8, "share": share}
        for name, share in (("aten::mm", 0.612), ("aten::native_dropout", 0.0771))
    ],
}


def metrics(steps: int, every: int, seed: int, rate: float) -> list[dict[str, Any]]:
    """Make the records of training and of evaluations on two held-out sets."""
    chance = random.Random(seed)
    found: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        part = step / steps
        loss = 1.1 + 1.8 * math.exp(-6 * part * rate / 1e-4) + 0.08 * chance.gauss(0, 1)
        spike = 9.0 if step == every * (steps // every // 3) else 0.0
        warm = min(1.0, part / 0.05)
        record = {
            "step": step,
            "time": round(START + 0.42 * step, 3),
            "loss": round(loss + spike, 4),
            "grad_norm": round(abs(0.6 + 0.2 * chance.gauss(0, 1)) + 4 * spike, 4),
            "learning_rate": rate * warm * 0.5 * (1 + math.cos(math.pi * part)),
            "entropy": 1.2,
            "mean_token_accuracy": 0.7 - 0.3 * math.exp(-5 * part) + 0.01 * chance.gauss(0, 1),
            "num_tokens": 4096 * step,
            "epoch": round(3 * part, 4),
            "tokens_per_second": round(9750 + 220 * chance.gauss(0, 1)),
            "seconds_per_step": round(0.42 + 0.01 * chance.gauss(0, 1), 4),
            "seconds_left": round(0.42 * (steps - step), 1),
            "mfu": 0.41 + 0.01 * chance.gauss(0, 1),
            "memory_resident": 6_300_000_000 + 40_000 * step,
            "memory_allocated": 18_200_000_000,
            "memory_reserved": 21_900_000_000,
            "memory_device": 24_100_000_000,
            "seconds_data": round(0.012 * every, 4),
            "seconds_compute": round(0.34 * every + 0.004 * every * chance.gauss(0, 1), 4),
            "seconds_optimizer": round(0.03 * every, 4),
            "seconds_evaluation": 4.1 if step % (steps // 10) < every else 0.0,
            "seconds_saving": 1.6 if step % (steps // 5) < every else 0.0,
            "seconds_other": round(0.01 * every, 4),
        }
        found.append(record)
        if step % (steps // 10) < every:
            for name, above in (("", 0.0), ("code_", 0.35)):
                value = 1.15 + above + 1.5 * math.exp(-6 * part) + 0.12 * max(0, part - 0.7)
                found.append(
                    {
                        "step": step,
                        "time": round(START + 0.42 * step + 4, 3),
                        f"eval_{name}loss": round(value, 4),
                        f"eval_{name}perplexity": round(math.exp(value), 3),
                        f"eval_{name}tokens": 61_000,
                        f"eval_{name}seconds": 4.1,
                    }
                )
    return found


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def made_run(
    folder: Path, steps: int = 400, every: int = 1, seed: int = 1, rate: float = 1e-4, r: int = 8
) -> Path:
    """Write a finished run that was stopped, killed and resumed, with every file of a run."""
    folder.mkdir(parents=True)
    config = Config(run_name=folder.name, output_dir=str(folder), seed=seed)
    config.model.name, config.model.name_or_path = "qwen3-0.6b", "Qwen/Qwen3-0.6B"
    config.dataset.name, config.dataset.path = "alpaca", "https://me:secret@host/alpaca.jsonl"
    config.lora.r, config.train.learning_rate = r, rate
    (folder / "config.yaml").write_text(saved.to_yaml(config))
    records = metrics(steps, every, seed, rate)
    write_lines(folder / "metrics.jsonl", records)
    evaluations = [(item["eval_loss"], item["step"]) for item in records if "eval_loss" in item]
    lowest, best = min(evaluations, default=(0.0, 0))
    for step in (best, steps):
        (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
        (folder / f"checkpoint-{step}" / "optimizer.safetensors").write_bytes(bytes(300_000))
    for name in ("adapter", "merged", "profile"):
        (folder / name).mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(bytes(90_000))
    merge = {"passed": True, "dtype": "bfloat16", "max_difference": 4.9e-5, "compared_on": "8 rows"}
    merge |= {
        "allowed_difference": 2e-3,
        "top1_agreement": 1.0,
        "greedy_texts": {"equal": 4, "of": 4},
    }
    (folder / "merged" / "merge_report.json").write_text(json.dumps(merge))
    (folder / "profile" / "operations_rank0.json").write_text(json.dumps(OPERATIONS))
    _sides(folder, steps)
    run = {
        "status": "finished",
        "command": f"python -m sft.train model=qwen3-0.6b dataset=alpaca lora.r={r}",
        "ranks": 2,
        "choices": {"precision": {"value": "bf16", "reason": "the GPU computes in it"}},
        "versions": VERSIONS,
        "git": "d7a52f0c0385",
        "hardware": {"cpus": 16, "memory_gib": 128.0, "gpus": ["NVIDIA H200"]},
        "resumed": [{"from": f"checkpoint-{best}", "ranks": 2, "allowed": []}],
        "stops": [
            {"step": best, "time": START + 500, "status": "stopped", "reason": "SIGTERM"},
            {"step": best + 3, "time": START + 900, "status": "killed", "reason": None},
        ],
        "started": START,
        "ended": START + 0.42 * steps,
        "seconds": round(0.42 * steps, 1),
        "final": {"steps": steps, "loss": 1.1, "eval_loss": evaluations[-1][0]}
        if evaluations
        else {},
        "best": {"metric": "eval_loss", "value": lowest, "step": best, "written": True},
        "forgetting": {"before": 0.8312, "after": 0.8907, "change": 0.0716, "flagged": True},
        "operations": {"per_token": 2.4e9, "convention_6n": 3.6e9, "peak_per_second": 9.9e14},
        "ranks_memory": [{"parameter_bytes": 2_342_400, "optimizer_bytes": 417_960}] * 2,
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


def _sides(folder: Path, steps: int) -> None:
    """Write the files beside the metrics: audit, samples, alerts and the use of the machine."""
    bins = [
        [low, low + 64, int(4000 * math.exp(-(((low - 300) / 220) ** 2)))]
        for low in range(0, 1024, 64)
    ]
    part = {
        **{"rows": 52002, "samples": 51760, "dropped": 242, "truncated": 31, "tokens": 7_812_345},
        **{"trained_tokens": 3_301_222, "longest": 1024, "max_length": 1024},
        "roles": {"user": {"tokens": 4_511_123, "trained": 0}},
        "lengths": {"mean": 151.0, "p50": 131, "p95": 402, "max": 1024, "histogram": bins},
        "checks": {"never_stops": 0, "duplicates": 27},
    }
    held = {**part, "rows": 500, "samples": 500, "tokens": 75_100, "trained_tokens": 31_002}
    (folder / "data.json").write_text(json.dumps({"parts": {"train": part, "eval": held}}))
    answers = ("I am a robot.", "robot backwards is tobor", "tobor")
    write_lines(
        folder / "samples.jsonl",
        [
            {
                "step": place * steps // 8,
                "index": index,
                "prompt": PROMPT,
                "reference": "tobor",
                "answer": answers[min(place // 3, 2)],
                "tokens": 7,
                "stopped": place > 1,
            }
            for place in range(9)
            for index in range(3)
        ],
    )
    alert = {"step": steps // 3, "time": START + 60, "kind": "loss_jump", "rows": [3, 17]}
    write_lines(
        folder / "alerts.jsonl", [{**alert, "message": "the loss is 9.2, 8.1 times the mean"}]
    )
    gpu = {"utilisation": 0.93, "memory": 24_100_000_000, "power": 612.0}
    write_lines(
        folder / "system.jsonl",
        [
            {
                "time": START + 5 * place,
                "cpu": 0.12 + 0.02 * math.sin(place),
                "memory": 6.3e9,
                "memory_free": 9e10,
                "disk_read": 1e6,
                "disk_written": 5e7 * (place % 20 == 0),
                "network_sent": 1e4,
                "network_received": 3e4,
                "gpus": [{**gpu, "utilisation": 0.93 + 0.04 * math.sin(place)}, gpu],
            }
            for place in range(200)
        ],
    )
