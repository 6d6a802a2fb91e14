"""What profile=torch and profile=system record, and what they do when they cannot."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from unit.test_checks import legal_config

from sft import process
from sft.config import packages
from sft.config.checks import check
from sft.config.settings import ProfileConfig
from sft.errors import ConfigError
from sft.files import read_records
from sft.plan import schedule
from sft.watch import recording, system
from sft.watch.profile import TorchProfile

MIB = 1 << 20

# profile=torch


class Loop:
    """A training loop with the methods that are recorded, around one product of matrices."""

    def __init__(self) -> None:
        self.args = SimpleNamespace(process_index=0)
        self.accelerator, self.deepspeed = self, None
        self.weight = torch.nn.Parameter(torch.ones(8, 8))
        self.optimizer = torch.optim.SGD([self.weight], 0.1)
        self.state = SimpleNamespace(global_step=0)

    def get_batch_samples(self) -> torch.Tensor:
        return torch.ones(2, 8)

    def compute_loss(self, rows: torch.Tensor) -> torch.Tensor:
        return (rows @ self.weight).sum()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def evaluate(self) -> None:
        torch.relu(self.weight)

    def train(self, callback: TorchProfile, steps: int, evaluates_after: int = 0) -> None:
        callback.on_train_begin(self.args, self.state, None)
        for _ in range(steps):
            rows = self.get_batch_samples()
            loss = self.compute_loss(rows)
            self.accelerator.backward(loss)
            self.optimizer.step()
            self.state.global_step += 1
            callback.on_step_end(self.args, self.state, None)
            if self.state.global_step == evaluates_after:
                self.evaluate()
        callback.on_train_end(self.args, self.state, None)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, "sft"):
        yield caplog


def recorded(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "operations_rank0.json").read_text())
    return found


def test_an_evaluation_ends_the_recording(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    with TorchProfile(loop, ProfileConfig(start=2, steps=5), tmp_path / "profile") as callback:
        loop.train(callback, 5, evaluates_after=3)
    assert said.messages == [
        f"profile=torch: the trace of steps 2 to 3 is in {tmp_path / 'profile'}"
    ]
    found = recorded(tmp_path / "profile")
    assert (found["steps"], found["device"]) == ([2, 3], "cpu")
    counts = {phase["name"]: phase["calls"] for phase in found["phases"]}
    assert counts == {"data": 2, "forward": 2, "backward": 2, "optimizer": 2}
    calls = {each["name"]: each["calls"] for each in found["operations"]}
    # In each step, the product and that of its gradient.
    assert calls["aten::mm"] == 4 and "aten::relu" not in calls
    assert sum(each["share"] for each in found["operations"]) == pytest.approx(1, abs=0.01)
    assert "aten::mm" in (tmp_path / "profile" / "operations_rank0.txt").read_text()
    assert len(list((tmp_path / "profile").iterdir())) == 3


def test_a_second_ctrl_c_ends_without_writing(tmp_path: Path) -> None:
    loop = Loop()
    with (
        pytest.raises(KeyboardInterrupt),
        TorchProfile(loop, ProfileConfig(start=1, steps=5), tmp_path / "profile") as callback,
    ):
        callback.on_train_begin(loop.args, loop.state, None)
        loop.get_batch_samples()
        raise KeyboardInterrupt
    assert not (tmp_path / "profile").exists()
    assert loop.get_batch_samples() is not None  # the trainer's own methods are back
    assert not torch.autograd.profiler._is_profiler_enabled


def test_the_run_goes_on_if_the_recording_cannot_be_written(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "profile").touch()
    loop = Loop()
    with TorchProfile(loop, ProfileConfig(start=1, steps=1), tmp_path / "profile") as callback:
        loop.train(callback, 3)
    (line,) = said.messages
    assert line.startswith(f"profile=torch: {tmp_path / 'profile'} is incomplete: [Errno 17]")
    assert loop.state.global_step == 3


def test_a_trace_that_the_library_could_not_finish_is_deleted(tmp_path: Path) -> None:
    from sft.watch import profile

    full = SimpleNamespace(
        export_chrome_trace=lambda path: Path(path).write_text('{"traceEvents": [')
    )
    with pytest.raises(OSError, match=r"the disk is full: .*\.json is incomplete"):
        profile._write_trace(full, tmp_path / "trace_rank0.json.gz")
    assert list(tmp_path.iterdir()) == []


def test_a_different_profiler_of_the_process_goes_on(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    loop = Loop()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as other,
        TorchProfile(loop, ProfileConfig(start=1, steps=1), tmp_path / "profile") as callback,
    ):
        loop.train(callback, 2)
    assert said.messages == ["profile=torch cannot record: this process is being profiled already"]
    assert not (tmp_path / "profile").exists()
    assert {each.key: each.count for each in other.key_averages()}["aten::mm"] == 4


def test_what_is_not_recorded_is_said(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    settings = ProfileConfig(start=4, steps=2)
    loop = Loop()
    with TorchProfile(loop, settings, tmp_path / "profile") as callback:
        loop.train(callback, 2)  # an early stop
    loop.state.global_step = 5
    with TorchProfile(loop, settings, tmp_path / "profile") as callback:
        loop.train(callback, 1)
    assert said.messages == [
        "profile=torch has recorded nothing: training ended with step 2, before profile.start=4",
        "profile=torch records nothing: the run goes on after step 5; profile.start=8 records "
        "steps that follow",
    ]


def frame(name: str) -> dict[str, Any]:
    return {"filename": name, "line": 7, "name": "forward"}


def event(action: str, addr: int, size: int, time_us: int, *frames: str) -> dict[str, Any]:
    return {
        **{"action": action, "addr": addr, "size": size, "time_us": time_us},
        "frames": [frame(name) for name in frames],
    }


def test_memory_at_its_peak_is_that_of_the_code_that_allocated_it() -> None:
    """100 bytes before; 40 of them are freed, then 300, 50 and 50 come; the 300 go."""
    inside = f"{recording.TORCH}/nn/functional.py"
    events = [
        event("free_requested", 1, 40, 10),
        event("free_completed", 1, 40, 10),
        event("segment_alloc", 9, 1000, 15),
        event("alloc", 2, 300, 20, inside, "head.py"),
        event("alloc", 3, 50, 1_000_030),
        event("alloc", 4, 50, 1_000_040, "lora.py", "head.py"),
        event("free_completed", 2, 300, 2_000_010),
        event("alloc", 5, 10, 2_000_020, "late.py"),
    ]
    snapshot = {
        "device_traces": [[], events],
        "segments": [
            {"device": 0, "active_size": 7777},
            {"device": 1, "active_size": 60 + 50 + 50 + 10},
        ],
    }
    assert recording.at_peak(snapshot, 1) == {
        "device": 1,
        "peak": 460,
        "before": 60,
        "held": [
            {"where": "head.py:7 forward", "bytes": 300, "blocks": 1},
            {"where": "backward pass", "bytes": 50, "blocks": 1},
            {"where": "lora.py:7 forward", "bytes": 50, "blocks": 1},
        ],
        "curve": [
            *([0.0, 60], [0.00001, 360], [1.00002, 410], [1.00003, 460]),
            *([2.0, 160], [2.00001, 170]),
        ],
    }
    assert recording.at_peak({"device_traces": [[]], "segments": []}, 0) == {
        **{"device": 0, "peak": 0, "before": 0, "held": [], "curve": []},
    }


def test_the_curve_of_memory_keeps_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "POINTS", 10)
    sizes = [1] * 73 + [900] + [1] * 25
    events = []
    for number, size in enumerate(sizes):
        events += [event("alloc", number, size, 2 * number)]
        events += [event("free_completed", number, size, 2 * number + 1)]
    snapshot = {"device_traces": [events], "segments": []}
    curve = recording.at_peak(snapshot, 0)["curve"]
    assert len(curve) == 10
    assert max(curve, key=lambda point: point[1]) == [146 / 1e6, 900]


def test_steps_that_the_run_does_not_reach_are_refused() -> None:
    (problem,) = check(legal_config(profile__torch=True, train__max_steps=2))
    assert (problem.setting, problem.rule, problem.fix) == (
        *("profile.start=3", "is after the last step, 2", "profile.start=1"),
    )
    config = legal_config(profile__torch=True, profile__start=8, train__num_train_epochs=2.0)
    config.train.global_batch_size = config.train.per_device_train_batch_size = 4
    assert check(config) == []
    with pytest.raises(ConfigError, match=r"profile.start=8\n.* last step, 6\n.*start=4"):
        schedule.require(config, samples=12)
    schedule.require(config, samples=16)
    config.profile.torch = False
    schedule.require(config, samples=12)


# profile=system


def test_a_record_has_the_use_of_the_machine(tmp_path: Path) -> None:
    lines: list[str] = []
    usage = system.Usage(lines.append)
    assert usage.since_last() == {}  # nothing is measured over a moment
    before = system.memory_of([psutil.Process()])
    code = f"a = bytearray({64 * MIB}); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        child.stdout.readline()
        time.sleep(system.SHORTEST)
        found = usage.since_last()
        child.stdin.close()
    assert list(found) == [
        *("time", "cpu", "memory", "memory_free", "disk_read", "disk_written"),
        *("network_sent", "network_received", "gpus"),
    ]
    assert found["time"] == pytest.approx(time.time(), abs=60)
    assert 0 < found["cpu"] <= 1
    assert 64 * MIB < found["memory"] - before < 128 * MIB
    assert 0 < found["memory_free"] <= psutil.virtual_memory().total
    assert found["gpus"] == [] and lines == []


def test_rates_are_per_second(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = system.Usage(print)
    usage._counted = {
        "disk_read": 1000,
        "disk_written": None,
        "network_sent": 10,
        "network_received": 9,
    }
    usage._at = time.monotonic() - 2
    after = {"disk_read": 5000, "disk_written": None, "network_sent": 10, "network_received": 4}
    monkeypatch.setattr(system, "counters", lambda: after)
    found = usage.since_last()
    assert found["disk_read"] == pytest.approx(2000, rel=0.2)
    assert (found["disk_written"], found["network_sent"]) == (None, 0)
    assert found["network_received"] == 0  # a card was restarted


def test_traffic_within_the_machine_is_no_traffic(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(bytes_sent=5, bytes_recv=7)
    loop = SimpleNamespace(bytes_sent=1000, bytes_recv=1000)
    monkeypatch.setattr(
        psutil, "net_io_counters", lambda pernic: {"lo": loop, "eth0": card, "eth1": card}
    )

    def hidden() -> None:
        raise NotImplementedError("/proc/diskstats nor /sys/block are available")

    monkeypatch.setattr(psutil, "disk_io_counters", hidden)
    assert system.counters() == {
        **{"disk_read": None, "disk_written": None},
        **{"network_sent": 10, "network_received": 14},
    }


def test_a_gpu_that_does_not_tell_is_said_once() -> None:
    """The real functions of PyTorch, on a machine without NVML's package or its library."""
    if torch.cuda.is_available():
        pytest.skip("the GPU of this machine does tell")
    lines: list[str] = []
    usage = system.Usage(lines.append)
    assert usage._gpu(0) == {"utilisation": None, "memory": None, "power": None}
    assert [line.partition(" is not")[0] for line in lines] == [
        f"profile=system: {name} of GPU 0"
        for name in ("utilization", "device_memory_used", "power_draw")
    ]


