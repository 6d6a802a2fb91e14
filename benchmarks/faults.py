"""Inject faults into real runs, resume each, and compare it with an undisturbed run.

    python benchmarks/faults.py [--zero none stage1 stage2 stage3] [--ranks 2] [--only TEXT]

Every run trains the embedded model on 24 rows for 8 steps, three per epoch, with dropout, and with
an evaluation and a checkpoint every 2 steps. Faults are real: ``kill -9`` at a chosen point of one
rank or all ranks (``inject.py``), a signal, a full or read-only disk (a small tmpfs, if this user
may mount one), changed bytes in a checkpoint. Then the same command is run once more. The resumed
run is exact if every logged loss, learning rate, gradient norm and evaluation, and every byte of
the adapter, equal those of the undisturbed run.

For each fault, the table shows how the command with the fault ended, what the next command did, how
many steps were trained again, and how many checkpoints with their final name were incomplete (none,
unless the fault itself damaged one).
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from psutil import Process, wait_procs
from rich.console import Console
from rich.table import Table

from sft.checkpoint import folders
from sft.errors import CheckpointError
from sft.run import record

HERE = Path(__file__).resolve().parent
SETTINGS = [
    *("train.max_steps=8", "train.save_strategy=steps", "train.save_steps=2"),
    *("train.eval_strategy=steps", "train.eval_steps=2", "train.logging_steps=1"),
    *("train.global_batch_size=8", "train.per_device_train_batch_size=2"),
    *("dataset.max_rows=24", "dataset.max_eval_rows=32", "dataset.exact_match=0"),
    *("lora.lora_dropout=0.1", "precision=fp32"),
]


@dataclass
class Fault:
    """One fault.

    Attributes:
        name: Its name in the table.
        inject: The argument of ``inject.py``; empty: the first command runs undisturbed to
            ``steps``.
        steps: The step after which an undisturbed first command is killed.
        harm: A function that damages the run's folder between the two commands.
        refusal: The error that an additional command before the last must end with.
        extra: The settings of that command.
        code: The exit code that the first command must have; None: any but 0.
    """

    name: str
    inject: str = ""
    harm: Callable[[Path], None] | None = None
    refusal: str = ""
    extra: list[str] = field(default_factory=list)
    code: int | None = None


def newest(run: Path) -> Path:
    return folders.checkpoints(run)[0]


def truncate(run: Path) -> None:
    file = newest(run) / "optimizer-00001.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def flip(run: Path) -> None:
    file = newest(run) / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (newest(run) / name).unlink()


def tear_log(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')


def copy_in(folder: Path, **told: object) -> None:
    """Put a checkpoint of step 7 into the folder, with the files of the newest one."""
    copied = folders.path_of(folder, 7)
    shutil.copytree(newest(folder), copied)
    manifest = folders.manifest(copied)
    (copied / folders.MANIFEST).write_text(json.dumps({**manifest, **told}))


def prepared(run: Path) -> Path:
    """Return the training samples in the cache, which the runs of a stage share."""
    [path] = (run.parents[1] / "cache" / "data").glob("*/train.arrow")
    return path


def flip_sample(run: Path) -> None:
    content = bytearray(prepared(run).read_bytes())
    content[len(content) // 2] ^= 1
    prepared(run).write_bytes(content)


LAST = "SIGKILL:sft.training.guard.Guard.on_step_end:before:7:all"  # two steps after a checkpoint
FAULTS = [
    Fault(
        "one rank killed in step 3", "SIGKILL:sft.training.trainer.Trainer.training_step:before:6:1"
    ),
    Fault(
        "rank 0 killed at the end of step 5",
        "SIGKILL:sft.training.guard.Guard.on_step_end:before:5:0",
    ),
    Fault("all ranks killed in step 7", LAST),
    Fault("killed as a save begins", "SIGKILL:sft.checkpoint.save.begin_folder:after:2:0"),
    Fault("killed as the adapter is written", "SIGKILL:sft.checkpoint.weights.write:before:2:0"),
    Fault(
        "killed before the optimizer's state",
        "SIGKILL:sft.checkpoint.tensors.Writer.flush:before:2:0",
    ),
    Fault(
        "killed after the optimizer's state",
        "SIGKILL:sft.checkpoint.tensors.Writer.flush:after:2:0",
    ),
    Fault("killed before the manifest", "SIGKILL:sft.checkpoint.folders.finish:before:2:0"),
    Fault("killed after the manifest", "SIGKILL:sft.checkpoint.folders.write_text:after:2:0"),
    Fault(
        "killed as an old one is deleted", "SIGKILL:sft.checkpoint.folders.delete_folder:before:1:0"
    ),
    Fault("other rank killed in a save", "SIGKILL:sft.checkpoint.state.progress:before:2:1"),
    Fault("killed as the run's end is written", "SIGKILL:sft.checkpoint.weights.write:after:5:0"),
    Fault("SIGTERM to all ranks", "SIGTERM:sft.training.guard.Guard.on_step_end:before:5:all"),
    Fault("SIGUSR1 to one rank", "SIGUSR1:sft.training.trainer.Trainer.training_step:before:6:1"),
    Fault("SIGTERM in an evaluation", "SIGTERM:sft.training.trainer.Trainer.evaluate:before:3:0"),
    Fault("newest checkpoint truncated", LAST, truncate),
    Fault("one bit of the newest flipped", LAST, flip),
    Fault("a file of the newest deleted", LAST, remove("random.safetensors")),
    Fault("manifest of the newest deleted", LAST, remove("manifest.json")),
    Fault("last line of the log torn", LAST, tear_log),
    Fault("a checkpoint of a different run", LAST, lambda run: copy_in(run, step=7, run="0" * 32)),
    Fault("a checkpoint renamed to a later step", LAST, copy_in),
    Fault("prepared data truncated", LAST, lambda run: os.truncate(prepared(run), 400)),
    Fault("one bit of the prepared data flipped", LAST, flip_sample),
    Fault(
        "a damaged checkpoint is named",
        LAST,
        flip,
        "adapter_model.safetensors is damaged",
        ["resume.checkpoint=checkpoint-6"],
    ),
    Fault(
        "a checkpoint is named that is not there",
        LAST,
        None,
        "has checkpoint-6, checkpoint-4",
        ["resume.checkpoint=checkpoint-5"],
    ),
    Fault("another seed", LAST, None, "seed: 42 there, 7 here", ["seed=7"]),
]
ONCE = ("killed while tokenising", "disk full", "read-only folder", "two runs at once")
ONCE += ("every checkpoint damaged", "killed while merging", "the run's folder removed")
ONCE += ("torchrun alone killed", "the driver of a sweep killed")


def command(stage: str, ranks: int, run: Path, inject: str = "") -> list[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += ["--nproc_per_node", str(ranks)]
    start += [str(HERE / "inject.py"), inject, "sft.train"] if inject else ["-m", "sft.train"]
    return [*start, f"zero={stage}", f"output_dir={run}", *SETTINGS]


def call(words: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SFT_CACHE_DIR": str(cache)}
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def outcome(run: Path) -> tuple[list[dict[str, object]], dict[str, bytes]]:
    """Return the log of a finished run without times, and the bytes of its adapter."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [record.trained(line) for line in lines if "train_runtime" not in line]
    adapter = run / "adapter"
    return logged, {path.name: path.read_bytes() for path in adapter.glob("*.safetensors")}


