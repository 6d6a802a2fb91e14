"""What a user sees on a terminal: real commands on a pseudo-terminal, Ctrl-C included."""

import fcntl
import os
import pty
import re
import select
import socket
import subprocess
import termios
import time
from pathlib import Path

import warm_python
from support import records, shown
from warm import run_warm

DEMO = ("output_dir=run", "train.max_steps=60", "train.logging_steps=5", "dataset.exact_match=0")


class Terminal:
    """A pseudo-terminal of 100 columns, on which commands run in the foreground."""

    def __init__(self) -> None:
        self.master, self.slave = pty.openpty()
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, b"\x28\x00\x64\x00\x00\x00\x00\x00")
        self.text = ""

    def start(self, words: list[str], cwd: Path, **environ: str) -> subprocess.Popen[bytes]:
        """Start a command of sft that this terminal controls."""

        def control() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        return subprocess.Popen(
            [warm_python.executable(), "-m", *words],
            cwd=cwd,
            env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", **environ},
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            preexec_fn=control,
        )

    def wait_for(self, pattern: str) -> None:
        """Read until the screen shows a text."""
        deadline = time.monotonic() + 100
        while not any(re.search(pattern, line) for line in shown(self.text)):
            assert time.monotonic() < deadline, self.text[-3000:]
            self.read(0.1)

    def read(self, wait: float = 0.0) -> None:
        """Take what was written, and wait so many seconds for the first of it."""
        while select.select([self.master], [], [], wait)[0]:
            self.text += os.read(self.master, 1 << 16).decode(errors="replace")
            wait = 0.0

    def end(self, children: list[subprocess.Popen[bytes]]) -> list[int]:
        """Read until the commands have ended."""
        while any(child.poll() is None for child in children):
            self.read(0.1)
        self.read()
        return [child.returncode for child in children]


def test_ctrl_c_while_training_and_the_closing_lines_of_both_starts(tmp_path: Path) -> None:
    terminal = Terminal()
    child = terminal.start(["sft.train", *DEMO], tmp_path)
    terminal.wait_for(r"^training +\d+%\|.*\| [1-9]\d*/60 steps, \d\d:\d\d left, loss \d\.\d{4}")
    os.write(terminal.master, b"\x03")
    assert terminal.end([child]) == [130]
    lines = shown(terminal.text)
    assert lines[-1] == "" and not any("training " in line or "^C" in line for line in lines)
    assert any(line.startswith("SIGINT: the run stops after it has saved") for line in lines)
    [saved] = (tmp_path / "run").glob("checkpoint-*")
    step = int(saved.name.partition("-")[2])
    [kept] = [line for line in lines if line.startswith("    saved ")]
    logged = 5 * (step // 5)
    assert re.fullmatch(
        rf"    saved     run/{saved.name}, step {step}; the loss was \d\.\d{{4}} at step {logged}",
        kept,
    )
    [further] = [line for line in lines if line.startswith("    to go on  ")]
    assert further.endswith(" -m sft.train " + " ".join(DEMO))
    assert lines[-2].startswith(f"error: stopped by SIGINT after step {step}, which is saved")

    result = run_warm("train", *DEMO, "--json", cwd=tmp_path)
    assert result.stdout.startswith('{"run": "run", "status": "finished"')
    assert len(result.stdout.splitlines()) == 1
    closing = result.stderr.partition("finished in ")[2].splitlines()
    assert re.match(r".* 2 starts: 60 steps, \d[\d,]+ tokens", closing[0])
    tokens = max(record.get("num_tokens", 0) for record in records(tmp_path / "run"))
    assert f" {tokens:,.0f} tokens" in closing[0]
    rows = re.findall(r"^    (\S+(?: \S+)*)  +(.*)$", "\n".join(closing[1:]), re.MULTILINE)
    table = dict(rows)
    last = [record for record in records(tmp_path / "run") if "eval_loss" in record][-1]
    assert last["step"] == 60
    best = f"{last['eval_loss']:.4f} at step 60, the last and the best"
    assert table["eval loss"] == f"{best}; the weights of step 60 are written"
    assert (table["adapter"], table["metrics"]) == ("run/adapter", "run/metrics.jsonl")
    assert table["checkpoints"].endswith("run/checkpoint-60")
    assert table["next"] == "sft generate run=run prompt='...'"
    assert closing[-1].strip().startswith("sft ")


def test_two_ranks_on_one_terminal_have_one_bar(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    terminal = Terminal()
    words = ["sft.train", *(word.replace("=60", "=10") for word in DEMO)]
    children = []
    for rank in range(2):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        own |= {"LOCAL_WORLD_SIZE": "2", "SFT_CACHE_DIR": str(tmp_path / "cache")}
        children.append(
            subprocess.Popen(
                [warm_python.executable(), "-m", *words],
                cwd=tmp_path,
                env={**os.environ, "TERM": "xterm", "OMP_NUM_THREADS": "1", **group, **own},
                stdout=terminal.slave,
                stderr=terminal.slave,
            )
        )
    assert terminal.end(children) == [0, 0]
    bars = re.findall(r"training +(\d+)%\|", terminal.text)
    assert bars and sorted(map(int, bars)) == list(map(int, bars))
    lines = shown(terminal.text)
    assert not any("training " in line for line in lines) and lines[-1] == ""
    assert sum("step 10/10  loss" in line for line in lines) == 1
