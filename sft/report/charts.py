"""The charts of a page: which figures become which curves, of one run or over one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from sft.report.curves import Curve, chart
from sft.report.folder import Folder, Points, number

SPLIT = ("data", "compute", "optimizer", "evaluation", "saving", "other")
MEMORY = {
    "memory_resident": "resident",
    "memory_allocated": "GPU, allocated",
    "memory_reserved": "GPU, reserved",
    "memory_device": "GPU, in use",
}
GIB = 2**30


def scaled(points: Points, factor: float) -> Points:
    """Multiply the values."""
    return [(step, factor * value) for step, value in points]


def set_name(key: str, figure: str) -> str:
    """Return the name of a held-out set: ``eval_code_loss`` is that of code."""
    return key.removeprefix("eval_").removesuffix(figure).strip("_") or "held-out"


def charts(run: Folder) -> str:
    """Draw every figure that a run has logged."""
    held = run.held_out()
    marks = list(_marks(run))
    curves = [Curve("training", run.points("loss"))]
    curves += [
        Curve(set_name(key, "loss"), run.points(key), look, dots=True)
        for look, key in enumerate(held, 1)
    ]
    drawn = [chart("Loss", curves, "nats per token", marks=marks, log=True)]
    perplexities = [key.removesuffix("loss") + "perplexity" for key in held]
    curves = [
        Curve(set_name(key, "perplexity"), run.points(key), look, dots=True)
        for look, key in enumerate(perplexities, 1)
    ]
    drawn.append(chart("Perplexity", curves, log=True))
    for key, title, unit, factor, zero in SINGLE:
        points = scaled(run.points(key), factor)
        log = key == "grad_norm"
        few = key == "exact_match"
        curves = [Curve(title.lower(), points, dots=few)]
        drawn.append(chart(title, curves, unit, from_zero=zero, log=log))
    curves = [
        Curve(name, scaled(run.points(key), 1 / GIB), look)
        for look, (key, name) in enumerate(MEMORY.items())
    ]
    drawn.append(chart("Peak memory, of the largest rank", curves, "GiB", from_zero=True))
    drawn.append(chart("Time of a step", _split(run), "seconds", stacked=True))
    return _grid(drawn)


SINGLE: tuple[tuple[str, str, str, float, bool], ...] = (
    ("learning_rate", "Learning rate", "", 1, True),
    ("grad_norm", "Gradient norm", "", 1, True),
    ("mean_token_accuracy", "Right next tokens", "%", 100, False),
    ("exact_match", "Exact match", "%", 100, False),
    ("tokens_per_second", "Tokens per second", "all ranks", 1, True),
    ("mfu", "Model FLOPs utilisation", "% of the peak", 100, True),
)


def _marks(run: Folder) -> Iterator[tuple[float, str]]:
    """Yield the steps at which the run was resumed, or an alert was given."""
    for entry in run.run.get("resumed", []):
        step = str(entry.get("from", "") if isinstance(entry, dict) else "").rpartition("-")[2]
        if step.isdigit():
            yield float(step), f"resumed from step {step}"
    for alert in run.lines("alerts.jsonl")[:100]:
        if math.isfinite(step := number(alert.get("step"))):
            yield step, f"alert: {alert.get('kind')}"


def _split(run: Folder) -> list[Curve]:
    """Return the parts of the mean time of a step as curves of a stack, the uppermost last."""
    logged = [record for record in run.metrics if "seconds_compute" in record]
    before = itertools.chain([0.0], (number(record["step"]) for record in logged))
    steps = [max(number(record["step"]) - last, 1) for record, last in zip(logged, before)]
    total = [0.0] * len(logged)
    curves = []
    for look, part in enumerate(SPLIT):
        values = [number(record.get(f"seconds_{part}", 0)) for record in logged]
        if not any(value > 0 for value in values):
            continue
        total = [a + b / count for a, b, count in zip(total, values, steps)]
        points = [(number(r["step"]), value) for r, value in zip(logged, total)]
        curves.append(Curve("forward and backward" if part == "compute" else part, points, look))
    return curves


def system(run: Folder) -> str:
    """Draw how the machine was used: profile=system."""
    found = run.lines("system.jsonl")
    start = number(found[0].get("time")) if found else 0.0

    def curve(
        name: str, of: Callable[[dict[str, object]], object], factor: float, look: int
    ) -> Curve:
        points = [((number(r.get("time")) - start) / 60, factor * number(of(r))) for r in found]
        return Curve(name, [point for point in points if math.isfinite(point[0])], look)

    def gpus(key: str, factor: float) -> list[Curve]:
        count = max((len(_gpus(record)) for record in found), default=0)
        return [
            curve(
                f"GPU {i}", lambda r, i=i: dict(enumerate(_gpus(r))).get(i, {}).get(key), factor, i
            )
            for i in range(count)
        ]

    def several(names: dict[str, str], factor: float) -> list[Curve]:
        return [
            curve(name, lambda r, key=key: r.get(key), factor, look)
            for look, (key, name) in enumerate(names.items())
        ]

    network = {"network_received": "received", "network_sent": "sent"}
    return _grid(
        [
            chart("GPU utilisation", gpus("utilisation", 100), "%", from_zero=True, over="minute"),
            chart("GPU memory", gpus("memory", 1 / GIB), "GiB", from_zero=True, over="minute"),
            chart("GPU power", gpus("power", 1), "W", from_zero=True, over="minute"),
            chart("CPU", several({"cpu": "all cores"}, 100), "%", from_zero=True, over="minute"),
            chart(
                "Memory",
                several({"memory": "used by the run", "memory_free": "free"}, 1 / GIB),
                "GiB",
                from_zero=True,
                over="minute",
            ),
            chart(
                "Disk",
                several({"disk_read": "read", "disk_written": "written"}, 1e-6),
                "MB/s",
                from_zero=True,
                over="minute",
            ),
            chart("Network", several(network, 1e-6), "MB/s", from_zero=True, over="minute"),
        ]
    )


def _gpus(record: dict[str, object]) -> list[dict[str, object]]:
    found = record.get("gpus")
    return (
        [item if isinstance(item, dict) else {} for item in found]
        if isinstance(found, list)
        else []
    )


def compared(runs: Sequence[Folder], names: Sequence[str]) -> str:
    """Draw the curves of several runs over one another.

    Args:
        runs: The runs.
        names: What the legend calls them.
    """
    held = dict.fromkeys(itertools.chain(*(run.held_out() for run in runs)))
    wanted = [("loss", "Training loss", "nats per token", 1.0, False)]
    wanted += [
        (key, f"Loss on {set_name(key, 'loss')} rows", "nats per token", 1.0, False) for key in held
    ]
    wanted += [("eval_perplexity", "Perplexity", "", 1.0, False), *SINGLE]
    wanted += [("seconds_per_step", "Time of a step", "seconds", 1.0, True)]
    wanted += [(key, f"Peak memory: {name}", "GiB", 1 / GIB, True) for key, name in MEMORY.items()]
    drawn = []
    for key, title, unit, factor, zero in wanted:
        curves = [
            Curve(name, scaled(run.points(key), factor), look, key.startswith(("eval_", "exact")))
            for look, (run, name) in enumerate(zip(runs, names, strict=True))
        ]
        log = "loss" in key or "perplexity" in key or key == "grad_norm"
        drawn.append(chart(title, curves, unit, from_zero=zero, log=log, ends=True))
    return _grid(drawn)


def _grid(drawn: Sequence[str]) -> str:
    found = "".join(drawn)
    return f'<div class="charts">\n{found}</div>\n' if found else ""
