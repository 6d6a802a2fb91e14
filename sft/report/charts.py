"""The charts of a page: which figures become which curves, of one run or over one another."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

from sft.report.curves import Curve, chart
from sft.report.folder import Folder, Points, number
from sft.run import record

# Of a step's time, in the order of their stack.
SPLIT = {
    "compute": "forward and backward",
    "optimizer": "optimizer",
    "data": "data",
    "evaluation": "evaluation",
    "saving": "saving",
    "other": "other",
}
MEMORY = {
    "memory_resident": "resident",
    "memory_allocated": "GPU, allocated",
    "memory_reserved": "GPU, reserved",
    "memory_device": "GPU, in use",
}
GIB = 2**30
# Of system.jsonl: title, unit, factor, and the keys with their names.
SYSTEM: tuple[tuple[str, str, float, dict[str, str]], ...] = (
    ("GPU utilisation", "%", 100, {"utilisation": ""}),
    ("GPU memory", "GiB", 1 / GIB, {"memory": ""}),
    ("GPU power", "W", 1, {"power": ""}),
    ("CPU, of all cores", "%", 100, {"cpu": "CPU"}),
    ("Memory", "GiB", 1 / GIB, {"memory": "used by the run", "memory_free": "free"}),
    ("Disk", "MB/s", 1e-6, {"disk_read": "read", "disk_written": "written"}),
    ("Network", "MB/s", 1e-6, {"network_received": "received", "network_sent": "sent"}),
)


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
    return _grid(drawn, "charts first")


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
    for entry in run.entries("resumed"):
        name = str(entry.get("from")).rpartition("-")[2]
        if name.isdigit():
            yield float(name), f"resumed from step {name}"
    for alert in run.lines(record.ALERTS)[:100]:
        if math.isfinite(step := number(alert.get("step"))):
            yield step, f"alert: {alert.get('kind')}"


def _split(run: Folder) -> list[Curve]:
    """Return the parts of the mean time of a step as curves of a stack, the uppermost last."""
    logged = [item for item in run.metrics if "seconds_compute" in item]
    steps = [float(item["step"]) for item in logged]
    lengths = [max(now - before, 1) for before, now in itertools.pairwise([0.0, *steps])]
    total, curves = [0.0] * len(logged), []
    for look, (part, name) in enumerate(SPLIT.items()):
        seconds = [number(item.get(f"seconds_{part}", 0)) for item in logged]
        if any(value > 0 for value in seconds):
            each = [value / length for value, length in zip(seconds, lengths, strict=True)]
            total = [below + value for below, value in zip(total, each, strict=True)]
            curves.append(Curve(name, list(zip(steps, total, strict=True)), look))
    return curves


def system(run: Folder) -> str:
    """Draw how the machine was used: profile=system."""
    found = run.lines(record.SYSTEM)
    begin = number(found[0].get("time")) if found else 0.0
    minutes = [(number(item.get("time")) - begin) / 60 for item in found]
    gpus = [item["gpus"] if isinstance(item.get("gpus"), list) else [] for item in found]

    def curve(name: str, values: Iterable[object], factor: float, look: int) -> Curve:
        pairs = zip(minutes, values, strict=True)
        points = [(minute, factor * number(value)) for minute, value in pairs]
        return Curve(name, [point for point in points if math.isfinite(point[0])], look)

    drawn = []
    for title, unit, factor, names in SYSTEM:
        if title.startswith("GPU"):
            (key,) = names
            curves = [
                curve(f"GPU {i}", [g[i].get(key) if i < len(g) else None for g in gpus], factor, i)
                for i in range(max(map(len, gpus), default=0))
            ]
        else:
            curves = [
                curve(name, [item.get(key) for item in found], factor, look)
                for look, (key, name) in enumerate(names.items())
            ]
        drawn.append(chart(title, curves, unit, from_zero=True, over="minute"))
    return _grid(drawn)


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
    return _grid(drawn, "charts first")


def _grid(drawn: Sequence[str], kind: str = "charts") -> str:
    found = "".join(drawn)
    return f'<div class="{kind}">\n{found}</div>\n' if found else ""
