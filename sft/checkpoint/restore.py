"""Restores the state that ``checkpoint.state`` collected, on any number of ranks and ZeRO stage."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sft.checkpoint import sharded
from sft.checkpoint.optimizer import Optimizer
from sft.checkpoint.state import STATE, VALUE, Live
from sft.checkpoint.tensors import Reader
from sft.config.plain import read_json
from sft.errors import CheckpointError

logger = logging.getLogger("sft")


def restore(live: Live, folder: Path) -> list[dict[str, Any]]:
    """Restore everything but the random states, after DeepSpeed or DDP has wrapped the model.

    Returns:
        What each rank had counted; the trainer continues from it when training begins.

    Raises:
        CheckpointError: The checkpoint's parameters are not those that are trained now.
    """
    record = _record(folder)
    optimizer, reader = live.optimizer, Reader(folder)
    restore_weights(live, folder)
    if record["kind"] != "by rank":
        made, now = record["optim"], live.optim
        if made == now or (made.startswith("adamw_torch") and now.startswith("adamw_torch")):
            _restore_optimizer(optimizer, reader)
            for group, saved in zip(optimizer.torch.param_groups, record["groups"], strict=False):
                group.update(saved)
        else:
            logger.info(
                "the optimizer starts without its saved state, because train.optim has changed "
                "from %s to %s",
                made,
                now,
            )
    _restore_schedule(live, record["schedule"])
    if record["scaler"] and live.scaler is not None:
        live.scaler.load_state_dict(record["scaler"])
    if record["loss_scaler"] and hasattr(optimizer.zero, "loss_scaler"):
        for name, value in record["loss_scaler"].items():
            setattr(optimizer.zero.loss_scaler, name, value)
    counts: list[dict[str, Any]] = record["counts"]
    return counts


def _record(folder: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(folder / STATE, finite=False)
    except ValueError as error:
        raise CheckpointError(
            f"{folder / STATE} is damaged: {error}\n"
            "    fix: restore the file, or delete this checkpoint to use the one before it"
        ) from error
    return found


def restore_weights(live: Live, folder: Path) -> None:
    """Restore the trained parameters only; an optimizer whose state is saved by rank, too.

    Raises:
        CheckpointError: The checkpoint's parameters are not those that are trained now.
    """
    optimizer, reader = live.optimizer, Reader(folder)
    if _record(folder)["kind"] == "by rank":
        _restore_rank(optimizer, reader)
    else:
        _restore_parameters(optimizer, reader, folder)


def _restore_parameters(optimizer: Optimizer, reader: Reader, folder: Path) -> None:
    saved = {key.partition("/")[2] for key in reader.where if key.startswith(f"{VALUE}/")}
    if saved != optimizer.parameters.keys():
        different = sorted(saved ^ optimizer.parameters.keys())
        raise CheckpointError(
            f"{folder} and this run train different parameters: {', '.join(different[:3])}"
            f"{', ...' if len(different) > 3 else ''}\n    fix: run_name=NAME for a new run"
        )
    for name, parameter in optimizer.parameters.items():
        value = reader[f"{VALUE}/{name}"]
        if value.shape != sharded.shape_of(parameter):
            raise CheckpointError(
                f"{folder} has {name} with the shape {tuple(value.shape)}, this run with a "
                "different one\n    fix: run_name=NAME for a new run"
            )
        sharded.fill(parameter, value)
        if optimizer.zero is not None:
            _set_share(parameter, value.float(), None)


def _set_share(parameter: Any, value: torch.Tensor, key: str | None) -> None:
    """Set this rank's share of a parameter's float32 copy (key None) or optimizer state."""
    from deepspeed import utils

    if not sharded.is_sharded(parameter):
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # safe_set_full_* reads past the end of the value where the ranks' shares are padded.
    own = sharded.cut_share(parameter, value)
    if key is None:
        utils.safe_set_local_fp32_param(parameter, own)
    else:
        utils.safe_set_local_optimizer_state(parameter, own, key)


def _restore_optimizer(optimizer: Optimizer, reader: Reader) -> None:
    names = list(optimizer.parameters)
    kinds = sorted({key.partition("/")[0] for key in reader.where} - {VALUE})
    if optimizer.zero is None:
        order = [p for group in optimizer.torch.param_groups for p in group["params"]]
        index = {parameter: number for number, parameter in enumerate(order)}
        state: dict[int, dict[str, Any]] = {}
        for name, parameter in optimizer.parameters.items():
            saved = {k: reader[f"{k}/{name}"] for k in kinds if f"{k}/{name}" in reader.where}
            if saved:
                state[index[parameter]] = optimizer.entry(saved)
        groups = optimizer.torch.state_dict()["param_groups"]
        optimizer.torch.load_state_dict({"state": state, "param_groups": groups})
        return
    kinds = [kind for kind in kinds if f"{kind}/{names[0]}" in reader.where]
    one = optimizer.entry({kind: reader[f"{kind}/{names[0]}"] for kind in kinds})
    whole = [kind for kind in kinds if torch.as_tensor(one[kind]).ndim]
    on_device = any(optimizer.torch.defaults.get(name) for name in ("fused", "capturable"))
    for flat in optimizer.flat:
        fresh: dict[str, Any] = {kind: torch.zeros_like(flat) for kind in whole}
        for kind in one.keys() - set(whole):
            count = one[kind]
            if isinstance(count, torch.Tensor):
                # Each partition needs its own copy, because torch counts in place.
                count = count.clone().to(flat.device if on_device else "cpu")
            fresh[kind] = count
        optimizer.torch.state[flat] = fresh
    optimizer.link()
    for name, parameter in optimizer.parameters.items():
        for kind in whole:
            _set_share(parameter, reader[f"{kind}/{name}"], kind)


def _restore_rank(optimizer: Optimizer, reader: Reader) -> None:
    """Restore this rank's state; ``resume.changed`` refuses a different number of ranks."""
    prefix = f"rank{dist.get_rank()}/"
    for index, flat in enumerate(optimizer.flat):
        saved = {}
        for key in reader.where:
            kind, _, where = key.removeprefix(prefix).partition("/")
            if key.startswith(prefix) and where == str(index) and kind != VALUE:
                saved[kind] = reader[key].to(flat.device)
        optimizer.torch.state[flat] = optimizer.entry(saved)
        flat.data.copy_(reader[f"{prefix}{VALUE}/{index}"])
    _spread(optimizer)


def _spread(optimizer: Optimizer) -> None:
    """Set the parameters from the float32 shares of all ranks."""
    from deepspeed.utils import safe_get_full_fp32_param

    for parameter in optimizer.parameters.values():
        sharded.fill(parameter, safe_get_full_fp32_param(parameter))


def _restore_schedule(live: Live, saved: dict[str, Any]) -> None:
    """Continue this command's schedule, whose rates may differ, at the saved step."""
    schedule = live.schedule
    while hasattr(schedule, "scheduler"):  # Accelerate's and DeepSpeed's wrappers
        schedule = schedule.scheduler
    if not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
        schedule.load_state_dict(saved)
        rates = schedule.get_last_lr()
    else:
        schedule.last_epoch, schedule._step_count = saved["last_epoch"], saved["_step_count"]
        rates = [
            base * factor(schedule.last_epoch)
            for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        schedule._last_lr = rates
    for group, rate in zip(live.optimizer.torch.param_groups, rates, strict=True):
        group["lr"] = rate
