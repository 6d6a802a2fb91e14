"""What ranks do together: agree on a decision, collect values, compare parameters."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from sft import process
from sft.errors import RunError

_store: Any = None  # must stay referenced: on rank 0 it may be the server
_decisions = itertools.count()


def from_rank_zero(decide: Callable[[], Any]) -> Any:
    """Decide on rank 0 and return its decision on every rank, before there is a process group.

    The launcher's key-value store exists from the start. It outlives restarts of the ranks, so
    every decision of every start has its own key.

    Args:
        decide: Returns a value that JSON can hold.

    Raises:
        RunError: The ranks do not find each other.
    """
    global _store
    if "RANK" not in os.environ or process.world_size() == 1:
        return decide()
    restarts, key = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), str(next(_decisions))
    decision = json.dumps(decide()) if process.rank() == 0 else ""
    try:
        _store, _, _ = next(rendezvous("env://"))
        store = PrefixStore(f"sft/{restarts}", _store)
        if decision:
            store.set(key, decision)
        return json.loads(store.get(key))
    except (ValueError, dist.DistError) as error:
        raise RunError(
            f"rank {os.environ['RANK']} cannot reach rank 0: {str(error).splitlines()[0]}\n"
            "    fix: see what rank 0 says; start ranks with torchrun, which sets MASTER_ADDR and "
            "MASTER_PORT"
        ) from error


def gather(value: Any) -> list[Any]:
    """Collect a small object from every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def trained_bits(model: torch.nn.Module) -> int:
    """Return a sum of the trained parameters' bits; it is equal on ranks with equal parameters."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            words = parameter.detach().float().contiguous().view(torch.int32)
            total += int(words.to(torch.int64).sum().item())
    return total & 0x7FFFFFFFFFFFFFFF
