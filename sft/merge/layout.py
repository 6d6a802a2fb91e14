"""Plan the merged model's files, tensor by tensor, before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from sft.errors import MergeError
from sft.merge.base_files import Base, RowSlice
from sft.merge.change import Change
from sft.merge.stored import FLOATS, NAMES, SINGLE, Stored

Transform = Callable[[torch.Tensor], torch.Tensor]  # a function of a whole base matrix


@dataclass
class OutputPart:
    """Some rows of an output, and their change.

    Attributes:
        start: The first row.
        stop: The row after the last.
        target: The parameter and its rows; None if the model has no such parameter.
        change: None if the base's rows stay as they are.
    """

    start: int
    stop: int
    target: RowSlice | None
    change: Change | None


@dataclass
class Output:
    """A tensor of the merged model.

    Attributes:
        name: Its name in the file.
        stored: The base's tensor.
        shape: The written shape.
        dtype: The format's name of the written dtype.
        parts: All of its rows.
        transform: Applied to the whole base matrix before the change, such as quantising and
            dequantising it; None: nothing is.
    """

    name: str
    stored: Stored
    shape: tuple[int, ...]
    dtype: str
    parts: list[OutputPart]
    transform: Transform | None = None

    @property
    def size(self) -> int:
        """Return its size in bytes."""
        return math.prod(self.shape) * itemsize(self)

    @property
    def columns(self) -> int:
        """Return the length of the last dimension; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def is_copy(self) -> bool:
        """Return whether it is an exact copy of the base's bytes."""
        return (
            self.dtype == self.stored.dtype
            and self.transform is None
            and not any(part.change for part in self.parts)
        )


def itemsize(output: Output) -> int:
    """Return the bytes of one number."""
    if output.dtype in FLOATS:
        return FLOATS[output.dtype].itemsize
    return output.stored.size // max(1, math.prod(output.stored.shape))


@dataclass
class File:
    """One file of the merged model."""

    name: str
    outputs: list[Output] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Return the size of its tensors in bytes."""
        return sum(output.size for output in self.outputs)

    def header(self) -> bytes:
        """Return the bytes before the tensors: the JSON's length and the JSON, padded to 8."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for output in self.outputs:
            entries[output.name] = {
                "dtype": output.dtype,
                "shape": list(output.shape),
                "data_offsets": [offset, offset + output.size],
            }
            offset += output.size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


@dataclass
class Layout:
    """All files of the merged weights.

    Attributes:
        files: The files to write.
        untied: Parameters that the base ties (embedding and head) become separate tensors.
    """

    files: list[File]
    untied: bool

    @property
    def size(self) -> int:
        """Return the size of all tensors in bytes."""
        return sum(file.size for file in self.files)

    @property
    def numbers(self) -> int:
        """Count the numbers of all tensors."""
        return sum(math.prod(output.shape) for file in self.files for output in file.outputs)

    def index(self) -> str | None:
        """Return the JSON index of several files; None for one file."""
        if len(self.files) == 1:
            return None
        where = {output.name: file.name for file in self.files for output in file.outputs}
        content = {"metadata": {"total_size": self.size}, "weight_map": where}
        return json.dumps(content, indent=2) + "\n"


