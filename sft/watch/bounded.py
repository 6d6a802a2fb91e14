"""Run a shell command in a session of its own, and end all of it after a time limit.

``alerts`` starts this file as a script, so that the limit holds after the run itself has ended.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

LATE = 124  # the exit code of a command that was ended, as that of timeout(1)
MOST = 4096  # bytes of what it writes to stderr, the last ones: it must not fill a disk


def run(limit: float, command: str) -> int:
    """Run the command, write the end of its stderr to this one, and return its exit code."""
    deadline = time.monotonic() + limit
    running = subprocess.Popen(
        command, shell=True, start_new_session=True, stderr=subprocess.PIPE, bufsize=0
    )
    said, more = b"", running.stderr
    assert more is not None
    while (left := deadline - time.monotonic()) > 0 and select.select([more], [], [], left)[0]:
        if not (part := os.read(more.fileno(), MOST)):
            break  # the command, and what it has left in the background, have closed it
        said = (said + part)[-MOST:]
    try:
        code = running.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        said, code = f"it was ended after {limit:g} seconds\n".encode(), LATE
    if time.monotonic() >= deadline:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    sys.stderr.buffer.write(said)
    return code


if __name__ == "__main__":
    sys.exit(run(float(sys.argv[1]), sys.argv[2]))
