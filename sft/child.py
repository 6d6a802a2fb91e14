"""Run a command in a child process: its environment, output, interruption, and what it reports."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sft import process

logger = logging.getLogger("sft")

# Seconds in which an interrupted command must end by itself; torchrun kills its ranks after 30.
GRACE = 40
# Environment variables that torchrun sets for its ranks, or reads itself (PET_*).
TORCHRUN_VARIABLE = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    rf"|(TORCHELASTIC|PET)_.*|TORCH_NCCL_ASYNC_ERROR_HANDLING|{process.ERROR_FILE}"
)
# The line at which a command's own output ends and torchrun's report of the failure begins.
TORCHRUN_EPILOGUE = re.compile(r"^E\d{4} .*\] failed \(exitcode: (-?\d+)\)", re.MULTILINE)
TORCHRUN_LINE = re.compile(r"[IWE]\d{4} .*torch/")


@dataclass(frozen=True)
class Ended:
    """How a command ended.

    Attributes:
        exit_code: Its exit code; negative: the number of the signal that ended it.
        message: Its error as the command reported it; otherwise the exit code of the rank that
            failed, and the last line of the output in the log.
    """

    exit_code: int
    message: str


def command(module: str, ranks: int | None = None) -> list[str]:
    """Return the words that start a module of sft, by a new torchrun if ``ranks`` is given."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    return [sys.executable, "-m", *([] if ranks is None else torchrun), module]


def run(words: Sequence[str], log: Path | None = None) -> Ended:
    """Run a command to its end, apart from the ranks that this process may belong to.

    The command has a session of its own: in ours, the terminal's Ctrl-C would reach it in addition
    to our SIGINT, and torchrun's wait for its ranks would end at the second one. If this process is
    killed, Linux sends SIGTERM to the command, so that no run goes on unnoticed.

    Args:
        words: The command.
        log: The file that its output is appended to; None: it shares our output.

    Raises:
        KeyboardInterrupt: This process got SIGINT, SIGTERM or SIGHUP; the command has ended.
    """
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(log.open("ab")) if log is not None else None
        begin = output.tell() if output is not None else 0
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sft-child-")))
        reported = folder / "error"
        stack.enter_context(signals_as_interrupt())
        child = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            env=environment() | {process.ERROR_FILE: str(reported)},
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        try:
            exit_code = child.wait()
        except KeyboardInterrupt:
            _stop(child)
            raise
        if reported.is_file():
            return Ended(exit_code, reported.read_text(encoding="utf-8").strip())
    return Ended(exit_code, _last_words(log, begin, exit_code))


def _end_with_parent() -> None:
    process.end_with_parent(signal.SIGTERM)


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Copy the environment without the variables that an outer torchrun or command has set."""
    return {key: value for key, value in environ.items() if not TORCHRUN_VARIABLE.fullmatch(key)}


@contextlib.contextmanager
def signals_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM (a scheduler) and SIGHUP (a closed terminal) as Ctrl-C."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number, handler in handlers.items():
        if handler is signal.SIG_DFL:  # an ignored signal must stay ignored, as nohup needs
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End all processes of a command. A second Ctrl-C is ignored: it would leave ranks running."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    logger.info("interrupted: waiting up to %s seconds for the command to end", GRACE)
    try:
        os.killpg(child.pid, signal.SIGINT)
        child.wait(GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    except ProcessLookupError:
        child.wait()  # it ended by itself meanwhile
    finally:
        signal.signal(signal.SIGINT, handler)


def _last_words(log: Path | None, begin: int, exit_code: int) -> str:
    """Describe a failure by the exit code and, if there is a log, its last line since ``begin``."""
    text = ""
    if log is not None:
        with log.open("rb") as file:
            file.seek(begin)
            text = file.read().decode("utf-8", errors="replace")
    epilogue = TORCHRUN_EPILOGUE.search(text)
    if epilogue:
        text, exit_code = text[: epilogue.start()], int(epilogue[1])
    lines = [line.strip() for line in text.splitlines()]
    own = [line for line in lines if line and not TORCHRUN_LINE.match(line)]
    return f"exit code {exit_code}; last line: {own[-1]}" if own else f"exit code {exit_code}"