def plan(
    base: Base,
    changes: Mapping[str, Change],
    transforms: Mapping[str, Transform],
    dtype: torch.dtype | None,
    shard_size: int | None,
    name_of: Callable[[str], str],
) -> Layout:
    """Plan the files of the merged model.

    Args:
        base: The base's files.
        changes: The changes, by parameter.
        transforms: Applied to whole matrices before the change, by parameter.
        dtype: The precision of all floating-point tensors; None: each keeps its own.
        shard_size: The largest size of a file in bytes; None: the same files as the base.
        name_of: Returns the stored name of a parameter that the base does not store.

    Raises:
        MergeError: A change cannot be expressed in the base's files.
    """
    changes = dict(changes)
    held = {target.parameter for found in base.slices.values() for target in found}
    apart = []
    for group in base.tied:
        changed = [changes.get(name, Change()) for name in group]
        if all(change.same_as(changed[0]) for change in changed):
            changes |= {name: changed[0] for name in group if group[0] in changes}
        else:
            apart += [group]
    planner = _OutputPlanner(base, changes, transforms, dtype)
    files = [
        File(path.name, [planner.output(tensor.name, tensor, None) for tensor in tensors])
        for path, tensors in base.files.items()
    ]
    for name in (name for group in apart for name in group if name not in held):
        partner = next(filter(None, map(base.stored, base.partners(name))))
        files[-1].outputs.append(planner.output(name_of(name), partner, name))
    kept = {name for group in base.tied if group not in apart for name in group}
    if lost := sorted(changes.keys() - planner.written - kept):
        how = base.rearranged.get(lost[0])
        raise MergeError(
            f"{len(lost)} changes cannot be written into the base's files, such as that of "
            f"{lost[0]}{f', whose rows {how} rearranges at load' if how else ''}\n"
            "    fix: merge it in memory, with PEFT"
        )
    for file in files:
        # The order of the safetensors library: wide numbers first, so that all are aligned.
        file.outputs.sort(key=itemsize, reverse=True)
    if shard_size is not None:
        files = _split([output for file in files for output in file.outputs], shard_size)
    elif len(files) == 1:
        files[0].name = SINGLE
    return Layout(files, bool(apart))


@dataclass
class _OutputPlanner:
    """Plans single tensors, and records which changes will be written."""

    base: Base
    changes: dict[str, Change]
    transforms: Mapping[str, Transform]
    dtype: torch.dtype | None
    written: set[str] = field(default_factory=set)

    def output(self, name: str, stored: Stored, parameter: str | None) -> Output:
        """Plan the output for a stored tensor.

        Args:
            name: The name in the merged model's file.
            stored: The base's tensor.
            parameter: Of tied parameters that become separate, the one to write; None: the one
                that the base's file names.
        """
        slices = self.base.slices[stored.name]
        if parameter is not None:
            slices = [replace(target, parameter=parameter) for target in slices]
        is_float = stored.dtype in FLOATS
        dtype = NAMES[self.dtype] if is_float and self.dtype is not None else stored.dtype
        shape, parts, start = stored.shape, [], 0
        for target in slices:
            change = self.changes.get(target.parameter)
            if change is not None:
                self.written.add(target.parameter)
                if change.replaced is not None and len(slices) == 1 and target.start == 0:
                    shape = tuple(change.replaced.shape) if len(stored.shape) < 3 else shape
                    target = replace(target, rows=math.prod(shape[:-1]))
            parts.append(OutputPart(start, start + target.rows, target, change))
            start += target.rows
        if not parts:
            parts.append(OutputPart(0, stored.rows, None, None))
        return Output(name, stored, shape, dtype, parts, self._transform(stored, slices))

    def _transform(self, stored: Stored, slices: list[RowSlice]) -> Transform | None:
        """Return the function that is applied to the whole matrix, if there is one."""
        found = [self.transforms[it.parameter] for it in slices if it.parameter in self.transforms]
        if found and (len(slices) != 1 or len(stored.shape) != 2):
            raise MergeError(
                f"{stored.name} is a part of {slices[0].parameter}, but dequantising and PiSSA's "
                "or OLoRA's initialisation need the whole matrix\n"
                "    fix: merge it in memory, with PEFT"
            )
        return found[0] if found else None


def _split(outputs: list[Output], most: int) -> list[File]:
    """Fill files one after the other; a tensor that is larger than ``most`` gets its own file."""
    files = [File("")]
    for output in outputs:
        if files[-1].outputs and files[-1].size + output.size > most:
            files.append(File(""))
        files[-1].outputs.append(output)
    for number, file in enumerate(files, 1):
        several = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file.name = several if len(files) > 1 else SINGLE
    return files
