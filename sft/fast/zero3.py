"""ZeRO-3: what DeepSpeed learnt before training is not applied to training.

It records in which order a model uses its parameters, and keeps those that are soon used again.
What it concludes it keeps for ever (DeepSpeed 0.19), so that after an evaluation, which has no
backward pass, training would release all parameters after the forward pass and gather them again:
twice the traffic between ranks.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

DECIDE = "_PartitionedParameterCoordinator__params_to_release"
ORDER = "_PartitionedParameterCoordinator__submodule_order"


def learn_each_way() -> None:
    """Let DeepSpeed decide what to release for each order that it records, by itself."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stock: Any = getattr(PartitionedParameterCoordinator, DECIDE, None)
    inside = inspect.getclosurevars(stock).nonlocals if inspect.isfunction(stock) else {}
    cached: Any = inside.get("func")  # which DeepSpeed's profiling wraps
    if not hasattr(cached, "cache_info"):
        return  # done already, or another version
    decide = cached.__wrapped__

    @functools.lru_cache(maxsize=8)  # forward passes before training, training, on any other way
    def decisions_for(order: Any) -> dict[Any, set[int]]:
        return {}

    current: list[Any] = [None, {}]  # an order, and what was decided for it

    def params_to_release(coordinator: Any, module: Any, step: int) -> set[int]:
        order = getattr(coordinator, ORDER)
        if order is not current[0]:
            current[:] = order, decisions_for(order)
        decisions = current[1]
        if (module, step) not in decisions:
            decisions[module, step] = decide(coordinator, module, step)
        return set(decisions[module, step])  # the caller adds to it

    setattr(PartitionedParameterCoordinator, DECIDE, params_to_release)
