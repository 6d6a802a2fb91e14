"""Compile locks: those of the dead are removed, those of the living are not."""

import subprocess
import sys
from pathlib import Path

HOLD = """
import sys
from pathlib import Path
from sft.environment import free_compile_locks
free_compile_locks(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_compile_locks_of_the_dead_are_removed(tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    assert not lock.exists()
    lock.touch()  # the first compiles now
    second = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    assert second.stdout == "held\n"
    assert lock.exists()
    first.kill()
    first.wait()
    subprocess.run(command, input="", capture_output=True, check=True)
    assert not lock.exists()
