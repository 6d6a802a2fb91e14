"""Trackers with a server: Weights & Biases and MLflow."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sft.config.compare import flatten
from sft.watch.tracker_run import COLUMNS, Row, Samples, TrackedRun, table


class Wandb:
    """Weights & Biases: one row for each record, numbered by its step and place.

    W&B numbers rows upwards, and says at the start which number comes next; rows below are there.
    Its axis is ``step``. Recorded offline, a run cannot be continued (wandb#4624), so it is
    recorded again from its beginning, and replaces the earlier recording.
    """

    PLACES = 1000  # more than the records of one step

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        self._table = wandb.Table
        facts = run.facts()
        settings = {
            **{"root_dir": str(run.folder.absolute()), "console": "off", "quiet": True},
            # Nothing of the machine, the code or the command that was not asked for.
            **{"disable_git": True, "disable_code": True, "save_code": False},
            **{"x_disable_meta": True, "x_disable_machine_info": True, "x_disable_stats": True},
            **{"x_save_requirements": False, "finish_timeout_raises": True},
            **{"init_timeout": 30, "finish_timeout": 300},
        }
        given = {
            **{"project": run.tracker["project"], "id": run.id, "name": run.name},
            **{"group": run.group, "config": facts, "resume": "allow"},
        }
        earlier = list((run.folder / "wandb").glob(f"offline-run-*-{run.id}"))
        try:
            self._run = wandb.init(**given, settings=wandb.Settings(**settings))
        except wandb.errors.UsageError:
            if os.environ.get("WANDB_MODE"):
                raise
            # There is no API key on this machine.
            self._run = wandb.init(**given, settings=wandb.Settings(**settings, mode="offline"))
        except Exception:
            wandb.teardown()  # otherwise the next attempt is told that the id is in use
            raise
        offline = self._run.offline
        self._next = 0 if offline else self._run.starting_step
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        self.where = self._run.url or ""
        if offline:
            recording = Path(self._run.dir).parent.name
            self.where = f"wandb sync {run.folder / 'wandb' / recording}"
            for old in earlier:
                shutil.rmtree(old, ignore_errors=True)

    def send(self, rows: Sequence[Row]) -> None:
        """Log the rows that W&B does not have."""
        for row in rows:
            number = row.step * self.PLACES + row.place
            if number >= self._next and row.figures:
                self._run.log({"step": row.step, "time": row.time, **row.figures}, step=number)

    def send_samples(self, samples: Samples) -> None:
        """Replace the table of samples."""
        columns = list(COLUMNS)
        self._run.summary["samples"] = self._table(columns=columns, data=table(samples))

    def finish(self, results: dict[str, Any]) -> None:
        """Write the results into the summary, and wait for the upload."""
        self._run.summary.update(results)
        self._run.finish(exit_code=0 if results.get("status") == "finished" else 1)


# The most that MLflow takes in one request, and the longest value, in characters.
METRICS, PARAMS, VALUE = 1000, 100, 6000
STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MLflow:
    """MLflow: it keeps every value that it gets, so it is asked for the last step of each figure.

    It finds the run by the tag ``sft.id``, because MLflow makes the ids itself.
    """

    def __init__(self, run: TrackedRun) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param, RunTag

        self._metric, self._tag = Metric, RunTag
        beside = run.folder.absolute().parent
        ours = f"sqlite:///{beside / 'mlflow.db'}"
        uri = run.tracker["uri"] or os.environ.get("MLFLOW_TRACKING_URI") or ours
        self._client = client = MlflowClient(tracking_uri=uri)
        project = run.tracker["project"]
        found = client.get_experiment_by_name(project)
        artifacts = (beside / "mlflow-artifacts").as_uri() if uri == ours else None
        experiment = found.experiment_id if found else client.create_experiment(project, artifacts)
        runs = client.search_runs([experiment], f"tags.`sft.id` = '{run.id}'")
        tags = {"sft.id": run.id, **({"sft.group": run.group} if run.group else {})}
        self._run = runs[0] if runs else client.create_run(experiment, None, tags, run.name)
        self._id = self._run.info.run_id
        client.update_run(self._id, status="RUNNING")
        self.where = f"{uri if uri == ours else 'the tracking server'}, run {self._id}"
        self._last = {
            name: max(item.step for item in client.get_metric_history(self._id, name))
            for name in self._run.data.metrics
        }
        facts = run.facts()
        settings = flatten(facts["settings"])
        params = [
            Param(name, str(value)[:VALUE])
            for name, value in settings.items()
            if name not in self._run.data.params  # a parameter cannot be changed
        ]
        for start in range(0, len(params), PARAMS):
            client.log_batch(self._id, params=params[start : start + PARAMS])
        for name, content in facts.items():
            client.log_dict(self._id, content, f"{name}.json")

    def send(self, rows: Sequence[Row]) -> None:
        """Log the figures of later steps than the last that MLflow has."""
        metrics = [
            self._metric(name, value, int(row.time * 1000), row.step)
            for row in rows
            for name, value in row.figures.items()
            if row.step > self._last.get(name, -1)
        ]
        for start in range(0, len(metrics), METRICS):
            batch = metrics[start : start + METRICS]
            self._client.log_batch(self._id, metrics=batch)

    def send_samples(self, samples: Samples) -> None:
        """Replace the table of samples."""
        columns = {"columns": list(COLUMNS), "data": table(samples)}
        self._client.log_dict(self._id, columns, "samples.json")
        shown = json.dumps([{"path": "samples.json", "type": "table"}])
        self._client.set_tag(self._id, "mlflow.loggedArtifacts", shown)

    def finish(self, results: dict[str, Any]) -> None:
        """Log the results and end the run."""
        self._client.log_dict(self._id, results, "results.json")
        self._client.set_terminated(self._id, STATUS.get(results.get("status", ""), "KILLED"))
