"""Collects the state that a checkpoint stores beside the weights; ``restore`` reads it back.

The optimizer's state is saved unsharded, by the parameters' names, for any number of ranks and any
ZeRO stage. Nothing is pickled: tensors are in safetensors files, the rest in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from sft.checkpoint.optimizer import Optimizer, plain
from sft.checkpoint.random_state import RANDOM, random_streams
from sft.files import write_text
from sft.ranks import gather

STATE = "state.json"
VALUE = "parameter"  # the key of the trained parameters themselves, in full precision


@dataclass
class Live:
    """The objects of a running training whose state a checkpoint stores.

    Attributes:
        optimizer: The optimizer and the parameters it updates.
        schedule: The learning-rate schedule, as Accelerate or DeepSpeed wrapped it.
        scaler: Accelerate's loss scaler; None where the loss is not scaled.
        optim: The value of ``train.optim``.
    """

    optimizer: Optimizer
    schedule: Any
    scaler: Any
    optim: str


def unsharded(optimizer: Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the trained parameters and the optimizer's state, unsharded, in one order on all ranks.

    Under ZeRO the ranks gather one tensor after another, so every rank must iterate to the end.
    """
    if optimizer.kind() == "by rank":
        yield from _of_every_rank(optimizer)
        return
    if optimizer.zero is None:
        for name, parameter in optimizer.parameters.items():
            yield f"{VALUE}/{name}", parameter
        for name, entry in optimizer.entries().items():
            for key, value in entry.items():
                yield f"{key}/{name}", torch.as_tensor(value)
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer.link()
    entry = next(iter(optimizer.entries().values()))
    for name, parameter in optimizer.parameters.items():
        yield f"{VALUE}/{name}", safe_get_full_fp32_param(parameter)
        for key, value in entry.items():
            if torch.as_tensor(value).ndim:
                yield f"{key}/{name}", safe_get_full_optimizer_state(parameter, key)
            else:  # for example Adam's step count, which is the same for all parameters
                yield f"{key}/{name}", torch.as_tensor(value)


def _of_every_rank(optimizer: Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    own = {f"{VALUE}/{index}": flat.cpu() for index, flat in enumerate(optimizer.flat)}
    for index, entry in optimizer.entries().items():
        for key, value in entry.items():
            own[f"{key}/{index}"] = torch.as_tensor(value).cpu()
    for rank in range(dist.get_world_size()):
        box = [own if rank == dist.get_rank() else None]
        dist.broadcast_object_list(box, src=rank)
        for key, value in (box[0] or {}).items():
            yield f"rank{rank}/{key}", value


def progress(live: Live, counts: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Collect from all ranks the state that belongs to no parameter. All ranks must call it.

    Args:
        live: The objects whose state is saved.
        counts: What this rank has counted since the last logged line, as JSON values.

    Returns:
        Schedule, loss scales and counts as JSON values, and the ranks' random states.
    """
    optimizer = live.optimizer
    loss_scaler = getattr(optimizer.zero, "loss_scaler", None)
    streams = gather(random_streams())
    record = {
        "optim": live.optim,
        "kind": optimizer.kind(),
        "groups": optimizer.groups(),
        "schedule": plain(live.schedule.state_dict()),
        "scaler": live.scaler.state_dict() if live.scaler is not None else {},
        "loss_scaler": plain(vars(loss_scaler)) if loss_scaler is not None else {},
        "counts": gather(counts),
    }
    return record, {
        f"rank{rank}/{key}": value
        for rank, stream in enumerate(streams)
        for key, value in stream.items()
    }


def write_progress(folder: Path, record: dict[str, Any], streams: dict[str, torch.Tensor]) -> None:
    """Write what ``progress`` collected."""
    save_file(streams, folder / RANDOM)
    write_text(folder / STATE, json.dumps(record, indent=2) + "\n")
