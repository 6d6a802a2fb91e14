"""Run a shell command in a session of its own, and end all of it after a time limit.

``alerts`` starts this file as a script, so that the limit holds after the run itself has ended.
"""

import os
import signal
import subprocess
import sys

LATE = 124  # the exit code of a command that was ended, as that of timeout(1)


def run(limit: float, command: str) -> int:
    """Run the command, and return its exit code."""
    running = subprocess.Popen(command, shell=True, start_new_session=True)
    try:
        return running.wait(limit)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        sys.stderr.write(f"it was ended after {limit:g} seconds\n")
        return LATE


if __name__ == "__main__":
    sys.exit(run(float(sys.argv[1]), sys.argv[2]))
