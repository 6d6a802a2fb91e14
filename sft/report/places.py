"""Where runs are: the folders of runs in a folder, and what is wrong with one that is none."""

from __future__ import annotations

from pathlib import Path

from sft.config.upstream import did_you_mean
from sft.errors import RunError
from sft.report.folder import is_run


def require(path: Path) -> None:
    """Check that a folder is that of a run.

    Raises:
        RunError: It is not; the message names what is there.
    """
    if not is_run(path):
        raise RunError(_no_run(path))


def runs_in(path: Path) -> list[Path]:
    """List the folders of runs in a folder, at most three levels below: a sweep's trials too."""
    found, level = [], [path]
    for _ in range(4):
        below = []
        for folder in level:
            if is_run(folder):
                found.append(folder)
            elif folder.is_dir():
                below += sorted(item for item in folder.iterdir() if item.is_dir())
        level = below
    return found


def _no_run(path: Path) -> str:
    """Return what is wrong with a folder that is no run's, and a fix."""
    if not path.exists():
        near = [item for item in (path.parent.iterdir() if path.parent.is_dir() else ())]
        runs = [item.name for item in near if is_run(item)]
        hint = did_you_mean(path.name, runs) if runs else ""
        fix = "sft runs lists the runs"
        if hint.startswith("did"):
            fix = f"did you mean {path.parent / hint.removeprefix('did you mean ')}"
        return f"there is no folder {path}\n    fix: {fix}"
    if path.is_file():
        owner = path.parent if is_run(path.parent) else "the folder of a run"
        return f"{path} is a file\n    fix: sft report {owner}"
    within = next((item for item in path.absolute().parents if is_run(item)), None)
    if within is not None:
        return f"{path} is a folder within a run\n    fix: sft report {within}"
    runs = [str(item) for item in runs_in(path)]
    what = ", ".join(sorted(item.name for item in path.iterdir())[:8]) or "nothing"
    fix = f"sft report {' '.join(runs[:3])}" if runs else "sft runs lists the runs"
    return f"{path} is not the folder of a run; it holds {what}\n    fix: {fix}"
