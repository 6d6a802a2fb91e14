"""What one thread does at a time: copy bytes of a tensor, or compute and write some of its rows.

The kernel copies unchanged bytes from file to file. Changed rows are read, converted to float32,
changed and rounded once, in tiles that fit into a core's cache.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sft.merge.layout import Output, OutputPart, itemsize
from sft.merge.stored import FLOATS, Stored

Tick = Callable[[int], object]  # called with the number of bytes that were written
TILE = 1 << 18  # numbers, 1.5 MiB of buffers: smaller ones cost more calls, larger ones miss L2
CHUNK = 1 << 24  # numbers in one job of a thread
COPY = 1 << 26  # bytes in one copy by the kernel
ELSEWHERE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


def copy(stored: Stored, start: int, handle: int, offset: int, tick: Tick) -> None:
    """Copy up to ``COPY`` bytes of a tensor, within the kernel if the file systems allow it."""
    left = min(COPY, stored.size - start)
    tick(left)
    read, written = stored.offset + start, offset + start
    with stored.file.open("rb") as source:
        while left:
            try:
                done = os.copy_file_range(source.fileno(), handle, left, read, written)
            except OSError as error:
                if error.errno not in ELSEWHERE:
                    raise
                done = os.pwrite(handle, os.pread(source.fileno(), min(left, TILE), read), written)
            if not done:
                raise OSError(errno.EIO, "ended early", str(stored.file))
            left, read, written = left - done, read + done, written + done


def _put(handle: int, buffer: torch.Tensor, offset: int) -> None:
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done


class _Room(threading.local):
    """A thread's buffers, allocated once: new memory for each tile would cost more than sums do."""

    def __init__(self) -> None:
        self.numbers = 0
        self.tensors: dict[str, torch.Tensor] = {}

    def of(self, numbers: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Return two float32 buffers of ``numbers``, and one for the bytes of a read or write."""
        if numbers > self.numbers or self.tensors["tile"].device.type != device.type:
            self.numbers = numbers
            self.tensors = {
                "tile": torch.empty(numbers, device=device),
                "scratch": torch.empty(numbers, device=device),
                "bytes": torch.empty(8 * numbers, dtype=torch.uint8),
            }
        return {
            "tile": self.tensors["tile"][:numbers],
            "scratch": self.tensors["scratch"][:numbers],
            "bytes": self.tensors["bytes"],
        }


_room = _Room()


@dataclass
class RowsJob:
    """Computes and writes the rows of one tensor.

    Attributes:
        output: The tensor to write.
        matrix: The result of the function of a whole matrix; None: rows are read from the file.
        handle: The descriptor of the file that is written.
        offset: The tensor's position in that file.
        device: The device that computes the change.
        tick: Called with the number of bytes that were written.
    """

    output: Output
    matrix: torch.Tensor | None
    handle: int
    offset: int
    device: torch.device
    tick: Tick

    def chunks(self, part: OutputPart) -> list[tuple[OutputPart, int, int, torch.Tensor | None]]:
        """Split a part into the arguments of ``run``, ``CHUNK`` numbers each."""
        rows = part.stop - part.start
        factor = None
        if part.change is not None:
            part.change.to(self.device)
            factor = part.change.column_factor(lambda *some: self._base(part, *some), rows, TILE)
        step = max(1, CHUNK // self.output.columns)
        return [(part, start, min(start + step, rows), factor) for start in range(0, rows, step)]

    def run(self, part: OutputPart, start: int, stop: int, factor: torch.Tensor | None) -> None:
        """Compute and write rows ``start`` to ``stop`` of a part."""
        columns, size = self.output.columns, itemsize(self.output)
        step = max(1, (TILE if self.device.type == "cpu" else CHUNK) // columns)
        room = _room.of(step * columns, self.device)
        tile, scratch = (room[name].view(step, columns) for name in ("tile", "scratch"))
        buffer = room["bytes"][: step * columns * size]
        # The result overwrites the bytes that were read, which saves cache: they are float32 now.
        rounded = buffer.view(FLOATS[self.output.dtype]).view(step, columns)
        for row in range(start, stop, step):
            rows = tile[: stop - row]
            rows.copy_(self._base(part, row, row + len(rows), room["bytes"]))
            if part.change is not None and part.target is not None:
                first = part.target.start + row
                part.change.apply(rows, part.target.matrix, first, factor, scratch)
            rounded[: len(rows)].copy_(rows)
            done = len(rows) * columns * size
            _put(self.handle, buffer[:done], self.offset + (part.start + row) * columns * size)
            self.tick(done)

    def _base(
        self, part: OutputPart, start: int, stop: int, raw: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return rows of a part before the change; ``raw`` is the buffer for reading them."""
        if part.change is not None and part.change.replaced is not None and part.target is not None:
            own = part.change.replaced
            own = own[part.target.matrix] if own.ndim == 3 else own
            own = own.reshape(-1, self.output.columns)[part.target.start :]
            return own[start:stop]
        if self.matrix is not None:
            return self.matrix[part.start + start : part.start + stop]
        return self.output.stored.read(part.start + start, part.start + stop, raw)
