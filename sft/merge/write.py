"""Write the merged weights: threads read, change and write a few rows at a time.

The kernel copies unchanged bytes from file to file. Changed rows are read, converted to float32,
changed and rounded once, in tiles that fit into a core's cache. As many files as there are threads
are written in turn, because the kernel lets only one thread at a time write into a file. Meanwhile,
other threads flush the written bytes to the disk.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sft.merge.base_files import FLOATS, Stored
from sft.merge.layout import File, Layout, Output, Part, itemsize

Tick = Callable[[int], object]  # called with the number of bytes that were written
TILE = 1 << 18  # numbers, 1.5 MiB of buffers: smaller ones cost more calls, larger ones miss L2
CHUNK = 1 << 24  # numbers in one job of a thread
FLUSH = 8  # chunks between two flushes to the disk
COPY = 1 << 26  # bytes in one copy by the kernel
ELSEWHERE = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM}


def write(layout: Layout, folder: Path, device: torch.device, tick: Tick) -> None:
    """Write all files, and wait until they are on the disk.

    Args:
        layout: The files to write.
        folder: The folder to write into; it exists.
        device: The device that computes the change.
        tick: Called with the number of bytes that were written.

    Raises:
        OSError: The disk is full, or fails.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each of our threads computes its own tile
    with contextlib.ExitStack() as handles:  # closed last, when no thread writes any more
        workers, disk = ThreadPoolExecutor(threads), ThreadPoolExecutor(threads)
        writer = _Writer(folder, device, tick, workers, threads, handles)
        try:
            ends = [disk.submit(_finish, *found) for found in _in_turn(layout, writer, threads)]
            _wait(as_completed(ends))
        finally:
            workers.shutdown(cancel_futures=True)
            disk.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _in_turn(
    layout: Layout, writer: _Writer, many: int
) -> Iterator[tuple[int, list[Future[None]]]]:
    """Submit the chunks of ``many`` files at a time, in turn; then yield the file."""
    waiting = iter(layout.files)
    active = collections.deque(map(writer.start, itertools.islice(waiting, many)))
    while active:
        handle, chunks, steps = active.popleft()
        if next(steps, None) is not None:
            active.append((handle, chunks, steps))
            continue
        yield handle, chunks
        active.extend(map(writer.start, itertools.islice(waiting, 1)))


@dataclass
class _Writer:
    """Submits the chunks of files to threads.

    Attributes:
        folder: The folder of the files.
        device: The device that computes the change.
        tick: Called with the number of bytes that were written.
        workers: The pool of threads.
        threads: The number of threads.
        handles: Closes the files.
        pending: Chunks of all files that may not have been written yet.
    """

    folder: Path
    device: torch.device
    tick: Tick
    workers: ThreadPoolExecutor
    threads: int
    handles: contextlib.ExitStack
    pending: list[Future[None]] = field(default_factory=list)

    def start(self, file: File) -> tuple[int, list[Future[None]], Iterator[int]]:
        """Create a file; each step of the iterator submits a chunk and adds it to the list."""
        handle = os.open(self.folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        self.handles.callback(os.close, handle)
        head = file.header()
        os.ftruncate(handle, len(head) + file.size)
        os.pwrite(handle, head, 0)
        chunks: list[Future[None]] = []
        return handle, chunks, self._steps(file, handle, len(head), chunks)

    def _steps(
        self, file: File, handle: int, offset: int, chunks: list[Future[None]]
    ) -> Iterator[int]:
        def submit(function: Callable[..., None], *arguments: object) -> int:
            chunks.append(self.workers.submit(function, *arguments))
            self.pending.append(chunks[-1])
            return len(chunks)

        for output in file.outputs:
            if output.is_copy:
                for start in range(0, output.size, COPY):
                    yield submit(_copy, output.stored, start, handle, offset, self.tick)
            elif output.whole is None:
                job = _Job(output, None, handle, offset, self.device, self.tick)
                for part in output.parts:
                    for rows in job.chunks(part):
                        yield submit(job.run, *rows)
            else:
                yield self._submit_whole(output, output.whole, handle, offset, submit)
            offset += output.size

    def _submit_whole(
        self,
        output: Output,
        whole: Callable[[torch.Tensor], torch.Tensor],
        handle: int,
        offset: int,
        submit: Callable[..., int],
    ) -> int:
        """Apply the function of a whole matrix; only one such matrix is in memory at a time."""
        _wait(self.pending)
        self.pending.clear()
        torch.set_num_threads(self.threads)
        matrix = whole(output.stored.read(0, output.stored.rows)).float()
        torch.set_num_threads(1)
        job = _Job(output, matrix, handle, offset, self.device, self.tick)
        return max(submit(job.run, *rows) for part in output.parts for rows in job.chunks(part))


def _wait(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()


def _finish(handle: int, chunks: list[Future[None]]) -> None:
    """Wait for a file's chunks, and flush after every few, so that little remains at the end."""
    for count, chunk in enumerate(chunks, 1):
        chunk.result()
        if count % FLUSH == 0:
            os.fdatasync(handle)
    os.fsync(handle)


def _copy(stored: Stored, start: int, handle: int, offset: int, tick: Tick) -> None:
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
class _Job:
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

    def chunks(self, part: Part) -> list[tuple[Part, int, int, torch.Tensor | None]]:
        """Split a part into the arguments of ``run``, ``CHUNK`` numbers each."""
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
        buffer = room["bytes"][: step * columns * size]
        # The result overwrites the bytes that were read, which saves cache: they are float32 now.
        rounded = buffer.view(FLOATS[self.output.dtype]).view(step, columns)
        for row in range(start, stop, step):
            rows = tile[: stop - row]
            rows.copy_(self._base(part, row, row + len(rows), room["bytes"]))
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
        """Return rows of a part before the change; ``raw`` is the buffer for reading them."""
        if part.change is not None and part.change.replaced is not None and part.piece is not None:
            own = part.change.replaced
            own = own[part.piece.matrix] if own.ndim == 3 else own
            own = own.reshape(-1, self.output.columns)[part.piece.start :]
            return own[start:stop]
        if self.matrix is not None:
            return self.matrix[part.start + start : part.start + stop]
        return self.output.stored.read(part.start + start, part.start + stop, raw)
