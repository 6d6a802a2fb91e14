"""One trial of a sweep: a new torchrun, how it is interrupted, and the result that it left.

Trials do not share a process: DeepSpeed's global state would leak from one trial into the next, and
when a rank fails, the other ranks wait in a collective that the next trial's would match.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft.config import saved
from sft.config.compare import training_settings
from sft.config.settings import Config, fill_names

logger = logging.getLogger("sft")

# Seconds in which an interrupted trial must end by itself; torchrun kills its ranks after 30.
GRACE = 40
# Environment variables that torchrun sets for its ranks, or reads itself (PET_*).
TORCHRUN_VARIABLE = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|(TORCHELASTIC|PET)_.*|TORCH_NCCL_ASYNC_ERROR_HANDLING|SFT_ERROR_FILE"
)
# The line at which a trial's own output ends and torchrun's report of the failure begins.
TORCHRUN_EPILOGUE = re.compile(r"^E\d{4} .*\] failed \(exitcode: (-?\d+)\)", re.MULTILINE)
TORCHRUN_LINE = re.compile(r"[IWE]\d{4} .*torch/")


@dataclass
class Trial:
    """One run of a sweep. All fields but ``command`` and ``config`` are written to sweep.json.

    Attributes:
        command: Starts the trial.
        config: The composed settings, not yet checked.
        overrides: The settings that differ between the trials, such as ``lora.r=4``.
        output_dir: The run's folder.
        log: The file that its output is appended to.
        status: ``not started``, ``finished`` or ``failed``.
        message: Why it failed, or that it was finished before this sweep.
        final: The final results in its run.json.
        seconds: Wall-clock time it took; None if it did not run.
    """

    command: list[str]
    config: dict[str, Any]
    overrides: list[str]
    output_dir: str
    log: str
    status: str = "not started"
    message: str = ""
    final: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None

    def __str__(self) -> str:
        return " ".join(self.overrides) or "(no setting is swept)"

    def train(self) -> None:
        """Train in a new process and read the result from its files.

        Raises:
            KeyboardInterrupt: The user interrupted; the trial's processes have ended.
        """
        log = Path(self.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        error_file = Path(f"{self.log.removesuffix('.log')}.error")
        error_file.unlink(missing_ok=True)
        environ = environment() | {"SFT_ERROR_FILE": str(error_file.resolve())}
        start = time.monotonic()
        with log.open("ab") as output:
            begin = output.tell()
            try:
                exit_code = _call(self.command, output, environ)
            except KeyboardInterrupt:
                self.status, self.message = "failed", "interrupted"
                error_file.unlink(missing_ok=True)
                raise
            finally:
                self.seconds = round(time.monotonic() - start, 1)
        record = self._record()
        if exit_code == 0 and record.get("status") == "finished":
            self.status, self.final = "finished", record["final"]
            return
        self.status = "failed"
        if error_file.is_file():
            self.message = error_file.read_text(encoding="utf-8").strip()
            error_file.unlink()
        elif exit_code == 0:
            self.message = f"exit code 0, but {self.output_dir}/run.json has no status finished"
        else:
            self.message = _last_words(log, begin, exit_code)

    def take_over(self) -> bool:
        """Use the results of an earlier finished run with the same settings.

        Returns:
            Whether there is such a run.
        """
        record = self._record()
        if record.get("status") != "finished" or self.config.get("overwrite"):
            return False
        before = saved.settings_of(Path(self.output_dir) / "config.yaml")
        if _settings(before) != _settings(self.config):
            return False  # the trial itself is refused, with the list of differences
        self.status, self.message, self.final = "finished", "finished before", record["final"]
        self.seconds = record.get("seconds")
        return True

    def _record(self) -> dict[str, Any]:
        file = Path(self.output_dir) / "run.json"
        record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        assert isinstance(record, dict)
        return record


def environment(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Copy the environment without the variables of an outer torchrun."""
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


def _call(command: list[str], output: IO[bytes], environ: dict[str, str]) -> int:
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environ,
        # In our session, the terminal's Ctrl-C would reach torchrun in addition to our SIGINT, and
        # the second one would end its wait for the ranks.
        start_new_session=True,
    )
    try:
        return child.wait()
    except KeyboardInterrupt:
        _stop(child)
        raise


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a trial's processes. A second Ctrl-C is ignored: it would leave ranks running."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    logger.info("interrupted: this trial is stopped, which takes up to %s seconds", GRACE)
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


def _settings(values: Any) -> dict[str, Any] | None:
    """Return the settings that affect training, converted as a run does; None if invalid."""
    try:
        typed = OmegaConf.merge(OmegaConf.structured(Config), saved.escaped(values))
    except OmegaConfBaseException:
        return None
    config: Any = OmegaConf.to_object(typed)
    fill_names(config)
    return training_settings(dataclasses.asdict(config))


def _last_words(log: Path, begin: int, exit_code: int) -> str:
    """Report the exit code and the last line of the trial's own output."""
    with log.open("rb") as file:
        file.seek(begin)
        text = file.read().decode("utf-8", errors="replace")
    epilogue = TORCHRUN_EPILOGUE.search(text)
    if epilogue:
        text, exit_code = text[: epilogue.start()], int(epilogue[1])
    lines = [line.strip() for line in text.splitlines()]
    own = [line for line in lines if line and not TORCHRUN_LINE.match(line)]
    return f"exit code {exit_code}; last line: {own[-1]}" if own else f"exit code {exit_code}"
