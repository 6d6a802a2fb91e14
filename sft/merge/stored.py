"""Locate the tensors of a model's safetensors files, and read rows of them.

Rows are read by their offsets instead of through a memory map: mapped pages count as this
process's memory until the file is closed, and page faults cost more than copying.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from sft.config.settings import ModelConfig
from sft.errors import MergeError
from sft.model.source import loading, source

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
NAMES = {dtype: name for name, dtype in FLOATS.items()}


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        name: Its name in the file.
        file: The file.
        offset: The position of its first byte in the file.
        size: In bytes.
        dtype: The format's name of the dtype, such as ``BF16``.
        shape: The stored shape.
    """

    name: str
    file: Path
    offset: int
    size: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def columns(self) -> int:
        """Return the length of the last dimension; a vector is one row."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Count the rows of all its matrices."""
        return math.prod(self.shape[:-1])

    def read(self, start: int, stop: int, buffer: torch.Tensor | None = None) -> torch.Tensor:
        """Read rows ``start`` to ``stop`` in the stored dtype.

        Args:
            start: The first row.
            stop: The row after the last.
            buffer: A uint8 tensor to read into; None: a new one.

        Returns:
            Shape (stop - start, columns).

        Raises:
            MergeError: The file ends before these rows.
        """
        dtype = FLOATS[self.dtype]
        width = self.columns * dtype.itemsize
        size, offset = (stop - start) * width, self.offset + start * width
        buffer = torch.empty(size, dtype=torch.uint8) if buffer is None else buffer[:size]
        view = memoryview(buffer.numpy())  # type: ignore[arg-type]
        handle = os.open(self.file, os.O_RDONLY)
        try:
            while view:  # a read may return fewer bytes than requested
                got = os.preadv(handle, [view], offset)
                if not got:
                    raise MergeError(f"{self.file} ended early\n    fix: download or copy it again")
                view, offset = view[got:], offset + got
        finally:
            os.close(handle)
        return buffer.view(dtype).view(stop - start, self.columns)


def header(file: Path) -> list[Stored]:
    """List the tensors of a safetensors file, in the order of their bytes.

    Raises:
        MergeError: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt"):  # checks the header against the file's size
            pass
    except (SafetensorError, OSError) as error:
        raise MergeError(
            f"{file} is damaged: {error}\n    fix: download or copy it again"
        ) from None
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entries = json.loads(opened.read(length))
    entries.pop("__metadata__", None)
    stored = [
        Stored(
            name,
            file,
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
            entry["dtype"],
            tuple(entry["shape"]),
        )
        for name, entry in entries.items()
    ]
    return sorted(stored, key=lambda tensor: tensor.offset)


def shards(model: ModelConfig) -> list[Path]:
    """Find the files of a model's weights, in a folder or on the hub.

    Raises:
        ModelError: There are none, or they cannot be reached.
    """
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    where = source(model)
    name, revision = where["pretrained_model_name_or_path"], where["revision"]
    with loading("weights", model):
        absent = {
            "_raise_exceptions_for_missing_entries": False,
            "_raise_exceptions_for_connection_errors": False,
        }
        index = cached_file(name, INDEX, revision=revision, **absent)
        if index is None:
            return [Path(cached_file(name, SINGLE, revision=revision))]
        files, _ = get_checkpoint_shard_files(name, index, revision=revision)
    return [Path(file) for file in files]
