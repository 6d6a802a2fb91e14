"""What stops a run after a step, and what it says: the guard without a trainer."""

import math
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from sft.config.watch_settings import AlertConfig
from sft.errors import RunError, Stopped
from sft.files import read_records
from sft.training.guard import RECENT, SKIPS, Guard
from sft.training.signals import INTERRUPTED, STOPPED, Signals
from sft.watch.alerts import Alerts


class Steps:
    """Reports steps to a guard as the trainer does."""

    def __init__(self, folder: Path, jump: float | None = None, on_nan: str = "stop") -> None:
        self.signals = Signals()
        args = TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
        self.guard = Guard(args, self.signals, self.rows_of, jump, on_nan)
        self.args, self.state = args, TrainerState(max_steps=100)

    @staticmethod
    def rows_of(step: int, micro_batches: Sequence[int]) -> list[int]:
        return [100 * step + number for number in micro_batches]

    def make(self, *losses: float, norm: Any = 1.0) -> TrainerControl:
        self.state.global_step += 1
        self.guard.losses.extend(torch.tensor(loss) for loss in losses)
        self.guard.norm = norm
        control = TrainerControl(should_evaluate=True)
        self.guard.on_step_end(self.args, self.state, control)
        return control


def test_a_loss_that_is_not_finite_stops_with_its_rows(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    steps.make(0.5, 0.25)
    assert list(steps.guard.recent) == [0.75] and steps.guard.losses == []
    said = (
        r"step 2: the loss is nan \(rows 201\); there is no checkpoint yet\n    fix: .*on_nan=skip"
    )
    with pytest.raises(RunError, match=said):
        steps.make(0.5, math.nan)
    (tmp_path / "checkpoint-1").mkdir()
    said = r"step 3: the gradient norm is inf \(rows 300, 301\); the last good checkpoint is .*-1\n"
    with pytest.raises(RunError, match=said):
        steps.make(0.5, 0.25, norm=torch.tensor(math.inf))


def test_skipped_steps_are_counted_and_too_many_stop(tmp_path: Path) -> None:
    steps = Steps(tmp_path, on_nan="skip")
    for _ in range(SKIPS - 1):
        steps.make(math.nan)
    steps.make(1.0)
    assert steps.guard.state() == {"recent": [1.0], "skipped": SKIPS - 1, "alerts": []}
    with pytest.raises(RunError, match=f"{SKIPS} steps in a row were skipped"):
        for _ in range(SKIPS):
            steps.make(math.nan)


def test_a_jump_is_measured_against_the_recent_losses_of_a_checkpoint_too(tmp_path: Path) -> None:
    first, resumed = Steps(tmp_path, jump=3.0), Steps(tmp_path, jump=3.0)
    for loss in (9.0, *[1.0] * (RECENT - 1)):  # whose average is 1.4
        first.make(loss)
    first.make(4.0)  # 2.9 times that
    resumed.guard.restore(first.guard.state())
    with pytest.raises(RunError, match=r"step 1: the loss jumped to 4, from 1.15 on average over"):
        resumed.make(4.0)


def test_a_signal_saves_and_stops(tmp_path: Path) -> None:
    steps = Steps(tmp_path)
    assert not steps.guard.asked() and not steps.make(1.0).should_training_stop
    steps.signals.received = signal.SIGTERM
    control = steps.make(1.0)
    assert control.should_save and control.should_training_stop and not control.should_evaluate
    assert steps.guard.asked()
    for received, code in ((signal.SIGTERM, STOPPED), (signal.SIGINT, INTERRUPTED)):
        steps.signals.received = received
        with pytest.raises(Stopped, match="after step 2, which is saved; give the same") as stopped:
            steps.guard.stop(2)
        assert stopped.value.exit_code == code
    with pytest.raises(Stopped, match="stopped by SIGINT before the first step"):
        steps.guard.stop(0)


def guarded(folder: Path, on_nan: str = "skip", **settings: Any) -> tuple[Steps, Alerts]:
    """Give a guard whose alerts are written to a folder."""
    steps = Steps(folder, on_nan=on_nan)
    alerts = Alerts(AlertConfig(**settings), folder / "alerts.jsonl")
    steps.guard.alerts = alerts
    return steps, alerts


def alerted(folder: Path) -> list[tuple[str, int, list[int]]]:
    found = read_records(folder / "alerts.jsonl")
    return [(record["kind"], record["step"], record["rows"]) for record in found]


def test_each_kind_is_alerted_once_until_it_has_recovered(tmp_path: Path) -> None:
    steps, _ = guarded(tmp_path, loss_jump=3.0)
    for loss in [math.nan, math.nan, *[1.0] * RECENT, 2.9, math.nan]:
        steps.make(loss)
    assert alerted(tmp_path) == [("nan", 1, [100]), ("nan", 24, [2400])]
    for loss in (9.0, 20.0, 1.0, 9.0):  # the mean of 20 is 1.1, 1.5, 2.4 and 2.4
        steps.make(loss, 0.0)
    jumps = [("loss_jump", 25, [2500, 2501]), ("loss_jump", 28, [2800, 2801])]
    assert alerted(tmp_path)[2:] == jumps
    message = read_records(tmp_path / "alerts.jsonl")[2]["message"]
    assert (
        message
        == "step 25: the loss jumped to 9, from 1.095 on average over 20 steps (rows "
        + ("2500, 2501)")
    )


def test_a_loss_near_0_may_be_many_times_the_others(tmp_path: Path) -> None:
    steps, _ = guarded(tmp_path, loss_jump=3.0)
    for loss in [*[0.01] * RECENT, 0.4]:
        steps.make(loss)
    assert not (tmp_path / "alerts.jsonl").exists()
    steps.make(0.6)  # the mean of 20 is 0.03
    assert alerted(tmp_path) == [("loss_jump", RECENT + 2, [2200])]


def test_what_stops_a_run_is_alerted_first(tmp_path: Path) -> None:
    steps, _ = guarded(tmp_path, on_nan="stop", loss_jump=None)
    with pytest.raises(RunError, match="the loss is nan"):
        steps.make(math.nan)
    assert alerted(tmp_path) == [("nan", 1, [100])]
    other = tmp_path / "other"
    other.mkdir()
    steps, _ = guarded(other, loss_jump=None)
    steps.guard.max_loss_jump = 2.0
    for _ in range(RECENT):
        steps.make(1.0)
    with pytest.raises(RunError, match="the loss jumped to 3"):
        steps.make(3.0)
    assert alerted(other) == [("loss_jump", RECENT + 1, [2100])]


def test_a_resumed_run_has_each_alert_once(tmp_path: Path) -> None:
    steps, alerts = guarded(tmp_path)
    steps.make(math.nan)
    saved = steps.guard.state()
    assert saved["alerts"] == ["nan"]
    steps.make(1.0)
    steps.make(math.nan)
    alerts.add("disk", 3, "full")
    resumed, alerts = guarded(tmp_path)
    alerts.on_train_begin(None, SimpleNamespace(global_step=1), None)
    assert alerted(tmp_path) == [("nan", 1, [100]), ("disk", 3, [])]
    resumed.guard.restore(saved)
    resumed.state.global_step = 1
    for loss in (math.nan, 1.0, math.nan):
        resumed.make(loss)
    assert alerted(tmp_path)[2:] == [("nan", 4, [400])]
