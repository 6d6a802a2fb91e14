"""Commands on processes that need not import the libraries: forked from one that has.

Importing takes each rank seven seconds of a core, and what a test trains one or two. So this is for
tests of what comes out of a run. Tests of how a command starts, restarts or ends start it as a user
does, with ``run_sft`` or torchrun; only so do ranks differ in their hash seed, too.
"""

import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import warm_python
from support import quick

TIMEOUT = 300  # seconds


def run_warm(
    command: str, *overrides: str, ranks: int = 1, cwd: Path, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m sft.<command>``, or a script, with as many ranks as torchrun would start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    what = [command] if command.endswith(".py") else ["-m", f"sft.{command}"]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        processes = []
        for rank in range(ranks):
            own = {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            start = [warm_python.executable(), *what, *quick(command, overrides)]
            environ = {**os.environ, **own}
            processes.append(
                subprocess.Popen(start, cwd=cwd, env=environ, stdout=out, stderr=error)
            )
        code = _ended(processes)
        said = []
        for file in (out, error):
            file.seek(0)
            said.append(file.read())
    if check:
        assert code == 0, said[0] + said[1]
    return subprocess.CompletedProcess([command, *overrides], code, *said)


def _ended(processes: list[subprocess.Popen[bytes]]) -> int:
    """Wait for all; where one fails, end the others as torchrun does and give its exit code."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while None in (codes := [process.poll() for process in processes]) and not any(codes):
            assert time.monotonic() < deadline, f"still running after {TIMEOUT} seconds"
            time.sleep(0.02)
        return next((code for code in codes if code), 0)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
