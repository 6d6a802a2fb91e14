"""Writing the merged weights: many rows at once by several threads, none of them kept.

Bytes that nothing changes are copied by the kernel from file to file. Changed rows are read, made
float32, changed and rounded once, a tile of the size of a processor's cache at a time. While a file
is on its way to the disk, the next is written.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from sft.merge.files import FLOATS, Stored
from sft.merge.layout import File, Layout, Output, Part, itemsize

Tick = Callable[[int], object]  # is told of bytes that were written
TILE = 1 << 19  # numbers; smaller ones cost more calls, larger ones more of the caches
CHUNK = 1 << 24  # numbers that one thread takes at once
FLUSH = 8  # chunks after which the disk is waited for
COPY = 1 << 26  # bytes that the kernel copies at once
ELSEWHERE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


def write(layout: Layout, folder: Path, device: torch.device, tick: Tick) -> None:
    """Write all files, and wait until they are on the disk.

    Args:
        layout: What is written.
        folder: Where to; it exists.
        device: Where the sums are made.
        tick: Is told of bytes that were written.

    Raises:
        OSError: The disk is full, or fails.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each of our threads works on a tile of its own
    workers, disk = ThreadPoolExecutor(threads), ThreadPoolExecutor(1)
    try:
        ends = []
        for file in layout.files:
            handle, chunks = _start(file, folder / file.name, device, tick, workers, threads)
            ends.append(disk.submit(_finish, handle, chunks))
        _wait(ends)
    finally:
        workers.shutdown(cancel_futures=True)
        disk.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _start(
    file: File,
    path: Path,
    device: torch.device,
    tick: Tick,
    workers: ThreadPoolExecutor,
    threads: int,
) -> tuple[int, list[Future[None]]]:
    """Hand the parts of a file to the threads."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    head = file.header()
    os.ftruncate(handle, len(head) + file.size)
    os.pwrite(handle, head, 0)
    offset, chunks = len(head), []
    for output in file.outputs:
        if output.is_copy:
            chunks += [
                workers.submit(_copy, output.stored, start, handle, offset, tick)
                for start in range(0, output.size, COPY)
            ]
        else:
            matrix = None
            if output.whole is not None:
                _wait(chunks)  # so that one such matrix is in memory at a time
                torch.set_num_threads(threads)
                matrix = output.whole(output.stored.read(0, output.stored.rows)).float()
                torch.set_num_threads(1)
            job = _Job(output, matrix, handle, offset, device, tick)
            for part in output.parts:
                chunks += [workers.submit(job.run, *rows) for rows in job.chunks(part)]
            if matrix is not None:
                _wait(chunks)
        offset += output.size
    return handle, chunks


def _wait(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _finish(handle: int, chunks: list[Future[None]]) -> None:
    """Wait for a file's chunks; the disk gets some at a time, so that little is left at the end."""
    try:
        for count, chunk in enumerate(chunks, 1):
            chunk.result()
            if count % FLUSH == 0:
                os.fdatasync(handle)
        os.fsync(handle)
    finally:
        for chunk in chunks:  # after a failure; none may write into what has this number next
            chunk.cancel()
        wait(chunks)
        os.close(handle)


def _copy(stored: Stored, start: int, handle: int, offset: int, tick: Tick) -> None:
    """Copy some bytes of a tensor, within the kernel where the file systems allow it."""
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
    """What a thread works in, made once: new memory for each tile would cost more than the sums."""

    def __init__(self) -> None:
        self.numbers = 0
        self.tensors: dict[str, torch.Tensor] = {}

    def of(self, numbers: int, device: torch.device) -> dict[str, torch.Tensor]:
        """Give room for so many: two of float32, and bytes to read and to write."""
        if numbers > self.numbers or self.tensors["tile"].device.type != device.type:
            self.numbers = numbers
            self.tensors = {
                "tile": torch.empty(numbers, device=device),
                "scratch": torch.empty(numbers, device=device),
                "read": torch.empty(8 * numbers, dtype=torch.uint8),
                "written": torch.empty(8 * numbers, dtype=torch.uint8),
            }
        return {
            "tile": self.tensors["tile"][:numbers],
            "scratch": self.tensors["scratch"][:numbers],
            "read": self.tensors["read"],
            "written": self.tensors["written"],
        }


_room = _Room()


@dataclass
class _Job:
    """The rows of one tensor that is computed.

    Attributes:
        output: What is written.
        matrix: The base's, where it went through something as a whole; None: read from its file.
        handle: Of the file that is written.
        offset: Of the tensor in it.
        device: Where the sums are made.
        tick: Is told of bytes.
    """

    output: Output
    matrix: torch.Tensor | None
    handle: int
    offset: int
    device: torch.device
    tick: Tick

    def chunks(self, part: Part) -> list[tuple[Part, int, int, torch.Tensor | None]]:
        """Cut a part into what one thread takes at once."""
        rows = part.stop - part.start
        factor = None
        if part.change is not None:
            part.change.to(self.device)
            factor = part.change.column_factor(lambda *some: self._base(part, *some), rows, TILE)
        step = max(1, CHUNK // self.output.columns)
        return [(part, start, min(start + step, rows), factor) for start in range(0, rows, step)]

    def run(self, part: Part, start: int, stop: int, factor: torch.Tensor | None) -> None:
        """Compute and write rows ``start`` to ``stop`` of a part."""
        columns, size = self.output.columns, itemsize(self.output)
        step = max(1, (TILE if self.device.type == "cpu" else CHUNK) // columns)
        room = _room.of(step * columns, self.device)
        tile, scratch = (room[name].view(step, columns) for name in ("tile", "scratch"))
        buffer = room["written"][: step * columns * size]
        rounded = buffer.view(FLOATS[self.output.dtype]).view(step, columns)
        for row in range(start, stop, step):
            rows = tile[: stop - row]
            rows.copy_(self._base(part, row, row + len(rows), room["read"]))
            if part.change is not None and part.piece is not None:
                place = part.piece.start + row
                part.change.apply(rows, part.piece.matrix, place, factor, scratch)
            rounded[: len(rows)].copy_(rows)
            done = len(rows) * columns * size
            _put(self.handle, buffer[:done], self.offset + (part.start + row) * columns * size)
            self.tick(done)

    def _base(
        self, part: Part, start: int, stop: int, raw: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Give rows of a part as they are before they are changed; raw is room to read them."""
        if part.change is not None and part.change.replaced is not None and part.piece is not None:
            own = part.change.replaced
            own = own[part.piece.matrix] if own.ndim == 3 else own
            own = own.reshape(-1, self.output.columns)[part.piece.start :]
            return own[start:stop]
        if self.matrix is not None:
            return self.matrix[part.start + start : part.start + stop]
        return self.output.stored.read(part.start + start, part.start + stop, raw)
