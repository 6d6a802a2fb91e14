"""Read the files of a run's folder, whatever is missing or damaged: a page shows what is there."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.checkpoint import folders
from sft.config.compare import flatten
from sft.config.evaluation import RESULT
from sft.config.plain import parse_json, read_json, read_lines
from sft.config.settings import Config
from sft.errors import RunError
from sft.run import record
from sft.run.lock import Lock

MERGE_REPORT = "merge_report.json"
KILLED = "killed"  # the status of a run that neither ended nor goes on
LARGEST = 1e100  # beyond it the arithmetic of an axis overflows, and no figure is so large
LAST, EVALUATION = 8, b'_loss": '  # what a table of runs reads of the metrics
Record = dict[str, Any]
Points = list[tuple[float, float]]


@dataclass
class Folder:
    """What is known of a run.

    Attributes:
        path: The run's folder.
        run: run.json; empty if it is missing or damaged.
        settings: config.yaml, nested; empty if it is missing or damaged.
        metrics: The records of metrics.jsonl that have a step, as they were written.
        damaged: The damaged files, with what is wrong.
        status: ``finished``, ``stopped``, ``failed`` or ``running`` as in run.json; ``killed`` if
            run.json says that it is running and no process holds its lock; ``unknown`` if run.json
            says nothing.
    """

    path: Path
    run: Record = field(default_factory=dict)
    settings: Record = field(default_factory=dict)
    metrics: list[Record] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    status: str = "unknown"

    @property
    def name(self) -> str:
        """The run's name; the folder's where the settings have none."""
        return str(self.settings.get("run_name") or self.path.resolve().name)

    def setting(self, name: str) -> Any:
        """Return the setting of a dotted name; None if it is not known."""
        node: Any = self.settings
        for part in name.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def flat(self) -> dict[str, Any]:
        """Return all settings by dotted name; a setting that an earlier version lacked, as now."""
        return defaults() | flatten(self.settings) if self.settings else {}

    def mapping(self, key: str) -> Record:
        """Return an entry of run.json that must be a mapping; empty if it is none."""
        found = self.run.get(key)
        return found if isinstance(found, dict) else {}

    def entries(self, key: str) -> list[Record]:
        """Return the mappings in an entry of run.json that must be a list of them."""
        return mappings(self.run.get(key))

    def json(self, name: str) -> Record:
        """Read a further JSON file of the folder; empty if it is missing or damaged."""
        if not (self.path / name).is_file():
            return {}
        found = self._tried(name, lambda path: read_json(path, finite=False))
        return found if isinstance(found, dict) else {}

    def lines(self, name: str, read: Callable[[Path], Sequence[str]] | None = None) -> list[Record]:
        """Read a further file of JSON lines; lines that are no mapping are counted as damaged."""
        if not (self.path / name).is_file():
            return []
        lines = self._tried(name, read or _lines) or ()
        lines = [line for line in lines if line.strip()]
        try:
            values = parse_json(f"[{','.join(lines)}]", finite=False)  # at once: twice as fast
        except ValueError:
            values = map(_parsed, lines)
        found = [value for value in values if isinstance(value, dict)]
        if bad := len(lines) - len(found):
            self.damaged[name] = f"{bad} damaged line{'s' * (bad > 1)}, which are left out"
        return found

    def text(self, name: str, limit: int) -> str:
        """Read the beginning of a text file; empty if there is none."""
        try:
            with (self.path / name).open(encoding="utf-8", errors="replace") as file:
                return file.read(limit)
        except OSError:
            return ""

    def _tried(self, name: str, read: Callable[[Path], Any]) -> Any:
        try:
            return read(self.path / name)
        except (ValueError, OSError) as error:
            self.damaged[name] = str(error)
            return None

    def points(self, key: str) -> Points:
        """Return (step, value) of every record with a number under this key; NaN where it is null.

        JSON has no NaN, and a run writes null for it.
        """
        return [
            (float(record["step"]), number(record[key])) for record in self.metrics if key in record
        ]

    def last(self, key: str) -> float | None:
        """Return the last number that was logged under this key."""
        found = (number(record[key]) for record in reversed(self.metrics) if key in record)
        return next((value for value in found if math.isfinite(value)), None)

    def best(self, key: str) -> tuple[float, float] | None:
        """Return (step, value) of the smallest number under this key."""
        found = [point for point in self.points(key) if math.isfinite(point[1])]
        return min(found, key=lambda point: point[1], default=None)

    def step(self) -> int:
        """Return the last step that was logged."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def checkpoints(self) -> Iterator[tuple[int, int]]:
        """Yield (step, bytes) of each checkpoint, oldest first."""
        for path in reversed(folders.checkpoints(self.path)):
            yield folders.step_of(path), size(path)

    def held_out(self) -> list[str]:
        """Return the keys of the losses on held-out sets; the main one is first."""
        keys = dict.fromkeys(key for record in self.metrics for key in record)
        found = [RESULT.fullmatch(key) for key in keys]
        named = [match[0] for match in found if match and match[2] == "loss"]
        return [*(["eval_loss"] if "eval_loss" in keys else []), *sorted({*named} - {"eval_loss"})]


