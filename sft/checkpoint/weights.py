"""The trained weights as files: gathered from the ranks, written, read back and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
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
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied ones have two names
    adapter = {id(value) for value in adapter_tensors(model, parameters).values()}
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
    adapter = isinstance(model, PeftModel)
    options = {"save_embedding_layers": _embedding_layers(model)} if adapter else {}
    model.save_pretrained(folder, state_dict=weights, **options)
    tokenizer.save_pretrained(folder)
    if adapter and (generation := getattr(model.get_base_model(), "generation_config", None)):
        generation.save_pretrained(folder)
    check(folder, adapter_tensors(model, weights) if adapter else weights, adapter, updated)


def adapter_tensors(model: PeftModel, state: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the tensors of an adapter by their names in its file.

    Args:
        model: The model with the adapter.
        state: All of the model's tensors by their names in the model; None: the model's own.
    """
    options = {"save_embedding_layers": _embedding_layers(model)}
    found: dict[str, Any] = get_peft_model_state_dict(model, state, **options)
    return found


def _embedding_layers(model: PeftModel) -> bool | str:
    """Return whether PEFT puts the whole embedding and head into the adapter's file.

    PEFT does so where the embedding has other rows than the base's. The rows of new tokens are the
    adapter's own, so that the others need not be saved.
    """
    rows = model.peft_config[model.active_adapter].trainable_token_indices
    return "auto" if rows is None else False


@dataclass
class Contents:
    """What weight files hold.

    Attributes:
        shapes: The shape of each tensor, by name.
        wrong: The names of the tensors that no model can have, by what is wrong with them.
        zero: The LoRA B that are all zero, as they are before training.
        trained: The LoRA B that are not.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)
    zero: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)


def inspect(
    paths: Iterable[Path],
    compare: Callable[[str, torch.Tensor], str | None] = lambda name, tensor: None,
) -> Contents:
    """Read every tensor of weight files once, and list those that are empty or not finite.

    Under ZeRO-3, users got 40-byte files after days of training (TRL #4416, PEFT #2892).

    Args:
        paths: The safetensors files.
        compare: Says what else is wrong with a tensor, by its name; None: nothing is.

    Raises:
        SafetensorError: A file is damaged.
    """
    found = Contents()
    for path in paths:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                found.shapes[name] = tuple(tensor.shape)
                if what := _fault(tensor) or compare(name, tensor):
                    found.wrong.setdefault(what, []).append(name)
                if tensor.numel() and ("lora_B" in name or "lora_embedding_B" in name):
                    (found.trained if tensor.any() else found.zero).append(name)
    return found


def _fault(tensor: torch.Tensor) -> str | None:
    if not tensor.numel():
        return "empty"
    if tensor.is_floating_point():
        low, high = torch.aminmax(tensor)  # one pass; NaN if the tensor holds one
        if not (low.isfinite() and high.isfinite()):
            return "not finite"
    return None


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

    def compare(name: str, tensor: torch.Tensor) -> str | None:
        expected = live.get(name)
        if expected is None:
            return "unknown to the model" if adapter else None
        return None if _same(tensor, expected) else "not the model's"

    found = inspect(sorted(folder.glob("*.safetensors")), compare)
    wrong = found.wrong
    if adapter and live.keys() - found.shapes.keys():
        wrong["missing"] = sorted(live.keys() - found.shapes.keys())
    if not found.shapes:
        wrong["missing"] = ["every tensor"]
    if found.zero and (updated or found.trained):
        wrong["all zero after training began"] = found.zero
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
