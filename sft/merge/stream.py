"""A forward pass that reads the weights of one layer at a time, and frees them after the layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn

from sft.merge.base_files import Base, RowSlice
from sft.merge.layout import Transform
from sft.merge.placeholders import base_name, is_placeholder
from sft.merge.stored import Stored

CHUNK = 1 << 24  # numbers of a head that are multiplied at once


class Weights:
    """Reads parameters of a model from its files, in float32.

    Args:
        base: The files; loading may not rearrange rows of any parameter.
        transforms: The functions that are applied to whole matrices, by parameter.
    """

    def __init__(self, base: Base, transforms: dict[str, Transform]) -> None:
        self.base, self.transforms = base, transforms
        self.threads = ThreadPoolExecutor(torch.get_num_threads())
        self.spare: dict[tuple[int, ...], list[torch.Tensor]] = {}
        self.stored: dict[str, list[tuple[Stored, int, RowSlice]]] = {}
        for tensors in base.files.values():
            for stored in tensors:
                row = 0
                for target in base.slices[stored.name]:
                    self.stored.setdefault(target.parameter, []).append((stored, row, target))
                    row += target.rows

    def stored_at(self, name: str) -> list[tuple[Stored, int, RowSlice]]:
        """List the stored tensors and rows of a parameter, which a tied name may store."""
        return next(self.stored[other] for other in self._names(name) if other in self.stored)

    def _names(self, name: str) -> list[str]:
        return [name, *self.base.partners(name)]

    def read(self, name: str) -> torch.Tensor:
        """Read a parameter; a buffer of its shape that ``give_back`` returned is used again."""
        shape = self.base.shapes[name]
        found = self.stored_at(name)
        if name in self.transforms:
            return self.transforms[name](found[0][0].read(0, found[0][0].rows)).float().view(shape)
        spare = self.spare.get(shape)
        result = spare.pop() if spare else torch.empty(shape)
        matrices = result.view(shape[0] if len(shape) == 3 else 1, -1, shape[-1])
        for stored, row, target in found:
            rows = matrices[target.matrix, target.start : target.start + target.rows]
            rows.copy_(stored.read(row, row + target.rows))
        return result

    def close(self) -> None:
        """Free all buffers and end the threads."""
        self.threads.shutdown()
        self.spare.clear()

    def give_back(self, tensor: torch.Tensor) -> None:
        """Return a buffer, into which the next parameter of its shape is read."""
        self.spare.setdefault(tuple(tensor.shape), []).append(tensor)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read some rows of a matrix that one stored tensor holds."""
        [(stored, row, _)] = self.stored_at(name)
        return stored.read(row + start, row + stop).float()


@contextlib.contextmanager
def streamed(model: Any, weights: Weights) -> Iterator[Any]:
    """Add hooks that load each layer's missing weights before its forward pass and free them after.

    Args:
        model: A model or PEFT model whose base weights are placeholders
            (``sft.merge.placeholders.with_placeholders``).
        weights: Reads the base's weights.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    for path, module, deep in _units(inner):
        if deep or not _by_rows(path, module, weights):
            _fill_and_empty(path, module, weights, deep)
    try:
        yield model
    finally:
        weights.close()


def _units(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """List the modules whose weights are loaded together, and whether submodules are included.

    These are whole layers, and single modules outside of layers. A module that PEFT wraps is loaded
    with its wrapper, because the wrapper may use the weights without calling the module.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    deep: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{above}.") for above in deep):
            continue
        parent = model.get_submodule(path.rpartition(".")[0]) if path else None
        is_layer = isinstance(parent, nn.ModuleList)
        if is_layer or isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            deep.append(path)
            yield path, module, True
        elif module._parameters:
            yield path, module, False


def _fill_and_empty(path: str, module: nn.Module, weights: Weights, deep: bool) -> None:
    def lacking() -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in module.named_parameters(path, recurse=deep):
            if is_placeholder(parameter):
                yield base_name(name), parameter

    held = [(name, parameter, parameter.data) for name, parameter in lacking()]

    def fill(*arguments: Any) -> None:
        tensors = weights.threads.map(weights.read, [name for name, _, _ in held])
        for (_, parameter, _), tensor in zip(held, tensors, strict=True):
            parameter.data = tensor

    def empty(*arguments: Any) -> None:
        for _, parameter, nothing in held:
            weights.give_back(parameter.data)
            parameter.data = nothing

    module.register_forward_pre_hook(fill)
    module.register_forward_hook(empty, always_call=True)


def _by_rows(path: str, module: Any, weights: Weights) -> bool:
    """Replace the forward pass of a plain embedding or head by one that reads only some rows.

    They are the largest tensors of most models.

    Returns:
        Whether the module was replaced.
    """
    if type(module) not in (nn.Embedding, nn.Linear):
        return False
    name = f"{path}.weight"
    if len(weights.stored_at(name)) != 1 or name in weights.transforms:
        return False

    def embed(ids: torch.Tensor) -> torch.Tensor:
        wanted, where = torch.unique(ids, return_inverse=True)
        table = torch.cat([weights.rows(name, row, row + 1) for row in wanted.tolist()])
        return F.embedding(where, table)

    def multiply(hidden: torch.Tensor) -> torch.Tensor:
        rows, columns = module.weight.shape
        step = max(1, CHUNK // columns)
        parts = [
            F.linear(hidden, weights.rows(name, row, min(row + step, rows)))
            for row in range(0, rows, step)
        ]
        result = torch.cat(parts, -1)
        return result if module.bias is None else result + weights.read(f"{name[:-6]}bias")

    module.forward = embed if type(module) is nn.Embedding else multiply
    return True
