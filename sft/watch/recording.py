"""Summarise what PyTorch's profiler has recorded: where the time goes, and a GPU's memory."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

# The ranges of a recording. Tools that read traces find the steps by this name.
STEP = "ProfilerStep#"
DATA, FORWARD, BACKWARD, OPTIMIZER = PHASES = ("data", "forward", "backward", "optimizer")
ROWS = 100  # operations, at most
POINTS = 500  # of the curve of memory, at most
TORCH = str(Path(torch.__file__).parent)


def costs(events: Any, cuda: bool) -> dict[str, Any]:
    """Return the time of each phase, and of the operations that take most of it.

    Args:
        events: The averages of ``torch.profiler.profile.key_averages``.
        cuda: Whether the share of an operation is that of the GPU's time.

    Returns:
        ``device``: whose time the shares are of, cpu or cuda. ``phases``: name, calls and seconds.
        ``operations``: name, calls, seconds on the CPU and on the GPU without the operations that
        each has called, and the share of all operations; largest first.
    """
    on_cpu = [event for event in events if event.device_type.name == "CPU"]
    phases = {event.key: event for event in on_cpu if event.key in PHASES}
    operations = [event for event in on_cpu if not event.is_user_annotation]

    def own(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    total = sum(map(own, operations)) or 1.0
    return {
        "device": "cuda" if cuda else "cpu",
        "phases": [
            {"name": name, "calls": phase.count, "seconds": round(phase.cpu_time_total / 1e6, 6)}
            for name, phase in ((name, phases[name]) for name in PHASES if name in phases)
        ],
        "operations": [
            {
                "name": event.key,
                "calls": event.count,
                "cpu_seconds": round(event.self_cpu_time_total / 1e6, 6),
                "cuda_seconds": round(event.self_device_time_total / 1e6, 6),
                "share": round(own(event) / total, 4),
            }
            for event in sorted(operations, key=own, reverse=True)[:ROWS]
        ],
    }


def at_peak(snapshot: dict[str, Any], device: int) -> dict[str, Any]:
    """Summarise a snapshot of the allocator, which PyTorch would only write as a pickle.

    Args:
        snapshot: What ``torch.cuda.memory._snapshot`` returns.
        device: The number of the GPU.

    Returns:
        ``peak``: bytes in use, at most. ``before``: those of it that were allocated before the
        recording. ``held``: bytes and blocks of the others by the line of code that allocated them,
        largest first. ``curve``: seconds since the first allocation and bytes in use, the largest
        of each interval.
    """
    events = [
        event
        for event in snapshot["device_traces"][device]
        if event["action"] in ("alloc", "free_completed")
    ]
    sizes = [event["size"] * (1 if event["action"] == "alloc" else -1) for event in events]
    segments = [each for each in snapshot["segments"] if each["device"] == device]
    used = [sum(each["active_size"] for each in segments) - sum(sizes)]  # before the first event
    for size in sizes:
        used.append(used[-1] + size)
    peak = max(range(len(used)), key=used.__getitem__)

    live: dict[int, dict[str, Any]] = {}
    before = used[0]
    for event in events[:peak]:
        if event["action"] == "alloc":
            live[event["addr"]] = event
        elif live.pop(event["addr"], None) is None:
            before -= event["size"]
    blocks: dict[str, list[int]] = defaultdict(list)
    for event in live.values():
        blocks[allocated_by(event.get("frames") or [])].append(event["size"])
    largest = sorted(blocks.items(), key=lambda item: (-sum(item[1]), item[0]))
    held = [{"where": w, "bytes": sum(sizes), "blocks": len(sizes)} for w, sizes in largest]

    width = -(-len(events) // POINTS) or 1
    began = events[0]["time_us"] if events else 0
    curve = []
    for start in range(0, len(events), width):
        most = max(range(start, min(start + width, len(events))), key=lambda at: used[at + 1])
        seconds = (events[most]["time_us"] - began) / 1e6
        curve.append([round(seconds, 6), used[most + 1]])
    return {"device": device, "peak": used[peak], "before": before, "held": held, "curve": curve}


def allocated_by(frames: list[dict[str, Any]]) -> str:
    """Name the innermost line of code outside of PyTorch; the backward pass has none."""
    if not frames:
        return "backward pass"
    outside = (frame for frame in frames if not frame["filename"].startswith(TORCH))
    frame = next(outside, frames[0])
    return f"{frame['filename']}:{frame['line']} {frame['name']}"
