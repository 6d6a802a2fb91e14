"""Run a command of sft with no network, a limit of memory, and a report of writes elsewhere.

It is started by ``case.run_confined`` on a warm Python, as ``confined.py MODULE WORDS...``. The
folder of the input is in HOSTILE. What a process is stopped from here, its children may do: they
are forked from the warm Python again.
"""

import ctypes
import importlib
import os
import re
import resource
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

MEMORY = 4 << 30  # bytes of address space, beyond what the warm process has
CAPABILITIES = 0x20080522  # linux/capability.h: _LINUX_CAPABILITY_VERSION_3
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.symlink": 1}
DEVICES = ("/dev/", "/proc/self/")


def confine(here: str) -> None:
    """Set the limits of this process."""
    with open("/proc/self/status") as status:
        used = int(re.search(r"VmSize:\s+(\d+) kB", status.read())[1]) << 10  # type: ignore[index]
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if size := os.environ.get("HOSTILE_FILE_BYTES"):  # a disk that is full
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(size),) * 2)
    # Root may write to any file; without capabilities, the permissions hold for it, too.
    ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)())
    tempfile.tempdir = None
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    own = tuple(dict.fromkeys([str(Path(here)), os.path.realpath(here)]))

    def watch(event: str, details: tuple[Any, ...]) -> None:
        if event == "open":
            path, flags = details[0], details[2]
            if not isinstance(flags, int) or not flags & WRITES:
                return
        elif event in CHANGES:
            path = details[CHANGES[event]]
        elif event == "socket.connect":
            outside = details[0].family not in (socket.AF_UNIX,) and not str(
                details[1][0]
            ).startswith(("127.", "localhost", "::1"))
            if outside:
                os.write(2, f"outside: connects to {details[1]}\n".encode())
                raise ConnectionRefusedError(f"no network: {details[1]}")
            return
        else:
            return
        if isinstance(path, (str, bytes, os.PathLike)):
            whole = os.path.realpath(os.fsdecode(path))
            if not whole.startswith((*own, *DEVICES)):
                os.write(2, f"outside: {event} {whole}\n".encode())

    sys.addaudithook(watch)


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    confine(os.environ["HOSTILE"])
    module, *words = sys.argv[1:]
    sys.argv = [module, *words]
    importlib.import_module(module).main(words)
