"""The settings of the sections sample, tracker, profile, report and alert: how a run is watched.

None of them changes what is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.config.rules import LARGEST_SEED, above, at_least, between, setting, share


@dataclass
class SampleConfig:
    """Answers that the model generates while it trains."""

    every: int | None = setting(
        None,
        "optimizer steps between samples, which are also taken before the first step and after the "
        "last; null: no samples",
        at_least(1),
        changes_training=False,
    )
    prompts: Any = setting(
        None,
        "what is answered: a list of prompts, or a file of them, which is read again each time: "
        "lines of a .txt, or rows in any format of a dataset; null: held-out rows",
        path="read",
        changes_training=False,
    )
    num: int = setting(
        4,
        "number of prompts that are answered, from the first",
        at_least(1),
        changes_training=False,
    )
    max_new_tokens: int = setting(
        64, "tokens in an answer, at most", between(1, 1 << 24), changes_training=False
    )
    temperature: float | None = setting(
        None,
        "temperature of sampling; null: greedy",
        at_least(1e-3),
        changes_training=False,
    )
    top_k: int = setting(
        0,
        "sample from this number of the most probable tokens; 0: from all",
        at_least(0),
        changes_training=False,
        null=0,
    )
    top_p: float = setting(
        1.0,
        "sample from the tokens of this total probability",
        share(),
        changes_training=False,
    )
    repetition_penalty: float = setting(
        1.0,
        "divides the probability of tokens that have occurred (arXiv:1909.05858); 1: none",
        above(0),
        changes_training=False,
    )
    seed: int = setting(0, "seed of the sampling", between(0, LARGEST_SEED), changes_training=False)


@dataclass
class TrackerConfig:
    """Where the figures of a run are also shown, besides its own folder."""

    tensorboard: bool = setting(
        False,
        "true: write TensorBoard's event files into the run's folder",
        changes_training=False,
    )
    wandb: bool = setting(False, "true: log to Weights & Biases", changes_training=False)
    mlflow: bool = setting(False, "true: log to MLflow", changes_training=False)
    trackio: bool = setting(False, "true: log to Trackio", changes_training=False)
    project: str = setting(
        "sft",
        "project of W&B and Trackio, experiment of MLflow",
        changes_training=False,
        decides=("train.project",),
    )
    group: str | None = setting(
        None,
        "name that joins several runs; null: the sweep of a trial, and none for a single run",
        changes_training=False,
    )
    uri: str | None = setting(
        None,
        "MLflow's tracking URI; null: MLFLOW_TRACKING_URI, or mlflow.db beside the run's folder",
        changes_training=False,
    )


@dataclass
class ProfileConfig:
    """Where the time and the memory of a run go."""

    torch: bool = setting(
        False,
        "true: record some steps with PyTorch's profiler, into profile/ of the run's folder",
        changes_training=False,
    )
    system: bool = setting(
        False,
        "true: record the use of CPU, memory, disk, network and GPUs while the run goes on, into "
        "system.jsonl",
        changes_training=False,
    )
    start: int = setting(
        3, "with torch: the first step that is recorded", at_least(1), changes_training=False
    )
    steps: int = setting(
        3, "with torch: number of steps that are recorded", between(1, 100), changes_training=False
    )
    interval: float = setting(
        5.0,
        "with system: seconds between two records",
        between(0.1, 86_400),
        changes_training=False,
    )


@dataclass
class ReportConfig:
    """The page report.html, which every run writes at its end."""

    every: int | None = setting(
        None,
        "optimizer steps after which the page is also written while the run goes on; null: only at "
        "the end",
        at_least(1),
        changes_training=False,
    )


@dataclass
class AlertConfig:
    """What counts as an alert: it is logged, written to alerts.jsonl, and given to on_alert."""

    loss_jump: float | None = setting(
        3.0,
        "the loss of a step is more than this many times the mean of the 20 previous steps, and "
        "0.5 nats above it; null: no such alert. train.max_loss_jump stops the run",
        above(1),
        changes_training=False,
    )
    stall: float | None = setting(
        20.0,
        "no step has ended for this many times the median time of a step, and for a minute; null: "
        "no such alert",
        above(1),
        changes_training=False,
    )
    disk: float | None = setting(
        2.0,
        "the disk of the run's folder has room for fewer than this many checkpoints; null: no such "
        "alert",
        above(0),
        changes_training=False,
    )
