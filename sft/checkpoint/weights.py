"""The trained weights as files: gathered from the ranks, written, read back and compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open

from sft.checkpoint import sharded
from sft.errors import CheckpointError

# What check() finds wrong: how to correct it. The other faults are those of the disk.
FIXES = {
    "all zero after training began": "leave these modules, which get no gradient, out of "
    "lora.target_modules",
    "not finite": "use a smaller train.learning_rate, or train.on_nan=skip",
}


def gathered(
    model: Any, whole_model: Callable[[], dict[str, torch.Tensor] | None]
) -> dict[str, torch.Tensor]:
    """Return the tensors to save by the model's names; under ZeRO-3 they are gathered on rank 0.

    All ranks must call it. DeepSpeed's function leaves out the parameters that an adapter holds
    but does not train, so the parameters of an adapter are gathered here.

    Args:
        model: The unwrapped model.
        whole_model: DeepSpeed's function, used under ZeRO-3 for a model without an adapter.
    """
    if not sharded.any_sharded(model):
        state: dict[str, torch.Tensor] = model.state_dict()
        return state
    if not isinstance(model, PeftModel):
        return whole_model() or {}
    parameters = dict(model.named_parameters())
    adapter = {id(value) for value in get_peft_model_state_dict(model, parameters).values()}
    whole = {}
    for name, parameter in parameters.items():
        if id(parameter) in adapter or parameter.requires_grad:
            found = sharded.whole_copy(parameter)
            if found is not None:
                whole[name] = found
    return whole


def write(
    model: Any, tokenizer: Any, folder: Path, weights: dict[str, torch.Tensor], updated: bool
) -> None:
    """Write weights and tokenizer on rank 0, read the weights back, and compare.

    Args:
        model: The unwrapped model.
        tokenizer: The tokenizer that is written beside the weights.
        folder: The folder to write to.
        weights: What ``gathered`` returned.
        updated: Whether the optimizer has changed the weights at least once.

    Raises:
        CheckpointError: The files do not hold what was trained.
    """
    model.save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)
    live = get_peft_model_state_dict(model, weights) if isinstance(model, PeftModel) else weights
    check(folder, live, isinstance(model, PeftModel), updated)


def check(folder: Path, live: dict[str, Any], adapter: bool, updated: bool) -> None:
    """Compare the tensors in a folder with those in memory.

    Args:
        folder: The folder with the safetensors files.
        live: The expected tensors by the names in the files. Transformers renames tensors of a
            full model as it saves them, so there names may be missing on either side.
        adapter: Whether this is an adapter: then all names must agree, and no LoRA B may be zero
            once updated.
        updated: Whether the optimizer has changed the weights at least once.

    Raises:
        CheckpointError: With the first tensors that are wrong, and what is wrong with them.
    """
    wrong: dict[str, list[str]] = {}
    seen, untrained, trained = set(), [], 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                seen.add(name)
                expected = live.get(name)
                if not tensor.numel():
                    wrong.setdefault("empty", []).append(name)
                elif tensor.is_floating_point() and not tensor.isfinite().all():
                    wrong.setdefault("not finite", []).append(name)
                elif expected is not None and not _same(tensor, expected):
                    wrong.setdefault("not the model's", []).append(name)
                elif expected is None and adapter:
                    wrong.setdefault("unknown to the model", []).append(name)
                if "lora_B" in name or "lora_embedding_B" in name:
                    is_zero = not tensor.any()
                    untrained += [name] * is_zero
                    trained += not is_zero
    if adapter and live.keys() - seen:
        wrong["missing"] = sorted(live.keys() - seen)
    if not seen:
        wrong["missing"] = ["every tensor"]
    if untrained and (updated or trained):
        wrong["all zero after training began"] = untrained
    if wrong:
        lines = [
            f"    {len(names)} {what}: {', '.join(names[:2])}{', ...' if len(names) > 2 else ''}"
            for what, names in wrong.items()
        ]
        disk = "check the disk, then give the same command again to resume the run"
        raise CheckpointError(
            "the weights that were saved are not those that are trained:\n"
            + "\n".join(lines)
            + f"\n    fix: {next((FIXES[what] for what in FIXES if what in wrong), disk)}"
        )


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Compare bits, so that a NaN equals itself; ``check`` reports NaN on its own."""
    other = other.detach().cpu()
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return (
        one.contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(other.contiguous().view(-1).view(torch.uint8))
    )
