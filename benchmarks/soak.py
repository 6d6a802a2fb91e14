"""Inject faults into runs at random moments; each run must end like an undisturbed one.

    python benchmarks/soak.py [--seconds 600] [--seed 0] [--jobs 1] [--only TEXT] [--cold]

Each run trains the embedded model on 48 rows for 12 epochs of 6 steps, with dropout, and evaluates
and saves every few steps. It gets five to twelve faults, each at a random step or while the command
starts, and the command is run again after each; then it may finish. Faults are real: SIGKILL of a
rank, all ranks, the launcher, a loader worker or everything; other signals to a rank, its process
group, the launcher or all; SIGSTOP for some time; a full disk (a small tmpfs, if this user may
mount one); a damaged checkpoint; a second start of the same command. A run is exact if every logged
loss, learning rate, gradient norm and evaluation and every byte of the adapter equal those of an
undisturbed run. In the elastic case each start has a different number of ranks and a different ZeRO
stage: each step must read the same rows (checked by the count of tokens), and losses and weights
must agree within the bounds below.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from faults import broken, flip, logged_steps, newest, outcome, tear_log, tmpfs, truncate
from launch import Cold, Warm
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load

from sft.checkpoint import folders

SETTINGS = [
    *("dataset.max_rows=48", "dataset.max_eval_rows=16", "dataset.exact_match=0"),
    *("train.global_batch_size=8", "train.num_train_epochs=12", "train.logging_steps=1"),
    *("train.eval_strategy=steps", "train.eval_steps=5", "train.save_strategy=steps"),
    *("train.save_steps=4", "train.save_total_limit=3", "precision=fp32"),
]
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGABRT", "SIGSEGV")
PATIENCE = 300  # seconds for a command to end after a fault, or to finish
LOSS = 1e-3  # elastic: relative; a row read twice or not at all changes a loss by some 1e-1
WEIGHT = (
    0.05  # elastic: of the largest weight; Adam turns a rounding of a tiny gradient into a step
)


@dataclass(frozen=True)
class Case:
    """How a run is launched; an elastic run chooses one of the launches at each start."""

    name: str
    launches: tuple[tuple[int, str], ...]  # ranks and ZeRO stage
    settings: tuple[str, ...] = ("lora.lora_dropout=0.1",)
    micro: int = 2


PACKED = ("dataset.packing=bfd", "dataset.max_length=64", "lora.lora_dropout=0.1")
WORKERS = ("train.dataloader_num_workers=2", "lora.lora_dropout=0.1")
CASES = [
    Case("1 rank", ((1, "none"),)),
    Case("1 rank, loader workers", ((1, "none"),), WORKERS, 4),
    Case("2 ranks", ((2, "none"),)),
    Case("2 ranks, loader workers", ((2, "none"),), WORKERS, 4),
    Case("2 ranks, packed", ((2, "none"),), PACKED, 1),
    Case("2 ranks, stage1", ((2, "stage1"),)),
    Case("2 ranks, stage2", ((2, "stage2"),)),
    Case("2 ranks, stage3", ((2, "stage3"),)),
    # Without dropout, whose masks are of a rank's own random numbers.
    Case("elastic", ((1, "none"), *((2, f"stage{n}") for n in (1, 2, 3)), (2, "none")), ()),
]


@dataclass
class Fault:
    """One injected fault, and how the command with it ended."""

    case: str
    kind: str
    step: int
    code: int | str | None = None  # the exit code; None: it hung
    broken: list[str] = field(default_factory=list)


class Start:
    """One start of a run's command."""

    how: type[Cold] | type[Warm] = Warm

    def __init__(
        self,
        run: Path,
        launch: tuple[int, str],
        case: Case,
        cache: Path,
        log: str = "log",
    ) -> None:
        self.run, self.launch, self.case, self.cache = run, launch, case, cache
        self.ranks, self.hung = launch[0], False
        self.log = run.parents[1] / log  # not on the disk that is filled
        settings = [f"zero={launch[1]}", f"output_dir={run}", *SETTINGS, *case.settings]
        settings += [f"train.per_device_train_batch_size={case.micro}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SFT_CACHE_DIR": str(cache)}
        self.child = self.how(self.ranks, settings, self.log, environment)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """List the ranks; without a launcher, the command is the rank."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.child.pid)
            return own.children() if self.ranks > 1 else [own]
        return []

    def workers(self) -> list[psutil.Process]:
        found = []
        for rank in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                found += rank.children()
        return found

    def reaches(self, step: int, seconds: float) -> bool:
        """Wait until a step is logged, and ``seconds`` more; False: the command ended first."""
        deadline = time.monotonic() + PATIENCE
        while logged_steps(self.run) < step and time.monotonic() < deadline:
            if self.child.code() is not None:
                return False
            time.sleep(0.02)
        if logged_steps(self.run) < step:
            self._kill()
            return False
        return self.child.code(seconds) is None

    def ends(self) -> int | None:
        """Wait until the command and its ranks end; None: they hung now or before."""
        left = self.processes() + self.workers()
        deadline = time.monotonic() + PATIENCE
        code = self.child.code(PATIENCE)
        _, alive = psutil.wait_procs(left, timeout=max(deadline - time.monotonic(), 1))
        if code is None or alive:
            self._kill()
            send(alive, signal.SIGKILL)
        return None if self.hung else code

    def _kill(self) -> None:
        """Kill a command that hangs, and record that it hung."""
        self.hung = True
        send([*self.processes(), *self.workers()], signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)


def send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def signalled(start: Start, chance: random.Random) -> str:
    name = chance.choice(SIGNALS)
    whom = chance.choice(["a rank", "a rank's group", "the launcher", "all"])
    launcher, ranks = psutil.Process(start.child.pid), start.processes()
    targets = {
        "a rank": [chance.choice(ranks or [launcher])],
        "a rank's group": [],
        "the launcher": [launcher],
        "all": [launcher, *ranks],
    }[whom]
    send(targets, getattr(signal, name))
    if not targets:  # a rank leads the group that it is in
        with contextlib.suppress(ProcessLookupError):
            os.killpg(chance.choice(ranks or [launcher]).pid, getattr(signal, name))
    return f"{name} to {whom}"


def killed(start: Start, chance: random.Random) -> str:
    whom = chance.choice(["a rank", "all ranks", "the launcher", "everything", "a loader worker"])
    launcher, ranks = psutil.Process(start.child.pid), start.processes()
    if whom == "a loader worker" and not start.workers():
        whom = "a rank"
    targets = {
        "a rank": [chance.choice(ranks or [launcher])],
        "all ranks": ranks,
        "the launcher": [launcher],
        "everything": [launcher, *ranks],
        "a loader worker": start.workers()[:1],
    }[whom]
    send(targets, signal.SIGKILL)
    return f"SIGKILL of {whom}"


def stopped(start: Start, chance: random.Random) -> str:
    rank = chance.choice(start.processes() or [psutil.Process(start.child.pid)])
    send([rank], signal.SIGSTOP)
    time.sleep(chance.uniform(0.5, 3))
    send([rank], signal.SIGCONT)
    return "SIGSTOP, then SIGCONT"


def filled(start: Start, chance: random.Random) -> str:
    """Fill the disk except for a random rest, and free it after the command has ended."""
    ballast = start.run.parent / "ballast"
    free = os.statvfs(start.run.parent)
    rest = chance.randrange(0, 600_000)
    with contextlib.suppress(OSError):
        ballast.write_bytes(bytes(max(free.f_bavail * free.f_frsize - rest, 0)))
    start.ends()
    ballast.unlink()
    return "the disk is full"


def damaged(start: Start, chance: random.Random) -> str:
    """Kill all processes, and damage the newest of several checkpoints, or the log."""
    send([psutil.Process(start.child.pid), *start.processes()], signal.SIGKILL)
    start.ends()
    if finished(start.run) or len(folders.checkpoints(start.run)) < 2:
        return "SIGKILL of everything"
    files = sorted(path for path in newest(start.run).iterdir() if path.is_file())
    harms: dict[str, Callable[[Path], object]] = {
        "a bit flipped": flip,
        "a file truncated": truncate,
        "a file deleted": lambda run: chance.choice(files).unlink(),
        "the log's last line torn": tear_log,
    }
    name = chance.choice(list(harms))
    harms[name](start.run)
    return f"damage: {name}"


def again(start: Start, chance: random.Random) -> str:
    """Start the same command a second time; one of the two must be refused."""
    second = Start(start.run, start.launch, start.case, start.cache, "second.log")
    code = second.ends()
    words = ("another process trains", "another process has trained", "is finished")
    refused = code not in (0, None) and any(word in second.said() for word in words)
    return "a second start" if code == 0 or refused else f"a second start: {second.said()[-300:]}"


FAULTS = [signalled, signalled, killed, killed, stopped, filled, damaged, again]


def suffer(
    case: Case, chance: random.Random, run: Path, cache: Path, steps: int, disk: bool
) -> list[Fault]:
    """Inject several faults into a run, and start it again each time that it has ended."""
    faults: list[Fault] = []
    start: Start | None = None
    for _ in range(chance.randint(5, 12)):
        if start is None:
            harmed = broken(run)
            start = Start(run, chance.choice(case.launches), case, cache)
        reached = logged_steps(run)
        trains = chance.random() < 0.8 and reached < steps
        step = chance.randint(reached + 1, min(reached + 20, steps)) if trains else 0
        if not start.reaches(step, chance.uniform(0, 0.3 if trains else 5)):
            break
        strike = chance.choice(FAULTS)
        strike = killed if strike is filled and not disk else strike
        fault = Fault(case.name, strike(start, chance), logged_steps(run))
        faults.append(fault)
        if strike in (stopped, again) and start.child.code() is None:
            fault.code = "runs on"
            continue
        fault.code = start.ends()
        start = None
        if not fault.kind.startswith("damage"):
            fault.broken = [name for name in broken(run) if name not in harmed]
        if fault.code is None or fault.broken or finished(run):
            break
    if start is not None and start.ends() is None:
        faults.append(Fault(case.name, "nothing", logged_steps(run)))
    return faults


def finish(case: Case, chance: random.Random, run: Path, cache: Path) -> str:
    """Run the command until the run is finished; return what is wrong, empty if nothing is."""
    for _ in range(2):  # the one before may have been struck as it had finished already
        if finished(run):
            return ""
        last = Start(run, chance.choice(case.launches), case, cache)
        if last.ends() is None:
            return "hangs"
    return "" if finished(run) else last.said()[-400:]


def finished(run: Path) -> bool:
    file = run / "run.json"
    return file.is_file() and json.loads(file.read_text())["status"] == "finished"


def differs(run: Path, straight: Path, elastic: bool) -> str:
    """Return how a run differs from the undisturbed one; empty if they are equal."""
    (logged, files), (expected, weights) = outcome(run), outcome(straight)
    if not elastic:
        wrong = [f"{a}, not {b}" for a, b in zip(logged, expected, strict=False) if a != b]
        wrong += ["the adapter"] if files != weights else []
        wrong += ["the log's length"] if len(logged) != len(expected) else []
        return ", ".join(wrong[:3])
    for name in ("num_tokens", "loss", "eval_loss"):
        one, other = ({r["step"]: r[name] for r in log if name in r} for log in (logged, expected))
        bound = 0 if name == "num_tokens" else LOSS
        if one.keys() != other.keys():
            return f"the logged steps of {name}"
        for step in one:
            if abs(one[step] - other[step]) > bound * other[step]:
                return f"step {step}: {name} {one[step]}, not {other[step]}"
    for file, content in files.items():
        tensors, right = load(content), load(weights[file])
        for name, tensor in tensors.items():
            if abs(tensor - right[name]).max() > WEIGHT * abs(right[name]).max():
                return f"{name} by {abs(tensor - right[name]).max():.2g}"
    return ""


class Soak:
    """All runs of a call; each case's undisturbed run is trained once."""

    def __init__(self, folder: Path, seed: int, cases: list[Case]) -> None:
        self.folder, self.seed, self.cases = folder, seed, cases
        self.locks = {case.name: threading.Lock() for case in cases}

    def straight(self, case: Case) -> Path:
        """Train the undisturbed run of a case, if it does not exist yet."""
        folder = self.folder / f"straight{self.cases.index(case)}"
        with self.locks[case.name]:
            folder.mkdir(exist_ok=True)
            run = folder / "run"
            if not finished(run):
                start = Start(run, case.launches[0], case, self.folder / "cache")
                assert start.ends() == 0, start.said()
        return run

    def one(self, number: int) -> tuple[list[Fault], str]:
        """Run one case with faults; return the faults and what is wrong with the run."""
        chance = random.Random(f"{self.seed}/{number}")
        case = self.cases[number % len(self.cases)]
        straight = self.straight(case)
        folder = self.folder / str(number)
        folder.mkdir()
        with tmpfs(folder / "disk", "40m") as mounted:
            run, cache = folder / "disk" / "run", self.folder / "cache"
            faults = suffer(case, chance, run, cache, logged_steps(straight), mounted)
            wrong = finish(case, chance, run, cache)
            wrong = wrong or differs(run, straight, len(case.launches) > 1)
        for fault in faults:
            if fault.code is None:
                wrong = f"hung after {fault.kind}; {wrong}"
            if fault.broken or ": " in fault.kind.removeprefix("damage: "):
                wrong = f"{fault.kind} left {fault.broken}; {wrong}"
        return faults, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="no run begins after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--only", default="", help="what a case's name holds")
    parser.add_argument("--cold", action="store_true", help="start as a user does, see launch.py")
    parser.add_argument("--output", type=Path, help="append a JSON line for each run")
    given = parser.parse_args()
    # A shell's background job ignores them, and so would all that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    Start.how = Cold if given.cold else Warm
    cases = [case for case in CASES if given.only in case.name]
    deadline = time.monotonic() + given.seconds
    numbers = iter(itertools.takewhile(lambda _: time.monotonic() < deadline, itertools.count()))
    lock, table = threading.Lock(), Counter[tuple[str, str]]()

    def job(soak: Soak) -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            faults, wrong = soak.one(number)
            with lock:
                name = soak.cases[number % len(soak.cases)].name
                told = ", ".join(f"{f.kind} at {f.step} ({f.code})" for f in faults)
                print(f"{number:3} {'BAD' if wrong else 'ok '} {name}: {told} {wrong}", flush=True)
                for fault in faults:
                    table[fault.kind, "bad" if wrong else "exact"] += 1
                if given.output:
                    record = {"seed": given.seed, "run": number, "case": name, "wrong": wrong}
                    record["faults"] = [vars(fault) for fault in faults]
                    with given.output.open("a") as file:
                        file.write(json.dumps(record) + "\n")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(given.jobs) as threads:
        soak = Soak(Path(folder), given.seed, cases)
        for future in [threads.submit(job, soak) for _ in range(given.jobs)]:
            future.result()
    shown = Table("fault", "struck", "in runs that went on exactly", "in others")
    for kind in sorted({kind for kind, _ in table}):
        exact, bad = table[kind, "exact"], table[kind, "bad"]
        shown.add_row(kind, str(exact + bad), str(exact), str(bad or ""))
    Console(width=100).print(shown)
    bad = sum(count for (_, verdict), count in table.items() if verdict == "bad")
    print(f"{table.total()} faults; {bad} of them in runs that went wrong")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
