"""One bad input: what is planted, which command is given, how it is run and what is asserted."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from unittest import mock

import warm_python

from sft.errors import ConfigError, Problem

LIMIT = 60  # seconds for one input
MARKER = "code-has-run"  # the file that planted code makes in the folder of its input
CONFINED = Path(__file__).with_name("confined.py")
ERROR = re.compile(r"^error: ", re.MULTILINE)
# A fix that can be given to the command as it stands, at the beginning of the text of a fix.
LITERAL = re.compile(r"(?P<quote>'?)(?P<word>[\w.]+=(?P<value>.*?))(?P=quote)(?:,? or .*| \(.*)?$")
RENAMES = re.compile("no such setting|a setting of its own|is set by sft itself|has no option")
PLACEHOLDER = re.compile(r"[A-Z]{3,}|\.\.\.|[<>]|, |\bthat\b")


def nothing(here: Path, kit: Path) -> None:
    """Plant nothing."""


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        group: The table that it is in.
        name: What is bad about it.
        command: The command's name.
        words: Its arguments; ``{here}`` is the empty folder of this input and ``{kit}`` the folder
            with the shared run.
        says: A regular expression that the message must match, so that it names the real reason.
        make: Plants files in the folder, from those of the kit.
        env: Environment variables that are added.
        accepted: The input is odd but has one clear meaning, so that it may also be accepted.
    """

    group: str
    name: str
    command: str
    words: tuple[str, ...]
    says: str = ""
    make: Callable[[Path, Path], None] = nothing
    env: Mapping[str, str] = field(default_factory=dict)
    accepted: bool = False

    @property
    def id(self) -> str:
        """Return a name that is unique in all tables."""
        return f"{self.group}: {self.name}"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, or None if the limit of time was over; its output."""

    code: int | None
    stdout: str
    stderr: str


def run_here(case: Case) -> Ended:
    """Give the words to the command's ``main`` in this process, for inputs that need no file.

    Composing and checking are the command's own; a config that passes is not run.
    """
    main = importlib.import_module(_module(case.command)).main
    command = dataclasses.replace(main, run=lambda config: None)
    sweeps = mock.patch("sft.cli.command._hand_to_hydra")  # it would train what is accepted
    out, err = io.StringIO(), io.StringIO()
    argv = sys.argv
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), sweeps:
        try:
            command(list(case.words))
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            sys.argv = argv
    return Ended(code, out.getvalue(), err.getvalue())


def run_confined(case: Case, here: Path, kit: Path) -> Ended:
    """Run the command in a process that was forked from a warm one, with limits; see confined."""
    for name in ("home", "tmp", "cache"):
        (here / name).mkdir(parents=True)
    work = here / "work"
    work.mkdir()
    case.make(work, kit)
    own = {
        **{"HOME": str(here / "home"), "TMPDIR": str(here / "tmp"), "HF_HUB_OFFLINE": "1"},
        **{"SFT_CACHE_DIR": str(here / "cache"), "OMP_NUM_THREADS": "1", "HOSTILE": str(here)},
    }
    own |= {key: value.format(here=work, kit=kit) for key, value in case.env.items()}
    environ = {key: value for key, value in {**os.environ, **own}.items() if value != "UNSET"}
    words = [word.replace("{here}", str(work)).replace("{kit}", str(kit)) for word in case.words]
    process = subprocess.Popen(
        [warm_python.executable(), str(CONFINED), _module(case.command), *words],
        cwd=work,
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = (_read(stream) for stream in (process.stdout, process.stderr))
    try:
        code: int | None = process.wait(LIMIT)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)
        process.kill()
        process.wait()
        code = None
    return Ended(code, out(), err())


def _read(stream: IO[bytes] | None) -> Callable[[], str]:
    """Read a pipe in a thread; return a function that gives what was read.

    A file would have the limit of HOSTILE_FILE_BYTES too. A process that is left over would keep a
    pipe open, so that its end is not waited for long.
    """
    assert stream is not None
    parts: list[bytes] = []

    def drain() -> None:
        while part := stream.read1(1 << 16):  # type: ignore[attr-defined]
            parts.append(part)

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()

    def text() -> str:
        thread.join(2)
        return b"".join(parts).decode(errors="replace")

    return text


def _module(command: str) -> str:
    from sft.cli.commands import COMMANDS

    return COMMANDS[command]


def faults_of(case: Case, ended: Ended, here: Path | None = None) -> list[str]:
    """List what is wrong with how a command met a bad input; empty: nothing.

    Args:
        case: The input.
        ended: How the command ended.
        here: The folder of the input; None: it ran in this process.
    """
    found = []
    code, text = ended.code, ended.stderr
    if here is not None and list(here.rglob(MARKER)):
        found.append("planted code has run")
    found += sorted(set(re.findall(r"^outside: .*", text, re.MULTILINE)))
    if "Traceback" in text + ended.stdout:
        found.append("a traceback")
    if code is None:
        return [*found, f"still running after {LIMIT} s"]
    if code < 0:
        return [*found, f"ended by signal {-code}"]
    if code == 0:
        return found if case.accepted else [*found, "accepted"]
    errors = len(ERROR.findall(text))
    if errors != 1:
        found.append(f"{errors} errors")
    if "fix: " not in text:
        found.append("no fix")
    if not re.search(case.says, text, re.DOTALL):
        found.append(f"not the reason: {case.says}")
    return found


def follow_fixes(case: Case) -> str:
    """Apply the fixes of a refusal that are overrides, until none is left.

    Returns:
        What is wrong with a fix: following it leads back to a setting that was refused before;
        empty: nothing.
    """
    main = importlib.import_module(_module(case.command)).main
    words = [word for word in case.words if not word.startswith("-")]
    seen: set[tuple[str, str]] = set()
    for _ in range(4):
        try:
            main.compose(words)
            return ""
        except ConfigError as error:
            problems = error.problems
        again = [item for item in problems if (item.setting, item.rule) in seen]
        if again:
            return f"following the fixes leads to {' '.join(words)}, where {again[0]}"
        applied = words
        for problem in problems:
            match = LITERAL.fullmatch(problem.fix)
            if match and not PLACEHOLDER.search(match["word"]):
                applied = with_fix(applied, problem, match["word"])
                seen.add((problem.setting, problem.rule))
        if applied == words:
            return ""
        words = applied
    return f"following the fixes does not end: {' '.join(words)}"


def with_fix(words: list[str], problem: Problem, fix: str) -> list[str]:
    """Replace the words that a fix is about by the fix.

    A fix for an unknown setting is another setting, which takes its place; a fix that chooses an
    option of a group takes the place of the group's settings.
    """
    refused, _, _ = problem.setting.partition("=")
    for new in split(fix):
        key, _, _ = new.partition("=")
        words = [
            word
            for word in words
            if (name := word.lstrip("+").partition("=")[0].strip()) != key
            and not (name == refused and RENAMES.search(problem.rule))
            and not ("." not in key and name.startswith(f"{key}."))
        ]
        words = [*words, new]
    return words


def split(text: str) -> tuple[str, ...]:
    """Split words at spaces that no bracket or quote encloses; a row in quotes is one word."""
    if text[:1] == text[-1:] == "'" and len(text) > 1:
        return (text[1:-1],)
    if text in ("", "\n"):
        return (text,)
    words, depth, quoted = [""], 0, False
    for index, letter in enumerate(text):
        starts_word = letter == " " and re.match(r"[-~+]?[\w./@]+(=|$)|-", text[index + 1 :])
        if letter == " " and starts_word and depth <= 0 and not quoted:
            words.append("")
            continue
        depth += (letter in "[{(") - (letter in ")}]")
        quoted ^= letter == "'"
        words[-1] += letter
    return tuple(words)