def test_figures_of_a_gpu_are_in_our_units(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        *(("utilization", 87), ("device_memory_used", 20 * MIB), ("power_draw", 312_456)),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda number, value=value: value + number)
    usage = system.Usage(print)
    usage._gpus, usage._at = 2, 0.0
    assert usage.since_last()["gpus"] == [
        {"utilisation": 0.87, "memory": 20 * MIB, "power": 312.456},
        {"utilisation": 0.88, "memory": 20 * MIB + 1, "power": 312.457},
    ]


def test_records_are_appended_after_half_a_line(tmp_path: Path) -> None:
    file = tmp_path / "system.jsonl"
    file.write_text('{"time": 1}\n{"time": 2, "cp')
    with system.System(file, interval=0.1):
        time.sleep(0.35)
    times = [found["time"] for found in read_records(file)]
    assert len(times) >= 3 and times[0] == 1 and times[1] > 1e9
    assert len(file.read_text().splitlines()) == len(times) + 1


def test_a_short_run_has_a_record(tmp_path: Path) -> None:
    with system.System(tmp_path / "system.jsonl", interval=1e6):
        time.sleep(3 * system.SHORTEST)
    assert len(read_records(tmp_path / "system.jsonl")) == 1


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_thread_ends_with_the_run(
    tmp_path: Path, said: pytest.LogCaptureFixture, error: type[BaseException] | None
) -> None:
    """The folder is gone, so that no record can be written either: that is said once."""
    watched = system.System(tmp_path / "gone" / "system.jsonl", interval=0.1)
    try:
        with watched:
            time.sleep(0.25)
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    assert not watched._thread.is_alive()
    (line,) = said.messages
    assert "gone/system.jsonl lacks a record: [Errno 2]" in line