@functools.cache
def defaults() -> dict[str, Any]:
    """Return the settings' defaults by dotted name."""
    return flatten(dataclasses.asdict(Config()))


def _parsed(line: str) -> Any:
    try:
        return parse_json(line, finite=False)
    except ValueError:
        return None


_lines = functools.partial(read_lines, errors="replace")


def _brief(path: Path) -> list[str]:
    """Read the lines with an evaluation and the last ones; the others are not even decoded."""
    content = path.read_bytes()
    begin = len(content)
    for _ in range(LAST):
        begin = content.rfind(b"\n", 0, max(begin, 0))
    begin = max(begin, 0)
    lines, at = [], content.find(EVALUATION, 0, begin)
    while at >= 0:
        start, end = content.rfind(b"\n", 0, at) + 1, content.find(b"\n", at)
        lines.append(content[start:end])
        at = content.find(EVALUATION, end, begin)
    lines += content[begin:].splitlines()
    return [line.decode("utf-8", errors="replace") for line in lines]


def mappings(value: Any) -> list[Record]:
    """Return the mappings in what must be a list of them."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def number(value: Any) -> float:
    """Return a JSON value as a number; NaN if it is none, and infinite beyond ``LARGEST``."""
    if type(value) not in (float, int) or value != value:
        return math.nan
    return float(value) if abs(value) <= LARGEST else math.inf if value > 0 else -math.inf


def size(path: Path) -> int:
    """Sum the bytes of the files in a folder."""
    total = 0
    for file in path.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # a checkpoint that is being deleted
            continue
    return total


def last_written(path: Path) -> float:
    """Return when a run last wrote its figures or its status, in seconds since 1970."""
    times = [0.0]
    for name in (record.RECORD, record.METRICS, record.SETTINGS):
        try:
            times.append((path / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run."""
    return (path / record.RECORD).is_file() or (path / record.SETTINGS).is_file()


def _settings(path: Path) -> Record:
    """Read config.yaml; with the parser in C, in a tenth of the time, if it has only plain values.

    Raises:
        RunError: The file is damaged.
    """
    import yaml

    text = (path / record.SETTINGS).read_text(encoding="utf-8", errors="replace")
    if not set(text) & set("&*$"):  # anchors, aliases, interpolations, or texts with these letters
        with contextlib.suppress(yaml.YAMLError, RecursionError, ValueError):
            found = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            if isinstance(found, dict):
                return found
    return dict(record.settings(path))


def read(path: Path, brief: bool = False) -> Folder:
    """Read a run's folder.

    Args:
        path: The folder.
        brief: Of the metrics, read only evaluations and the last records, for a table of runs.
    """
    found = Folder(path)
    try:
        found.run = record.read(path)
        found.status = str(found.run.get("status", "unknown"))
    except (RunError, OSError):
        found.damaged[record.RECORD] = "it is damaged"
    if found.status == "running" and not Lock(path).is_taken():
        found.status = KILLED
    try:
        found.settings = _settings(path)
    except (RunError, OSError):
        found.damaged[record.SETTINGS] = "it is missing or damaged"
    records = found.lines(record.METRICS, _brief if brief else None)
    found.metrics = [item for item in records if math.isfinite(number(item.get("step")))]
    return found