def broken(run: Path) -> list[str]:
    """List the checkpoints that have their final name but are incomplete."""
    found = []
    for path in folders.checkpoints(run):
        try:
            folders.verify(path)
        except CheckpointError:
            found.append(path.name)
    return found


@dataclass
class Result:
    """The result of a fault."""

    stage: str
    name: str
    under: str
    after: str
    again: int
    broken: int
    good: bool


def logged_steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    steps = [0]
    for line in file.read_text().splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            steps.append(json.loads(line)["step"])
    return max(steps)


def suffer(stage: str, ranks: int, fault: Fault, folder: Path, straight: Path) -> Result:
    """Run the command with a fault, run it again, and compare with the undisturbed run."""
    run, cache = folder / "run", folder.parent / "cache"
    first = call(command(stage, ranks, run, fault.inject), cache)
    if first.returncode == 0:
        return Result(stage, fault.name, "not struck", first.stdout[-200:], 0, 0, False)
    reached = logged_steps(run)
    torn = broken(run)
    if fault.harm is not None:
        fault.harm(run)
    if fault.refusal:
        refused = call(command(stage, ranks, run) + fault.extra, cache)
        if refused.returncode == 0 or fault.refusal not in refused.stderr:
            return Result(stage, fault.name, "", refused.stderr[-300:], 0, len(torn), False)
    return go_on(stage, ranks, fault.name, run, cache, straight, reached, torn, bool(fault.refusal))


