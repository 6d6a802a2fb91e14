"""Match the tensors of the base's files with the parameters of the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import MergeError
from sft.merge.stored import Stored, header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class RowSlice:
    """Rows of a stored tensor that are rows of a parameter.

    Attributes:
        parameter: The parameter's name in the model.
        matrix: The index of the matrix in a parameter of three dimensions (experts); else 0.
        start: The first row in that matrix.
        rows: The number of rows.
    """

    parameter: str
    matrix: int
    start: int
    rows: int


@dataclass
class Base:
    """The base model's files, and which rows of them are which parameters.

    Attributes:
        files: Each file's tensors, in the order of their bytes.
        slices: By stored name, the rows of parameters that the tensor's rows are, first to last;
            empty if the model has no such parameter, or if loading rearranges the rows.
        rearranged: By parameter, the operations by which loading rearranges its rows.
        tied: Lists of names that share one parameter.
        shapes: The shapes of all parameters, by name.
    """

    files: dict[Path, list[Stored]]
    slices: dict[str, list[RowSlice]]
    rearranged: dict[str, str]
    tied: list[list[str]]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, paths: Iterable[Path], model: PreTrainedModel) -> Base:
        """Read the headers, and match the tensors with the architecture's parameters.

        Args:
            paths: The safetensors files.
            model: The architecture; its weights are not read.

        Raises:
            MergeError: A file is damaged, or the files hold another architecture's weights.
        """
        files = {path: header(path) for path in paths}
        model.tie_weights()
        names: dict[int, list[str]] = {}
        shapes = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
            shapes[name] = tuple(parameter.shape)
        tied = [group for group in names.values() if len(group) > 1]
        found, rearranged = _match(model, [item for items in files.values() for item in items])
        base = cls(files, found, rearranged, tied, shapes)
        held = {target.parameter for found in base.slices.values() for target in found}
        held |= {*rearranged, *(name for group in tied if held & set(group) for name in group)}
        if lacking := sorted(shapes.keys() - held):
            raise MergeError(
                f"the base lacks {len(lacking)} tensors that its config names, such as "
                f"{lacking[0]}\n    fix: download or save the base again"
            )
        return base

    def partners(self, name: str) -> list[str]:
        """List all names of the parameter, this one included; tied ones have several."""
        return next((group for group in self.tied if name in group), [name])

    def stored(self, parameter: str) -> Stored | None:
        """Return the tensor that holds a whole parameter and nothing else; None if none does."""
        for tensors in self.files.values():
            for tensor in tensors:
                if self.slices[tensor.name] == [RowSlice(parameter, 0, 0, tensor.rows)]:
                    return tensor
        return None


def _match(
    model: PreTrainedModel, stored: Iterable[Stored]
) -> tuple[dict[str, list[RowSlice]], dict[str, str]]:
    """Map stored tensors to parameters as Transformers renames and converts them at load.

    Returns:
        ``slices`` and ``rearranged`` of Base.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    conversions = get_model_conversion_mapping(model)
    renamings = [item for item in conversions if isinstance(item, WeightRenaming)]
    converters = [item for item in conversions if isinstance(item, WeightConverter)]
    by_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, list[RowSlice]] = {}
    rearranged: dict[str, str] = {}
    groups: dict[str, dict[str, list[Stored]]] = {}
    for tensor in sorted(stored, key=lambda tensor: dot_natural_key(tensor.name)):
        name, pattern = rename_source_key(
            tensor.name, renamings, converters, model.base_model_prefix, state
        )
        if name not in state and tensor.name in state:
            name, pattern = tensor.name, None
        if name not in state:
            found[tensor.name] = []
        elif pattern is None:
            found[tensor.name] = _whole(name, tensor, state[name])
        else:
            groups.setdefault(name, {}).setdefault(pattern, []).append(tensor)
    for name, group in groups.items():
        converter = by_pattern[next(iter(group))]
        ordered = [group[pattern] for pattern in converter.source_patterns if pattern in group]
        first = converter.target_patterns[0]
        targets = [name.replace(first, target) for target in converter.target_patterns]
        matched, how = _converted(converter.operations, targets, ordered, state)
        found |= matched
        rearranged |= dict.fromkeys(targets, how) if how else {}
    return found, rearranged


def _whole(name: str, tensor: Stored, shape: tuple[int, ...]) -> list[RowSlice]:
    if tensor.shape != shape:
        raise MergeError(
            f"{tensor.name} has the shape {tensor.shape} in {tensor.file.name}, and {shape} in the "
            "model that its config names\n    fix: download or save the base again"
        )
    matrices, rows = (shape[0], shape[1]) if len(shape) == 3 else (1, tensor.rows)
    return [RowSlice(name, matrix, 0, rows) for matrix in range(matrices)]


def _converted(
    operations: list[Any],
    targets: list[str],
    ordered: list[list[Stored]],
    state: dict[str, tuple[int, ...]],
) -> tuple[dict[str, list[RowSlice]], str]:
    """Map rows through conversions that only stack, join or split rows.

    Returns:
        The slices by stored name, and the names of the operations that rearrange rows; "" if none.
    """
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in operations]
    tensors = [tensor for items in ordered for tensor in items]
    found: dict[str, list[RowSlice]] = {}
    start = 0
    if steps in ([("MergeModulelist", 0)], [("MergeModulelist", 0), ("Concatenate", 1)]):
        for items in ordered:
            for matrix, tensor in enumerate(items):
                found[tensor.name] = [RowSlice(targets[0], matrix, start, tensor.rows)]
            start += items[0].rows
    elif steps == [("Concatenate", 0)] and len(tensors[0].shape) == 2:
        for tensor in tensors:
            found[tensor.name] = [RowSlice(targets[0], 0, start, tensor.rows)]
            start += tensor.rows
    elif steps in ([("Chunk", 0)], [("Split", 0)]) and len(tensors[0].shape) == 2:
        found[tensors[0].name] = [RowSlice(name, 0, 0, state[name][0]) for name in targets]
    else:
        return {tensor.name: [] for tensor in tensors}, " and ".join(step for step, _ in steps)
    return found, ""
