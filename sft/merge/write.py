"""Write the files of the merged weights with several threads.

As many files as there are threads are written in turn, because the kernel lets only one thread at a
time write into a file. Meanwhile, other threads flush the written bytes to the disk.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sft.merge.jobs import COPY, RowsJob, Tick, copy
from sft.merge.layout import File, Layout, Output

FLUSH = 8  # chunks between two flushes to the disk


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
        writer = _FileWriter(folder, device, tick, workers, threads, handles)
        try:
            ends = [disk.submit(_finish, *found) for found in _in_turn(layout, writer, threads)]
            _wait(as_completed(ends))
        finally:
            workers.shutdown(cancel_futures=True)
            disk.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)


def _in_turn(
    layout: Layout, writer: _FileWriter, many: int
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
class _FileWriter:
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
                    yield submit(copy, output.stored, start, handle, offset, self.tick)
            elif output.transform is None:
                job = RowsJob(output, None, handle, offset, self.device, self.tick)
                for part in output.parts:
                    for rows in job.chunks(part):
                        yield submit(job.run, *rows)
            else:
                yield self._submit_transformed(output, output.transform, handle, offset, submit)
            offset += output.size

    def _submit_transformed(
        self,
        output: Output,
        transform: Callable[[torch.Tensor], torch.Tensor],
        handle: int,
        offset: int,
        submit: Callable[..., int],
    ) -> int:
        """Apply the function of a whole matrix; only one such matrix is in memory at a time."""
        _wait(self.pending)
        self.pending.clear()
        torch.set_num_threads(self.threads)
        matrix = transform(output.stored.read(0, output.stored.rows)).float()
        torch.set_num_threads(1)
        job = RowsJob(output, matrix, handle, offset, self.device, self.tick)
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