def test_a_driver_that_hangs_does_not_hold_the_process(tmp_path: Path) -> None:
    code = (
        "import pathlib, time\n"
        "from sft.watch import system\n"
        "system.PATIENCE = 0.1\n"
        "system.Usage.since_last = lambda self: time.sleep(1000)\n"
        "with system.System(pathlib.Path('x'), 0.1):\n"
        "    time.sleep(0.2)\n"
        "print('ended')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("ended\n", 0), done.stderr


def test_each_machine_has_a_file(tmp_path: Path) -> None:
    first = tmp_path / "system.jsonl"
    of_torchrun = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "2"}
    of_slurm = {"RANK": "4", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    nodes = [process.node(environ) for environ in ({}, of_torchrun, of_slurm)]
    assert nodes == [0, 2, 1]
    names = [system.file_of(first, node).name for node in nodes]
    assert names == ["system.jsonl", "system_node2.jsonl", "system_node1.jsonl"]


def test_gpus_need_the_package_that_asks_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = legal_config(profile__system=True)
    monkeypatch.setattr(packages, "installed", lambda package: False)
    monkeypatch.setattr(packages, "DRIVER", tmp_path / "gpus")
    assert check(config) == []
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    (problem,) = check(config)
    assert (problem.setting, problem.rule, problem.fix) == (
        *("profile.system=true", "needs the package nvidia-ml-py", "pip install nvidia-ml-py"),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check(config) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(packages, "installed", lambda package: package == "pynvml")
    assert check(config) == []
