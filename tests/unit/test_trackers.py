"""Trackers get each step of a run once; with the real packages, without a network."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trackers as sent
from unit.test_checks import legal_config

from sft.config import packages, saved
from sft.config.secrets import HIDDEN, without_secrets
from sft.errors import RunError
from sft.run import record
from sft.run.lock import Lock
from sft.watch import tracker_process, trackers
from sft.watch.tracker_process import SERVICES, Sender
from sft.watch.tracker_run import TrackedRun, tracked

AT_END = {"status": "finished", "seconds": 2.0, "final": {"steps": 40, "loss": 0.5}}


def needs(name: str) -> None:
    missing = [module for module in packages.TRACKERS[name] if not packages.installed(module)]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the trackers' files in the folder of the test, and off the network."""
    for name, value in trackers.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    if "trackio.utils" in sys.modules:
        for module in ("trackio.utils", "trackio.sqlite_storage"):
            monkeypatch.setattr(sys.modules[module], "TRACKIO_DIR", tmp_path / "trackio")


def logged(*steps: int) -> str:
    """Return lines of metrics.jsonl: each step's loss, and each twentieth's evaluation."""
    lines = []
    for step in steps:
        lines.append({"step": step, "time": 1e9 + step, "loss": 1 / step, "epoch": 0.1})
        if step % 20 == 0:
            lines.append({"step": step, "eval_loss": 2 / step, "eval_perplexity": None, "epoch": 1})
    return "".join(json.dumps(line) + "\n" for line in lines)


def log(run: Path, steps: range, end: str = "") -> None:
    (run / record.METRICS).write_text(logged(*steps) + end)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep" / "r=4"
    folder.mkdir(parents=True)
    (folder.parent / record.SWEEP).write_text("[]")
    config = legal_config(on_alert="curl https://hooks.test/T0/sesame", seed=7)
    config.dataset.path = "https://me:sesame@host/rows.jsonl?X-Signature=sesame&part=1"
    (folder / record.SETTINGS).write_text(saved.to_yaml(config))
    begun = {"status": "running", "command": "sft train x=sesame", "versions": {"torch": "2"}}
    record.write(folder, begun)
    (folder / record.AUDIT).write_text('{"settings": {"path": "sesame"}, "rows": 12}')
    return folder


def once(name: str, run: Path, last: int) -> None:
    """Check that the tracker has each figure of metrics.jsonl at each step once, and no other."""
    names = "train/loss", "train/epoch"
    expected = {(each, step) for step in range(10, last + 1, 10) for each in names}
    expected |= {("eval/loss", step) for step in range(20, last + 1, 20)}
    assert sent.READERS[name](run) == dict.fromkeys(expected, 1)


# A run is killed after step 30 and after step 40, each time with steps after its last checkpoint,
# which the next process logs again, and once within a line.
@pytest.mark.parametrize("name", ["tensorboard", "mlflow", "trackio"])
def test_a_run_that_was_killed_twice_has_each_step_once(name: str, run: Path) -> None:
    needs(name)
    tracked(run)
    log(run, range(10, 31, 10), '{"step": 40, "los')
    Sender(run, name).catch_up()  # and is killed
    once(name, run, 30)
    log(run, range(10, 21, 10))
    second = Sender(run, name)
    second.catch_up()
    log(run, range(10, 41, 10))
    second.catch_up()  # and is killed
    log(run, range(10, 21, 10))
    third = Sender(run, name)
    third.catch_up()
    log(run, range(10, 61, 10))
    record.write(run, record.read(run) | AT_END)
    third.finish()
    once(name, run, 60)


def test_wandb_offline_is_recorded_anew_by_each_process(run: Path) -> None:
    needs("wandb")
    log(run, range(10, 31, 10))
    tracked(run)
    follower = trackers.Follower(run, "wandb", 30)
    deadline = time.monotonic() + 60
    while not follower.where:
        assert time.monotonic() < deadline, (run / record.TRACKERS_LOG).read_text()
        time.sleep(0.05)
    os.killpg(follower._process.pid, signal.SIGKILL)
    follower.wait()
    log(run, range(10, 61, 10))
    record.write(run, record.read(run) | AT_END)
    (run / record.SAMPLES).write_text('{"step": 0, "prompt": "p", "answer": "a"}\n')
    (shown,) = trackers.replay(run, ["wandb"]).values()
    once("wandb", run, 60)
    (folder,) = run.glob("wandb/offline-run-*")
    assert shown == f"wandb sync {folder}"
    records = sent.wandb_records(run)
    about = next(item.run for item in records if item.HasField("run"))
    assert (about.run_id, about.run_group) == (tracked(run)["id"], "sweep")
    assert (about.display_name, about.project) == ("r=4", "sft")
    assert {item.key: item.value_json for item in about.config.update}.keys() >= {"settings", "run"}
    summary = {i.key or i.nested_key[0]: i.value_json for r in records for i in r.summary.update}
    assert json.loads(summary["final"])["loss"] == 0.5 and "samples" in summary
    assert b"sesame" not in b"".join(file.read_bytes() for file in folder.rglob("*.wandb"))


