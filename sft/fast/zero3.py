"""ZeRO-3: cache DeepSpeed's decisions which parameters to release per recorded trace.

DeepSpeed records the order (trace) in which a model uses its parameters, and does not release those
that are used again soon. It caches these decisions for the whole process (DeepSpeed 0.19). After an
evaluation, which has no backward pass, training would therefore release all parameters after the
forward pass and gather them again, which doubles the traffic between ranks.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

DECIDE = "_PartitionedParameterCoordinator__params_to_release"
ORDER = "_PartitionedParameterCoordinator__submodule_order"


def learn_each_way() -> None:
    """Replace DeepSpeed's cache of decisions by one cache per recorded trace."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    stock: Any = getattr(PartitionedParameterCoordinator, DECIDE, None)
    inside = inspect.getclosurevars(stock).nonlocals if inspect.isfunction(stock) else {}
    cached: Any = inside.get("func")  # DeepSpeed's profiling wraps it
    if not hasattr(cached, "cache_info"):
        return  # already replaced, or a different version of DeepSpeed
    decide = cached.__wrapped__

    @functools.lru_cache(maxsize=8)  # traces of forward passes, of training, and others
    def decisions_for(order: Any) -> dict[Any, set[int]]:
        return {}

    current: list[Any] = [None, {}]  # the current trace, and its decisions

    def params_to_release(coordinator: Any, module: Any, step: int) -> set[int]:
        order = getattr(coordinator, ORDER)
        if order is not current[0]:
            current[:] = order, decisions_for(order)
        decisions = current[1]
        if (module, step) not in decisions:
            decisions[module, step] = decide(coordinator, module, step)
        return set(decisions[module, step])  # a copy: the caller adds to it

    setattr(PartitionedParameterCoordinator, DECIDE, params_to_release)
