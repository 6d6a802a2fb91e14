"""What alerts say, when they are silent, and what they give to the command of the user."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sft.config.secrets import shown
from sft.config.watch_settings import AlertConfig
from sft.errors import ConfigError
from sft.files import read_records
from sft.train import main
from sft.watch import alerts as alerts_module
from sft.watch import bounded
from sft.watch.alerts import Alerts
from sft.watch.machine import FLOOR, MEASURED, PATIENCE, Disk, Stall


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def kinds(folder: Path) -> list[tuple[str, int, list[int]]]:
    found = read_records(folder / "alerts.jsonl") if (folder / "alerts.jsonl").exists() else []
    return [(record["kind"], record["step"], record["rows"]) for record in found]


def test_a_stall_is_alerted_while_the_main_thread_waits(tmp_path: Path) -> None:
    alerts = Alerts(AlertConfig(stall=2.0), tmp_path / "alerts.jsonl")
    stall = Stall(alerts, floor=0.0, poll=0.005)
    state = SimpleNamespace(global_step=0)
    threads = threading.active_count()
    stall.on_train_begin(None, state, None)
    for _ in range(MEASURED):
        time.sleep(0.01)
        state.global_step += 1
        stall.on_step_end(None, state, None)
    until(lambda: kinds(tmp_path))
    assert kinds(tmp_path) == [("stall", 5, [])]
    message = read_records(tmp_path / "alerts.jsonl")[0]["message"]
    assert message.startswith("no step has ended for 0 s after step 5; a step takes 0.0")
    stall.on_step_end(None, state, None)
    assert alerts.is_new("stall")
    stall.close()
    until(lambda: threading.active_count() == threads)


def test_a_stall_needs_a_minute_and_more_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    alerts = Alerts(AlertConfig(stall=20.0), tmp_path / "alerts.jsonl")
    stall = Stall(alerts)
    stall.seconds.extend([1.0] * (MEASURED - 1))
    assert stall.limit() is None
    stall.seconds.extend([1.0, 60.0])
    assert stall.limit() == FLOOR
    with alerts.patiently():
        assert stall.limit() == PATIENCE
    stall.seconds.extend([10.0] * 20)
    assert stall.limit() == 200.0
    alerts.settings.stall = None
    assert stall.limit() is None


def test_a_disk_with_room_for_few_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alerts = Alerts(AlertConfig(disk=2.0), tmp_path / "alerts.jsonl")
    disk, free = Disk(alerts, tmp_path), [10_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    model = torch.nn.Linear(10, 30, bias=False)
    disk.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    assert (disk.size, kinds(tmp_path)) == (300 * 16, [])
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "weights").write_bytes(bytes(6_000))
    for step, space in ((4, 30_000), (5, 9_000), (6, 8_000), (7, 30_000), (8, 7_000)):
        free[0] = space
        disk.on_log(None, SimpleNamespace(global_step=step), None)
    assert kinds(tmp_path) == [("disk", 5, []), ("disk", 8, [])]
    assert "room for fewer than 2 checkpoints of 0.0 MiB" in (tmp_path / "alerts.jsonl").read_text()


def test_the_command_gets_the_alert_and_its_failure_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    heard = tmp_path / "heard"
    command = f"cat >> {heard}; echo no such host >&2; exit 3"
    alerts = Alerts(AlertConfig(), tmp_path / "alerts.jsonl", command)
    with caplog.at_level("INFO", "sft"):
        for kind in ("nan", "nan", "disk"):
            alerts.add(kind, 7, "it went wrong", range(2000))
        until(lambda: heard.exists() and heard.read_text().count("\n") == 2)
        until(lambda: "on_alert" in caplog.text)
    given = json.loads(heard.read_text().splitlines()[0])
    written = read_records(tmp_path / "alerts.jsonl")
    assert given.pop("run") == str(tmp_path) and given in written
    assert given["step"] == 7 and given["rows"] == list(range(1000))
    assert caplog.text.count("on_alert: the command ended with code 3: no such host") == 1


def test_a_command_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alerts_module, "LIMIT", 0.2)
    alerts = Alerts(AlertConfig(), tmp_path / "alerts.jsonl", "sleep 1000 & sleep 1000")
    with caplog.at_level("INFO", "sft"):
        alerts.add("nan", 1, "it went wrong")
        until(lambda: "code 124: it was ended after 0.2 seconds" in caplog.text)


@pytest.mark.parametrize(
    ("command", "code"), [("yes >&2", bounded.LATE), ("yes >&2 & sleep 0.1; exit 3", 3)]
)
def test_a_command_that_floods_fills_no_disk_and_is_ended(command: str, code: int) -> None:
    """Also if it leaves the flood in the background."""
    words = [sys.executable, "-I", bounded.__file__, "0.3", command]
    ended = subprocess.run(words, capture_output=True, timeout=30)
    assert ended.returncode == code
    assert 0 < len(ended.stderr) <= bounded.MOST


def test_a_file_that_cannot_be_written_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alerts = Alerts(AlertConfig(), tmp_path / "gone" / "alerts.jsonl")
    with caplog.at_level("INFO", "sft"):
        alerts.add("nan", 1, "one")
        alerts.add("disk", 1, "two")
    assert caplog.text.count("cannot be written") == 1
    assert "alert (nan): one" in caplog.text and "alert (disk): two" in caplog.text


def test_a_command_that_is_kept_shows_no_secret() -> None:
    words = ["+on_alert=curl https://hook/T0", "model.token=hf_x", "lora.r=8", "model.eos_token=a"]
    assert [shown(word) for word in words] == [
        *("+on_alert=(not shown)", "model.token=(not shown)", "lora.r=8", "model.eos_token=a")
    ]


def test_only_the_command_line_sets_the_command(tmp_path: Path) -> None:
    """Neither a settings file, nor an option of one's own, nor the values that one sweeps."""
    word = "on_alert=mail -s alert me, or you"
    assert main.compose([word]).on_alert == "mail -s alert me, or you"
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("on_alert: rm -rf ~\n")
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "one.yaml").write_text("# @package _global_\non_alert: rm -rf ~\n")
    text = "# @package _global_\nhydra: {sweeper: {params: {on_alert: 'a,b', ++seed: '1,2'}}}\n"
    (folder / "grid.yaml").write_text(text)
    said = "on_alert=.*\n.*is taken from the command line only, because it runs a command on this"
    for words, where in (
        ([str(theirs)], None),
        (["experiment=one"], str(tmp_path / "conf")),
        (["experiment=grid"], str(tmp_path / "conf")),
    ):
        with pytest.raises(ConfigError, match=said) as refused:
            main.compose([*words], where)
        assert "read that command, then add on_alert=" in str(refused.value).replace("'", "")
    assert main.compose([str(theirs), word]).on_alert == "mail -s alert me, or you"