def test_mlflow_gets_the_settings_samples_and_results(run: Path) -> None:
    needs("mlflow")
    log(run, range(10, 21, 10))
    (run / record.SAMPLES).write_text('{"step": 0, "prompt": "p", "answer": "a"}\n')
    sender = Sender(run, "mlflow")
    record.write(run, record.read(run) | AT_END | {"status": "stopped"})
    (run / record.MERGED).mkdir()
    (run / record.MERGED / record.MERGE_REPORT).write_text('{"passed": true}')
    sender.finish()
    client: Any = sender.service._client  # type: ignore[attr-defined]
    (found,) = client.search_runs([client.get_experiment_by_name("sft").experiment_id])
    assert (found.info.run_name, found.info.status) == ("r=4", "KILLED")
    assert found.data.params["seed"] == "7" and found.data.tags["sft.group"] == "sweep"
    assert found.data.params["on_alert"] == HIDDEN
    folder = run.parent / "mlflow-artifacts" / found.info.run_id / "artifacts"
    assert json.loads((folder / "samples.json").read_text())["data"] == [[0, "p", "a", None]]
    assert json.loads((folder / "results.json").read_text())["merge"] == {"passed": True}
    assert json.loads((folder / "data.json").read_text()) == {"rows": 12}
    assert not any("sesame" in file.read_text() for file in folder.iterdir())


def test_tensorboard_and_trackio_get_the_samples_once(run: Path) -> None:
    needs("tensorboard")
    needs("trackio")
    log(run, range(10, 11, 10))
    answers = [{"step": step, "prompt": "p|q", "answer": "a\nb"} for step in (0, 10)]
    tracked(run)
    for count in (1, 2, 2):
        text = "".join(json.dumps(answer) + "\n" for answer in answers[:count])
        (run / record.SAMPLES).write_text(text)
        for name in ("tensorboard", "trackio"):
            sender = Sender(run, name)
            sender.catch_up()
            sender.finish()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from trackio.sqlite_storage import SQLiteStorage

    events = EventAccumulator(str(run)).Reload()
    cells = [(item.step, item.tensor_proto.string_val[0]) for item in events.Tensors("samples")]
    assert [step for step, _ in cells] == [0, 10]
    assert cells[0][1].endswith(b"\n| 0 | p\\|q | a<br>b |  |")
    rows = SQLiteStorage.get_logs("sft", "r=4")
    assert [row["step"] for row in rows if "samples" in row] == [0, 10]
    config = SQLiteStorage.get_run_config("sft", "r=4")
    assert config["_Group"] == "sweep" and config["settings"]["seed"] == 7


def test_only_whole_lines_are_read_and_only_once(run: Path) -> None:
    reader = TrackedRun(run)
    assert reader.new_rows() == []
    log(run, range(10, 21, 10), '{"step": 30')
    rows = reader.new_rows()
    assert [(row.step, row.place) for row in rows] == [(10, 0), (20, 0), (20, 1)]
    assert rows[0].time == 1e9 + 10
    assert (rows[2].place, rows[2].figures) == (1, {"eval/loss": 0.1})
    assert reader.new_rows() == []
    log(run, range(10, 31, 10))
    assert [row.step for row in reader.new_rows()] == [30]


def test_secrets_are_not_sent(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_TOKEN", "open-sesame")
    sent_on = TrackedRun(run).facts()
    assert sent_on["settings"]["dataset"]["path"] == (
        f"https://host/rows.jsonl?X-Signature={HIDDEN}&part=1"
    )
    assert sent_on["settings"]["on_alert"] == HIDDEN
    assert sent_on["run"] == {"versions": {"torch": "2"}} and sent_on["data"] == {"rows": 12}
    kept = {"eos_token": "</s>", "path": "s3://bucket/x", "list": ["a"], "n": 1}
    assert without_secrets(kept) == kept
    hidden = {"hub_token": "x", "a": ["hf_abcdefghijklmno"], "b": "see open-sesame here"}
    assert without_secrets(hidden) == {"hub_token": HIDDEN, "a": [HIDDEN], "b": HIDDEN}


class Down:
    """Stands for a tracker whose server cannot be reached."""

    def __init__(self, run: TrackedRun) -> None:
        raise ConnectionError("no route to host\nmore")


def test_a_tracker_that_fails_is_reported_and_tried_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SERVICES, "trackio", Down)
    monkeypatch.setattr(tracker_process, "RETRY", 0.0)
    told: list[dict[str, Any]] = []

    class Trainer:
        looks = 0

        def tell(self, **what: Any) -> None:
            told.append(what)

        def has_ended(self, seconds: float) -> bool:
            self.looks += 1
            return self.looks == 3

    trainer: Any = Trainer()
    assert tracker_process.follow(run, "trackio", trainer, 0) == 1
    assert told == [{"error": "ConnectionError: no route to host"}] * 3


HOLD = """
import fcntl, sys
held = open(sys.argv[1], "ab")
fcntl.lockf(held, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_tracker_that_hangs_does_not_hold_the_end_of_a_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process waits for the lock of one that still sends, as for a silent server."""
    monkeypatch.setattr(trackers, "LIMIT", 0.2)
    monkeypatch.setattr(trackers, "GRACE", 0.2)
    words = [sys.executable, "-c", HOLD, str(run / record.TRACKERS_LOG)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with caplog.at_level(logging.INFO, "sft"), trackers.delivered():
            trackers.start(run, {"tensorboard": True})
        other.kill()
    assert f"sft report {run} tracker=tensorboard sends the rest" in caplog.text
    assert "it did not end in time" in caplog.text


def test_a_replay_refuses_what_is_no_run_or_sends_itself(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        trackers.replay(tmp_path, ["trackio"])
    (run / record.SETTINGS).write_text(saved.to_yaml(legal_config(tracker__trackio=True)))
    lock = Lock(run)
    lock.take()
    try:
        with pytest.raises(RunError, match="goes on, and sends to trackio itself"):
            trackers.replay(run, ["trackio"])
    finally:
        lock.release()