def go_on(
    stage: str,
    ranks: int,
    name: str,
    run: Path,
    cache: Path,
    straight: Path,
    reached: int,
    torn: list[str],
    refused: bool,
) -> Result:
    """Run the same command again, and compare with the undisturbed run."""
    again = call(command(stage, ranks, run), cache)
    if again.returncode:
        return Result(stage, name, "", again.stderr[-300:], 0, len(torn), False)
    resumed = [line for line in again.stdout.splitlines() if line.startswith("resuming from")]
    begun = int(resumed[0].split("checkpoint-")[1].split()[0]) if resumed else 0
    exact = outcome(run) == outcome(straight)
    said = "refused clearly, then " * refused + (f"from step {begun}: " if begun else "anew: ")
    return Result(
        stage,
        name,
        f"ended after step {reached}",
        said + ("exact" if exact else "DIFFERENT"),
        max(reached - begun, 0),
        len(torn),
        exact and not torn,
    )


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[bool]:
    """Mount a small file system; return False if this user may not."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    try:
        yield done.returncode == 0
    finally:
        if done.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def once(stage: str, ranks: int, folder: Path, straight: Path) -> Iterator[Result]:
    """Inject the faults that do not depend on the ZeRO stage."""
    cache = folder / "cache"
    own = folder / "own-cache"
    run = folder / "tokenising"
    inject = "SIGKILL:sft.data.prepare.write_blocks:after:1:all"
    first = call(command(stage, ranks, run, inject), own)
    assert first.returncode
    yield go_on(stage, ranks, ONCE[0], run, own, straight, 0, [], False)

    disk = folder / "disk"
    with tmpfs(disk, "1600k") as mounted:
        if mounted:
            run = disk / "run"
            first = call(command(stage, ranks, run), cache)
            clear = "cannot be saved" in first.stderr and "No space left" in first.stderr
            reached, torn = logged_steps(run), broken(run)
            subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
            result = go_on(stage, ranks, ONCE[1], run, cache, straight, reached, torn, clear)
            result.good = result.good and clear
            yield result
    disk = folder / "read-only"
    with tmpfs(disk, "50m") as mounted:
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
            run = disk / "run"
            first = call(command(stage, ranks, run), cache)
            clear = "cannot be written to" in first.stderr
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
            result = go_on(stage, ranks, ONCE[2], run, cache, straight, 0, [], clear)
            result.good = result.good and clear
            yield result

    run = folder / "two"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "SFT_CACHE_DIR": str(cache)}
    words = command(stage, ranks, run)
    both = [
        subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [one.communicate()[1].decode() for one in both]
    won = [one.returncode == 0 for one in both]
    lost = said[won.index(False)] if False in won else ""
    clear = any(what in lost for what in ("another process trains", "another process has trained"))
    exact = sum(won) == 1 and outcome(run) == outcome(straight)
    told = "one refused clearly; the other: " * clear + ("exact" if exact else "DIFFERENT")
    yield Result(stage, ONCE[3], "both given at once", told, 0, 0, clear and exact)

    run = folder / "bad"
    call(command(stage, ranks, run, LAST), cache)
    for path in folders.checkpoints(run):
        (path / "state.json").unlink()
    refused = call(command(stage, ranks, run), cache)
    clear = refused.returncode != 0 and "no checkpoint in" in refused.stderr
    kept = len(list(run.glob("checkpoint-*"))) == 2
    said = "refused clearly, nothing touched" if clear and kept else refused.stderr[-300:]
    yield Result(stage, ONCE[4], "ended after step 6", said, 0, 0, clear and kept)
    yield merging(stage, folder, straight)
    yield from disturbed(stage, ranks, folder, straight)


def disturbed(stage: str, ranks: int, folder: Path, straight: Path) -> Iterator[Result]:
    """Remove the folder of a run, or kill what started it, while it trains its second epoch."""
    cache = folder / "cache"

    def until_step_4(words: list[str], run: Path) -> tuple[subprocess.Popen[str], list[Process]]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "SFT_CACHE_DIR": str(cache)}
        child = subprocess.Popen(
            words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        while logged_steps(run) < 4:
            assert child.poll() is None, child.communicate()[1]
            time.sleep(0.005)
        return child, Process(child.pid).children(recursive=True)

    run = folder / "removed"
    child, _ = until_step_4(command(stage, ranks, run), run)
    shutil.rmtree(run)
    said = child.communicate()[1]
    clear = child.returncode != 0 and f"the run's folder {run} is gone" in said
    result = go_on(stage, ranks, ONCE[6], run, cache, straight, 4, [], clear)
    yield replace(result, good=result.good and clear)

    run = folder / "orphaned"
    child, started = until_step_4(command(stage, ranks, run), run)
    child.kill()
    _, alive = wait_procs(started, timeout=60)
    reached, torn = logged_steps(run), broken(run)
    result = go_on(stage, ranks, ONCE[7], run, cache, straight, reached, torn, False)
    yield replace(result, good=result.good and not alive)

    run = folder / "sweep" / "seed=42"
    words = [sys.executable, "-m", "sft.train", "-m", "seed=42,7", f"zero={stage}", *SETTINGS]
    words += [f"hydra.sweep.dir={run.parent}", f"hydra.launcher.nproc_per_node={ranks}"]
    child, _ = until_step_4(words, run)
    child.kill()
    again = call(words, cache)
    exact = again.returncode == 0 and outcome(run) == outcome(straight)
    said = "both trials finished, the first: exact" if exact else again.stdout[-300:]
    yield Result(stage, ONCE[8], "in its first trial", said, 0, len(broken(run)), exact)


def merging(stage: str, folder: Path, straight: Path) -> Result:
    """Kill a merge after it has written its weights, and merge again."""
    words = [sys.executable, str(HERE / "inject.py"), "SIGKILL:sft.merge.metadata.write:after:1:0"]
    words += ["sft.merge", f"run={straight}"]
    killed = call(words, folder / "cache").returncode != 0
    absent = not (straight / "merged").exists()
    again = call([sys.executable, "-m", "sft.merge", f"run={straight}"], folder / "cache")
    whole = again.returncode == 0 and (straight / "merged" / "model.safetensors").is_file()
    said = "merged, and verified" if whole else again.stderr[-300:]
    under = "nothing under the final name" if absent else "left a folder that looks finished"
    return Result(stage, ONCE[5], under, said, 0, 0, killed and absent and whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zero", nargs="+", default=["none", "stage1", "stage2", "stage3"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--only", default="", help="what the name holds; or once")
    given = parser.parse_args()
    table = Table("stage", "fault", "under it", "the same command again", "steps again")
    results = []
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as work:
        for stage in given.zero:
            folder = Path(work) / stage
            folder.mkdir()
            straight = folder / "straight"
            done = call(command(stage, given.ranks, straight), folder / "cache")
            if done.returncode:
                sys.exit(done.stderr[-4000:])

            def found(stage: str = stage, folder: Path = folder, straight: Path = straight):
                for number, fault in enumerate(FAULTS):
                    if given.only in fault.name:
                        own = folder / str(number)
                        own.mkdir()
                        yield suffer(stage, given.ranks, fault, own, straight)
                        shutil.rmtree(own)
                if stage == given.zero[0] and given.only in "once":
                    yield from once(stage, given.ranks, folder, straight)

            for result in found():
                results.append(result)
                table.add_row(
                    result.stage,
                    result.name,
                    result.under,
                    result.after,
                    str(result.again),
                    style="" if result.good else "bold red",
                )
                console.print(f"{'ok ' if result.good else 'BAD'} {stage} {result.name}")
    console.print(table)
    bad = [result for result in results if not result.good]
    console.print(
        f"{len(results)} faults: {len(results) - len(bad)} went on exactly or were refused "
        f"clearly, {len(bad)} did not; {sum(result.broken for result in results)} checkpoints "
        f"under their final name were not whole; {sum(result.again for result in results)} steps "
        "were trained again"
    )
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
