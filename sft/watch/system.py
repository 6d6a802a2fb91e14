"""profile=system: the use of CPU, memory, disk, network and GPUs, recorded while a run goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from sft import hardware, process
from sft.files import to_json

logger = logging.getLogger("sft")

PATIENCE = 5.0  # seconds that the end of a run waits for a driver that does not answer
RELIST = 60.0  # seconds; finding the run's processes reads those of the whole machine
SHORTEST = 0.1  # seconds; over less than that, a rate says nothing


def file_of(first: Path, node: int) -> Path:
    """Return the file of a machine: that of the first, system.jsonl, or system_nodeN.jsonl."""
    return first.with_stem(f"{first.stem}_node{node}") if node else first


class System:
    """Appends the use of this machine to a file at an interval, from a thread, within a block."""

    def __init__(self, file: Path, interval: float) -> None:
        """Set up the thread.

        Args:
            file: Of JSON lines; what is there stays.
            interval: Seconds between two records.
        """
        self._file, self._interval = file, interval
        self._end = threading.Event()
        # A daemon: if a driver hangs, the process ends nevertheless.
        self._thread = threading.Thread(target=self._watch, name="profile=system", daemon=True)
        self._said: set[str] = set()

    def __enter__(self) -> System:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join(PATIENCE)

    def _watch(self) -> None:
        usage = Usage(self._say_once)
        ended = False
        while not ended:
            ended = self._end.wait(self._interval)
            try:
                if found := usage.since_last():
                    self._append(found)
            except (OSError, psutil.Error) as error:
                self._say_once(f"profile=system: {self._file} lacks a record: {error}")

    def _append(self, found: dict[str, Any]) -> None:
        """Write a line at once: a loader worker that is forked meanwhile must not hold half."""
        line = f"{to_json(found)}\n".encode()
        with self._file.open("ab+", buffering=0) as file:
            if file.tell():  # a run that was killed may have left half a line
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            logger.warning(line)


class Usage:
    """Measures the use of this machine since the previous call."""

    def __init__(self, say: Callable[[str], None]) -> None:
        """Start to measure.

        Args:
            say: Is given a line about a figure that cannot be read.
        """
        self._say = say
        # torchrun is the parent of all ranks of this machine.
        self._root = psutil.Process(os.getppid() if process.from_torchrun() else os.getpid())
        self._family: list[psutil.Process] = []
        self._listed = -RELIST
        self._gpus = 0
        if torch.cuda.is_available():
            self._gpus = min(process.local_world_size(), torch.cuda.device_count())
        psutil.cpu_percent()  # the first call measures nothing
        self._counted, self._at = counters(), time.monotonic()

    def since_last(self) -> dict[str, Any]:
        """Measure; empty if the previous call was a moment ago.

        Returns:
            ``time``: seconds since 1970. ``cpu``: share of all cores. ``memory``: bytes of the
            run's processes. ``memory_free``: bytes. Bytes per second: ``disk_read``,
            ``disk_written``, ``network_sent``, ``network_received``; null where they are not
            counted. ``gpus``: of each that the run uses.
        """
        now = time.monotonic()
        seconds = now - self._at
        if seconds < SHORTEST:
            return {}
        if now - self._listed >= RELIST:
            self._family = [self._root, *self._root.children(recursive=True)]
            self._listed = now
        counted, before = counters(), self._counted
        self._counted, self._at = counted, now
        return {
            "time": round(time.time(), 3),
            "cpu": round(psutil.cpu_percent() / 100, 4),
            "memory": memory_of(self._family),
            "memory_free": hardware.free_memory(),
            **{name: rate(count, before.get(name), seconds) for name, count in counted.items()},
            "gpus": [self._gpu(number) for number in range(self._gpus)],
        }

    def _gpu(self, number: int) -> dict[str, float | None]:
        """Read a GPU: share of the time in which it computed, bytes in use, watts."""
        cuda = torch.cuda
        return {
            "utilisation": self._read(cuda.utilization, number, 0.01),
            "memory": self._read(cuda.device_memory_used, number, 1),
            "power": self._read(cuda.power_draw, number, 0.001),
        }

    def _read(self, ask: Callable[[int], int], number: int, unit: float) -> float | None:
        """Read a figure of the driver; None if it does not tell, as for a part of a GPU (MIG)."""
        try:
            return round(ask(number) * unit, 3)
        # NVML's errors have no base class but Exception, and its package may be missing.
        except Exception as error:
            self._say(f"profile=system: {ask.__name__} of GPU {number} is not known: {error}")
            return None


def counters() -> dict[str, int | None]:
    """Count the bytes that the disks and the network have moved, without the machine's own."""
    disk, cards = None, None
    hidden = (NotImplementedError, OSError)  # in some containers
    with contextlib.suppress(*hidden):
        disk = psutil.disk_io_counters()
    with contextlib.suppress(*hidden):
        every = psutil.net_io_counters(pernic=True)
        cards = [card for name, card in every.items() if name != "lo"]
    return {
        "disk_read": disk.read_bytes if disk else None,
        "disk_written": disk.write_bytes if disk else None,
        "network_sent": sum(card.bytes_sent for card in cards) if cards else None,
        "network_received": sum(card.bytes_recv for card in cards) if cards else None,
    }


def rate(count: int | None, before: int | None, seconds: float) -> int | None:
    """Return bytes per second; None if they are not counted."""
    return None if count is None or before is None else round(max(0, count - before) / seconds)


def memory_of(processes: Iterable[psutil.Process]) -> int:
    """Sum the resident bytes of processes; pages that they share count in each."""
    total = 0
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += each.memory_info().rss
    return total
