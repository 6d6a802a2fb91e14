"""Many tensors in numbered safetensors files: a file is written when full, a tensor read alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

OPTIMIZER = "optimizer-{:05d}.safetensors"
# A file is written at this size, so that memory never holds a second copy of the state.
SHARD_BYTES = 4 << 30


class Writer:
    """Writes tensors to numbered files, each as soon as it is full."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = self.bytes = 0
        self.tensors: dict[str, torch.Tensor] = {}

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Copy a tensor to the CPU; write a file when its size reaches SHARD_BYTES."""
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        self.tensors[key] = tensor
        self.bytes += tensor.nbytes
        if self.bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the tensors that are not written yet."""
        if self.tensors:
            self.files += 1
            save_file(self.tensors, self.folder / OPTIMIZER.format(self.files))
            self.tensors, self.bytes = {}, 0


class Reader:
    """Reads the tensors of all files by their keys, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.files: list[Any] = [
            safe_open(path, "pt") for path in sorted(folder.glob(OPTIMIZER.replace("{:05d}", "*")))
        ]
        self.where = {key: file for file in self.files for key in file.keys()}

    def __getitem__(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self.where[key].get_tensor(key)
        return tensor
