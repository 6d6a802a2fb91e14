"""Trackers that keep a run in files of this machine: TensorBoard and Trackio."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from sft.config.compare import flatten
from sft.watch.tracker_run import COLUMNS, Row, Samples, TrackedRun, table

NAME = "events.out.tfevents.{}.{}"  # TensorBoard reads files with such names


class TensorBoard:
    """TensorBoard: an event file in the run's folder, which each process replaces.

    An event file cannot be corrected, and the last event of a killed process may be incomplete.
    metrics.jsonl has everything, so the new file replaces those of earlier processes.
    """

    def __init__(self, run: TrackedRun) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.hparams.summary_v2 import hparams_pb
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        self._sampled = -1  # the last step whose samples are in the file
        self.where = f"tensorboard --logdir {run.folder}"
        partial = run.folder / "tensorboard.partial"
        self._file = partial.open("wb")
        self._writer = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        facts = run.facts()
        settings = flatten(facts["settings"])
        plain = {
            name: value if isinstance(value, int | float) else str(value)
            for name, value in settings.items()
        }
        self._write(summary=hparams_pb(plain, trial_id=run.id))
        for name, content in facts.items():
            self._text(name, _code(content), 0)
        self._file.flush()
        for old in run.folder.glob(NAME.format("*", run.id)):
            old.unlink()
        partial.rename(run.folder / NAME.format(f"{time.time():.6f}", run.id))

    def send(self, rows: Sequence[Row]) -> None:
        """Append the figures."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for row in rows:
            values = [Summary.Value(tag=k, simple_value=v) for k, v in row.figures.items()]
            self._write(step=row.step, wall_time=row.time, summary=Summary(value=values))
        self._file.flush()

    def send_samples(self, samples: Samples) -> None:
        """Append the samples of later steps than before, as a table of Markdown."""
        for step in sorted(step for step in samples if step > self._sampled):
            rows = [COLUMNS, ("---",) * len(COLUMNS), *table({step: samples[step]})]
            lines = ("| " + " | ".join(_cell(item) for item in row) + " |" for row in rows)
            self._text("samples", "\n".join(lines), step)
            self._sampled = step
        self._file.flush()

    def finish(self, results: dict[str, Any]) -> None:
        """Append the results and close the file."""
        self._text("results", _code(results), 0)
        self._writer.close()

    def _text(self, tag: str, text: str, step: int) -> None:
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._write(step=step, summary=text_pb(tag, text))

    def _write(self, **content: Any) -> None:
        content.setdefault("wall_time", time.time())
        self._writer.write(self._event(**content).SerializeToString())


class Trackio:
    """Trackio: its database ignores a row whose id it has; the id names the step and the place."""

    def __init__(self, run: TrackedRun) -> None:
        from trackio.sqlite_storage import SQLiteStorage

        self._log = SQLiteStorage.bulk_log
        self._run, self._project = run, run.tracker["project"]
        self._config = {
            **run.facts(),
            "_Group": run.group,
            "_Created": datetime.now(UTC).isoformat(),
        }
        self._first: list[Row] = []
        self.where = f"trackio show --project {self._project}"

    def send(self, rows: Sequence[Row]) -> None:
        """Insert the rows that the database does not have."""
        self._first = self._first or list(rows[:1])
        self._insert(
            [row.figures for row in rows],
            [row.step for row in rows],
            [row.time for row in rows],
            [str(row.place) for row in rows],
        )

    def send_samples(self, samples: Samples) -> None:
        """Insert a table for each step."""
        for step, answers in samples.items():
            rows = [dict(zip(COLUMNS, row, strict=True)) for row in table({step: answers})]
            found = {"samples": {"_type": "trackio.table", "_value": rows}}
            self._insert([found], [step], [time.time()], ["samples"])

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results into the run's configuration."""
        self._config["results"] = results
        self.send(self._first)

    def _insert(
        self, figures: list[Any], steps: list[int], times: list[float], ids: list[str]
    ) -> None:
        run = self._run
        self._log(
            project=self._project,
            run=run.name,
            run_id=run.id,
            metrics_list=figures,
            steps=steps,
            timestamps=[datetime.fromtimestamp(item, UTC).isoformat() for item in times],
            config=self._config,
            log_ids=[f"{run.id}-{step}-{item}" for step, item in zip(steps, ids, strict=True)],
        )


def _code(content: Any) -> str:
    """Return JSON as a block of Markdown's code."""
    return "    " + json.dumps(content, indent=2, default=str).replace("\n", "\n    ")


def _cell(value: Any) -> str:
    """Return a cell of a table in Markdown."""
    return str("" if value is None else value).replace("|", "\\|").replace("\n", "<br>")
