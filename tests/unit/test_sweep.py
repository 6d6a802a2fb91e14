"""The sweep's logic, with children that train nothing."""

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from sft import child
from sft.cli.command import start_logging
from sft.config import saved
from sft.config.paths import CONF_DIR
from sft.config.settings import Config, fill_names
from sft.errors import ConfigError, Problem, RunError, SftError
from sft.run.lock import Lock
from sft.sweep import beforehand
from sft.sweep import trials as sweep
from sft.sweep.trial import Trial

FINISHED = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
(folder / "run.json").write_text(json.dumps(
    {"status": "finished", "final": {"eval_loss": float(sys.argv[2]), "exact_match": None}}))
"""


@pytest.fixture(autouse=True)
def _log_as_found() -> Iterator[None]:
    yield
    sweep.logger.handlers.clear()
    sweep.logger.propagate = True


def fake(folder: Path, name: str, code: str, *arguments: str) -> Trial:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return Trial(command, {}, [name], str(folder / name), str(folder / f"{name}.log"))


def finishing(folder: Path, name: str, loss: float) -> Trial:
    return fake(folder, name, FINISHED, str(folder / name), str(loss))


def settings(**values: object) -> dict[str, object]:
    """Compose nothing: the schema's defaults with a model and data, as Hydra would hand over."""
    given = {"model": {"name_or_path": "org/base"}, "dataset": {"path": "org/rows"}}
    composed = OmegaConf.merge(OmegaConf.structured(Config), given, values)
    return OmegaConf.to_container(composed)  # type: ignore[return-value]


def save_run(folder: Path, config: dict[str, object], status: str = "finished") -> None:
    """Write what sft.run.run writes."""
    typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), config))
    fill_names(typed)  # type: ignore[arg-type]
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(typed)))
    record = {"status": status, "seconds": 3.5, "final": {"eval_loss": 1.25}}
    (folder / "run.json").write_text(json.dumps(record))


# Names


def test_short_sweep_names_can_be_read() -> None:
    assert sweep.sweep_name(["model=tiny", "++lora.r=4,0,8"]) == "lora.r=4,0,8+model=tiny"
    assert sweep.sweep_name([]) == sweep.file_name("")


def test_long_sweep_names_are_cut_and_differ() -> None:
    overrides = [f"++train.max_steps={i}" for i in range(9)] + ["++seed=1,2"]
    name = sweep.sweep_name(overrides)
    assert re.fullmatch(r"seed=1,2\+train\.max_steps=0.*-[0-9a-f]{8}", name)
    assert len(name) <= 60
    assert sweep.sweep_name(overrides) == name
    assert sweep.sweep_name([*overrides, "++lora.r=1"]) != name


@pytest.mark.parametrize("text", ["a/b", "a b", "../a", "x=[q,v]", "é", "", "."])
def test_odd_texts_become_plain_names(text: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_.,=+-]*[0-9a-f]{8}", sweep.file_name(text))
    assert not sweep.file_name(text).startswith(".")


def test_texts_that_look_alike_keep_apart() -> None:
    names = {sweep.file_name(text) for text in ("a-b", "a/b", "a b", "a//b")}
    assert len(names) == 4


# Where a trial runs


def test_a_trial_does_not_inherit_torchrun() -> None:
    left = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK GROUP_WORLD_SIZE ROLE_RANK"
    left += " ROLE_WORLD_SIZE ROLE_NAME MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID"
    left += " TORCHELASTIC_RESTART_COUNT TORCHELASTIC_USE_AGENT_STORE TORCHELASTIC_ERROR_FILE"
    left += " TORCH_NCCL_ASYNC_ERROR_HANDLING PET_NNODES SFT_ERROR_FILE"
    kept = ["PATH", "CUDA_VISIBLE_DEVICES", "TORCH_NCCL_BLOCKING_WAIT", "SLURM_JOB_ID", "ROLE"]
    given = dict.fromkeys([*left.split(), *kept], "1")
    assert list(child.environment(given)) == kept


def test_ranks_are_as_asked_or_as_torchrun_has_them() -> None:
    assert sweep.ranks(3, {"LOCAL_WORLD_SIZE": "2"}) == 3
    assert sweep.ranks(None, {"LOCAL_WORLD_SIZE": "2"}) == 2
    assert sweep.ranks(None, {}) == 1


def test_the_plan_starts_a_torchrun_per_trial() -> None:
    jobs = [["++lora.r=4", "model=tiny"], ["++lora.r=0", "model=tiny"]]
    asked = ["++lora.r=4,0", "model=tiny"]
    configs = [{"output_dir": None}, {"output_dir": None}]
    first, second = sweep.plan(jobs, configs, asked, Path("s"), 2, ["/my conf"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc_per_node", "2", "-m", "sft.train", "--config-dir", "/my conf"]
    assert first.command == [*torchrun, "++lora.r=4", "model=tiny", "output_dir='s/lora.r=4'"]
    assert (first.overrides, first.output_dir) == (["lora.r=4"], "s/lora.r=4")
    assert (second.overrides, second.log) == (["lora.r=0"], "s/lora.r=0.log")


def test_a_folder_with_odd_characters_arrives_whole() -> None:
    folder = Path('it\'s, a "{test}" \\ [1] = $x')
    (only,) = sweep.plan([[]], [{"output_dir": None}], [], folder, 1, [])
    parsed = OverridesParser.create().parse_override(only.command[-1])
    assert parsed.value() == only.output_dir == f"{folder}/trial"
    assert not parsed.is_sweep_override()


def test_swept_folders_are_left_alone() -> None:
    asked = ["++output_dir=/a,/b"]
    configs = [{"output_dir": "/a"}, {"output_dir": "/b"}]
    jobs = [["++output_dir=/a"], ["++output_dir=/b"]]
    trials = sweep.plan(jobs, configs, asked, Path("s"), 1, [])
    assert [item.output_dir for item in trials] == ["/a", "/b"]
    assert [item.command[-1] for item in trials] == ["++output_dir=/a", "++output_dir=/b"]
    assert all(item.log.startswith("s/output_dir=-") for item in trials)


def test_what_no_trial_can_have_is_refused() -> None:
    configs = [{"output_dir": "x"}, {"output_dir": "x"}]
    asked = ["++output_dir=x", "++seed=1,2"]
    with pytest.raises(ConfigError, match="2 settings are refused") as error:
        sweep.plan([["++seed=1"], ["++seed=2"]], configs, asked, Path("s"), 0, [])
    assert "hydra.launcher.nproc_per_node=0\n    must be at least 1" in str(error.value)
    assert "output_dir=x\n    2 trials would write" in str(error.value)
    assert "fix: output_dir=null hydra.sweep.dir=x" in str(error.value)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"cannot be made: .*\n    fix: hydra.sweep.dir=FOLDER"):
        sweep.run([], tmp_path / "file" / "sweep")


# Before the first trial


TEMPLATE = {"prompts": ["{prompt}"], "completions": ["{completion}"]}


def planned(*swept: str, **values: object) -> Trial:
    config = settings(template=TEMPLATE, **values)
    return Trial([], config, list(swept), "", "")


def test_what_any_trial_would_refuse_is_refused_before_the_first() -> None:
    trials = [planned(f"lora.r={r}", "seed=1", lora={"r": r}) for r in (4, 0, -1, 8)]
    with pytest.raises(ConfigError) as error:
        beforehand.require(trials, 1)
    rule = "must be from 1 to 65536"
    assert error.value.problems == [
        Problem("lora.r=0", rule, "lora.r=4,8"),
        Problem("lora.r=-1", rule, "lora.r=4,8"),
    ]
    beforehand.require([trials[0], trials[3]], 1)


def test_a_combination_is_left_to_its_own_process() -> None:
    """Of a grid of two settings, one combination is impossible; both values are used elsewhere."""
    grid = [(micro, batch) for micro in (4, 8) for batch in (4, 8)]
    trials = [
        planned(
            f"train.per_device_train_batch_size={micro}",
            f"train.global_batch_size={batch}",
            train={"per_device_train_batch_size": micro, "global_batch_size": batch},
        )
        for micro, batch in grid
    ]
    beforehand.require(trials, 1)
    with pytest.raises(ConfigError, match=r"train\.global_batch_size=4"):
        beforehand.require([trials[grid.index((8, 4))]], 1)


def test_a_value_of_the_wrong_type_and_a_long_name_are_found_too(tmp_path: Path) -> None:
    config = settings()
    config["lora"]["r"] = "many"  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"lora.r=many\n    must be of type int"):
        beforehand.require([Trial([], config, [], "", "")], 1)
    parts: dict[str, dict[str, str]]
    parts = {"model": {"name": "x" * 200, "name_or_path": "a/b"}, "dataset": {"name": "y" * 200}}
    parts["dataset"]["path"] = "a/b"
    with pytest.raises(ConfigError, match=r"follows from the names .* a name has 411 bytes"):
        beforehand.require([planned(**parts)], 1)


def test_the_checks_see_the_ranks_of_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    batch = {"global_batch_size": 4, "per_device_train_batch_size": 2}
    beforehand.require([planned(train=batch)], 2)
    with pytest.raises(ConfigError, match="multiple of per_device_train_batch_size x ranks = 2 x "):
        beforehand.require([planned(train=batch)], 4)
    assert "WORLD_SIZE" not in os.environ


def test_paths_are_looked_at_before_the_first_trial(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    trials = [planned(dataset={"path": f"{tmp_path}/{name}.jsonl"}) for name in "ab"]
    beforehand.require(trials[:1], 1)
    with pytest.raises(SftError, match=r"there is no file or folder .*/b\.jsonl\n    fix: "):
        beforehand.require(trials, 1)
    with pytest.raises(SftError, match="there is no model folder /nowhere"):
        beforehand.require([planned(model={"name_or_path": "/nowhere"})], 1)


def test_the_error_of_a_sweep_whose_trials_all_fail(tmp_path: Path) -> None:
    refused = "import os; open(os.environ['SFT_ERROR_FILE'], 'w').write('bad'); exit(2)"
    trials = [fake(tmp_path, "x=1", refused), fake(tmp_path, "x=2", refused)]
    assert sweep.run(trials, tmp_path) == 1
    log = f"{tmp_path}/x=1.log"
    assert sweep.all_failed(trials) == (
        f"no trial of the sweep finished; the first one, x=1, whose output is in {log}, failed: bad"
        f"\n    fix: correct what {log} shows, then give the same command again"
    )
    trials[0].message = "bad\n    fix: good"
    assert sweep.all_failed(trials).endswith("failed: bad\n    fix: good")
    trials[1].status = "finished"
    assert sweep.all_failed(trials) == ""


# One trial


def test_a_trial_finishes(tmp_path: Path) -> None:
    item = finishing(tmp_path, "a", 2.5)
    item.command[2] += "import time; time.sleep(0.2)"
    item.train()
    assert (item.status, item.message) == ("finished", "")
    assert item.final == {"eval_loss": 2.5, "exact_match": None}
    assert item.seconds is not None
    assert 0.2 <= item.seconds < 30


def test_the_message_of_a_refused_trial_is_its_own(tmp_path: Path) -> None:
    code = """
        import os, sys
        open(os.environ["SFT_ERROR_FILE"], "w").write("lora.r=0\\n    must be from 1 to 65536\\n")
        sys.exit("RANK" in os.environ or 2)
    """
    item = fake(tmp_path, "a", code)
    item.train()
    assert (item.status, item.message) == ("failed", "lora.r=0\n    must be from 1 to 65536")
    assert [path.name for path in tmp_path.iterdir()] == ["a.log"]


def test_without_a_message_the_last_line_and_exit_code_speak(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("of an earlier try\n")
    code = """
        import sys
        print("step 3")
        print("[rank1]: ValueError: wrong\\n", flush=True)
        print("W1120 23:26:00.1 9 torch/elastic/api.py:7] Sending process 9 closing signal SIGTERM")
        print("E1120 23:26:00.1 9 torch/elastic/api.py:8] failed (exitcode: -9) local_rank: 1")
        print("Traceback (most recent call last):\\nChildFailedError:\\n=====")
        sys.exit(1)
    """
    item = fake(tmp_path, "a", code)
    item.train()
    assert item.message == "exit code -9; last line: [rank1]: ValueError: wrong"
    assert (tmp_path / "a.log").read_text().startswith("of an earlier try\nstep 3\n")


def test_a_silent_death_is_told_by_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text("of an earlier try\n")
    item = fake(tmp_path, "a", "import os; os.kill(os.getpid(), 9)")
    item.train()
    assert (item.status, item.message) == ("failed", "exit code -9")


def test_exit_code_0_is_not_enough(tmp_path: Path) -> None:
    item = fake(tmp_path, "a", "print('early')")
    item.train()
    assert item.status == "failed"
    assert item.message == f"exit code 0, but {tmp_path}/a/run.json has no status finished"


@pytest.mark.parametrize(
    ("changed", "status", "expected"),
    [
        ({}, "finished", True),
        ({"train": {"logging_steps": 1}}, "finished", True),
        ({"lora": {"r": 4}}, "finished", False),
        ({"overwrite": True}, "finished", False),
        ({"lora": {"r": "many"}}, "finished", False),
        ({}, "failed", False),
    ],
)
def test_only_the_same_finished_run_is_taken_over(
    tmp_path: Path, changed: dict[str, object], status: str, expected: bool
) -> None:
    folder = tmp_path / "a"
    save_run(folder, settings(output_dir=str(folder)), status)
    config = settings()
    for section, value in changed.items():
        current = config[section]
        config[section] = current | value if isinstance(current, dict) else value  # type: ignore
    item = Trial([], config, [], str(folder), "")
    assert item.take_over() is expected
    if expected:
        assert (item.status, item.message) == ("finished", "finished before")
        assert (item.final, item.seconds) == ({"eval_loss": 1.25}, 3.5)
    else:
        assert item.status == "not started"


def test_braces_in_a_text_are_no_interpolation_when_settings_are_compared(tmp_path: Path) -> None:
    config = Config()
    config.template.system, config.output_dir = "Pay ${x}", str(tmp_path)
    (tmp_path / "config.yaml").write_text(saved.to_yaml(config))
    (tmp_path / "run.json").write_text('{"status": "finished", "final": {}, "seconds": 1}')
    assert Trial([], dataclasses.asdict(config), [], str(tmp_path), "").take_over()
    config.template.system = "Pay ${y}"
    assert not Trial([], dataclasses.asdict(config), [], str(tmp_path), "").take_over()


def test_a_trial_that_never_ran_is_not_taken_over(tmp_path: Path) -> None:
    assert not Trial([], settings(), [], str(tmp_path / "none"), "").take_over()


# All of them


def test_a_failed_trial_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused = "import os; open(os.environ['SFT_ERROR_FILE'], 'w').write('not [so]'); exit(2)"
    trials = [
        finishing(tmp_path, "x=[1]", 2.5),
        fake(tmp_path, "x=2", refused),
        finishing(tmp_path, "x=3", 1.5),
        finishing(tmp_path, "x=4", math.nan),
    ]
    start_logging()  # to this test's captured stdout
    assert sweep.run(trials, tmp_path) == 1
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert [item["status"] for item in saved] == ["finished", "failed", "finished", "finished"]
    assert saved[1] | {"seconds": 0} == {
        "overrides": ["x=2"],
        "output_dir": f"{tmp_path}/x=2",
        "log": f"{tmp_path}/x=2.log",
        "status": "failed",
        "message": "not [so]",
        "final": {},
        "seconds": 0,
    }
    assert saved[2]["final"]["eval_loss"] == 1.5
    out = capsys.readouterr().out
    assert re.search(r"^trial 1/4  x=\[1\]  started$", out, re.MULTILINE)
    assert re.search(r"^trial 1/4  x=\[1\]  finished in .* s, eval loss 2.5000$", out, re.MULTILINE)
    assert re.search(r"^trial 2/4  x=2  failed after .* s\n    not \[so\]$", out, re.MULTILINE)
    rows = [line.split("│")[1:-1] for line in out.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert [[*row[:4], row[5]] for row in cells] == [
        ["1", "x=[1]", "finished", "2.5000", ""],
        ["2", "x=2", "failed", "", "not [so]"],
        ["3", "x=3", "finished", "1.5000", "best"],
        ["4", "x=4", "finished", "", ""],
    ]
    assert f"summary: {tmp_path}/sweep.json" in out
    assert "exact match" not in out


def test_exact_match_has_a_column_where_there_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trials = [finishing(tmp_path, "x=1", 2.5), finishing(tmp_path, "x=2", 1.5)]
    for item in trials:
        item.command[2] = FINISHED.replace("None", "0.905")
    assert sweep.run(trials, tmp_path) == 0
    out = capsys.readouterr().out
    assert "exact match" in out
    assert out.count("90.5%") == 2


INTERRUPTED = """
import pathlib, signal, sys
from sft import child
from sft.cli.command import start_logging
from sft.sweep import trials as sweep
from sft.sweep.trial import Trial
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts without it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and one under nohup without this
start_logging()
child = '''
import pathlib, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(rank.pid))
time.sleep(600)
'''
folder = pathlib.Path(sys.argv[1])
trials = [
    Trial([sys.executable, "-c", child, str(folder / f"{n}.pid")], {}, [f"x={n}"],
          str(folder / n), str(folder / f"{n}.log"))
    for n in "12"
]
sys.exit(sweep.run(trials, folder))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_the_trial_and_the_sweep(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(tmp_path)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    pid_file = tmp_path / "1.pid"
    wait_until(lambda: pid_file.is_file() and pid_file.read_text() != "")
    parent.send_signal(number)
    out, _ = parent.communicate(timeout=30)
    assert parent.returncode == 130
    wait_until(lambda: not alive(int(pid_file.read_text())))
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert [(item["status"], item["message"]) for item in saved] == [
        ("failed", "interrupted"),
        ("not started", ""),
    ]
    assert "not started" in out
    assert not (tmp_path / "2.pid").exists()


def test_a_command_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Also when that is killed, and the driver of a sweep cannot stop its trial."""
    code = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid()))"
    words = [sys.executable, "-c", f"{code}; time.sleep(600)"]
    starts = f"from sft import child; child.run({words})"
    parent = subprocess.Popen([sys.executable, "-c", starts], cwd=tmp_path)
    pid_file = tmp_path / "pid"
    wait_until(lambda: pid_file.is_file() and pid_file.read_text() != "")
    parent.kill()
    parent.wait()
    wait_until(lambda: not alive(int(pid_file.read_text())))


def test_a_trial_waits_for_the_one_that_a_killed_sweep_has_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That one holds the folder's lock until it has saved; two would train beside each other."""
    start_logging()
    ended = tmp_path / "ended"
    trial = finishing(tmp_path, "x=1", 2.5)
    trial.command[2] = f"assert __import__('os').path.exists({str(ended)!r})" + FINISHED
    Path(trial.output_dir).mkdir()
    orphan = Lock(Path(trial.output_dir))
    orphan.take()

    def end() -> None:
        ended.touch()
        orphan.release()

    timer = threading.Timer(0.3, end)
    timer.start()
    assert sweep.run([trial], tmp_path) == 0
    timer.join()
    said = capsys.readouterr().out.splitlines()[1:4]
    folder = trial.output_dir
    assert said[0] == f"trial 1/1  x=1  waits: another process trains in {folder}"
    assert said[1] == "trial 1/1  x=1  started" and "finished in" in said[2]


def test_a_trial_that_ignores_the_interrupt_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "GRACE", 0.2)
    code = "import signal, time; signal.signal(2, signal.SIG_IGN); print(1, flush=True)"
    command = [sys.executable, "-c", f"{code}; time.sleep(600)"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert started.stdout is not None
    started.stdout.readline()
    child._stop(started)
    started.stdout.close()
    assert started.returncode == -signal.SIGKILL


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with child.signals_as_interrupt():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_until(holds: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """A zombie, which nobody has waited for, is not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


# Through Hydra, with a torchrun that trains nothing

TORCHRUN = """
import json, os, pathlib, sys
from hydra.core.override_parser.overrides_parser import OverridesParser
given = OverridesParser.create().parse_override(sys.argv[-1])
assert given.key_or_group == "output_dir"
folder = pathlib.Path(given.value())
folder.mkdir(parents=True)
left = [name for name in ("RANK", "LOCAL_WORLD_SIZE") if name in os.environ]
record = {"status": "finished", "final": {"eval_loss": 1.0}, "argv": sys.argv[1:], "left": left}
(folder / "run.json").write_text(json.dumps(record))
"""


@pytest.fixture
def no_torch(tmp_path: Path) -> dict[str, str]:
    """An environment whose torch is nothing but a torchrun: a sweep needs no more."""
    for name in ("torch", "torch/distributed"):
        (tmp_path / "fake" / name).mkdir(parents=True)
        (tmp_path / "fake" / name / "__init__.py").touch()
    (tmp_path / "fake/torch/distributed/run.py").write_text(TORCHRUN)
    path = os.pathsep.join(map(str, (tmp_path / "fake", Path(sweep.__file__).parents[2])))
    return child.environment() | {"PYTHONPATH": path}


def sft_train(
    folder: Path, environ: dict[str, str], *arguments: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sft.train", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False
    )


def test_hydra_expands_and_torchrun_trains(tmp_path: Path, no_torch: dict[str, str]) -> None:
    config_dir = tmp_path / "more conf"
    (config_dir / "train").mkdir(parents=True)
    (config_dir / "train" / "mine.yaml").write_text("learning_rate: 0.5\n")
    arguments = ["-m", "--config-dir", "more conf", "zero=none,stage1", "lora.r=4,8"]
    arguments += ["train=mine", "hydra.launcher.nproc_per_node=2"]
    done = sft_train(tmp_path, no_torch, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert folder.name == "zero=none,stage1+lora.r=4,8+train=mine"
    saved = json.loads((folder / "sweep.json").read_text())
    expected = [["zero=none", "lora.r=4"], ["zero=none", "lora.r=8"]]
    expected += [["zero=stage1", "lora.r=4"], ["zero=stage1", "lora.r=8"]]
    assert [item["overrides"] for item in saved] == expected
    last = folder / "zero=stage1,lora.r=8"
    record = json.loads((last / "run.json").read_text())
    output_dir = f"output_dir='{last.relative_to(tmp_path)}'"
    assert record["argv"] == [
        *("--standalone", "--nproc_per_node", "2", "-m", "sft.train"),
        *("--config-dir", str(config_dir)),
        *("zero=stage1", "++lora.r=8", "train=mine", output_dir),
    ]
    assert "Traceback" not in done.stdout + done.stderr


def test_a_grid_in_an_experiment_is_a_sweep(tmp_path: Path, no_torch: dict[str, str]) -> None:
    folder = tmp_path / "c" / "experiment"
    folder.mkdir(parents=True)
    grid = "# @package _global_\nhydra:\n  sweeper:\n    params:\n      lora.r: 2,4\n"
    (folder / "grid.yaml").write_text(grid)
    done = sft_train(tmp_path, no_torch, "-m", "--config-dir", "c", "experiment=grid", "seed=1")
    assert done.returncode == 0, done.stdout + done.stderr
    (sweep_dir,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert sweep_dir.name == "experiment=grid+seed=1"
    record = json.loads((sweep_dir / "lora.r=4" / "run.json").read_text())
    assert record["argv"][-4:-1] == ["lora.r=4", "experiment=grid", "++seed=1"]


def test_under_torchrun_one_rank_sweeps(tmp_path: Path, no_torch: dict[str, str]) -> None:
    outer = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    arguments = ["-m", "lora.r=4,8", "hydra.sweep.dir=s"]
    other = sft_train(tmp_path, no_torch | outer | {"RANK": "1"}, *arguments)
    assert (other.returncode, other.stdout) == (0, "")
    assert not (tmp_path / "s").exists()
    first = sft_train(tmp_path, no_torch | outer | {"RANK": "0"}, *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    assert first.stdout.count("  started\n") == 2
    record = json.loads((tmp_path / "s" / "lora.r=4" / "run.json").read_text())
    assert record["argv"][:3] == ["--standalone", "--nproc_per_node", "2"]
    assert record["left"] == []


def test_a_refused_plan_is_a_message(tmp_path: Path, no_torch: dict[str, str]) -> None:
    done = sft_train(tmp_path, no_torch, "-m", "--json", "lora.r=4,8", "output_dir=x")
    assert done.returncode == 2
    assert done.stderr == f"error: {json.loads(done.stdout)['error']}\n"
    assert done.stderr.startswith("error: 1 setting is refused\n\noutput_dir=x\n")
    assert "Traceback" not in done.stderr


def test_hydra_gets_each_trials_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from sft.config.compose import register_schema

    def run(trials: list[Trial], sweep_dir: Path) -> int:
        for number, item in enumerate(trials):
            item.final = {"eval_loss": float(number)}
        return 0

    monkeypatch.setattr(sweep, "run", run)
    monkeypatch.delenv("RANK", raising=False)
    register_schema(Config, "train")
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        overrides = ["++seed=1,2", f"hydra.sweep.dir={tmp_path}"]
        ((first, second),) = hydra.multirun("train", lambda _: None, overrides, False)
    assert (first.status, second.status) == (JobStatus.COMPLETED, JobStatus.COMPLETED)
    assert (first.return_value, second.return_value) == (0.0, 1.0)
    assert (second.overrides, second.cfg.seed) == (["++seed=2"], 2)
    assert "hydra" not in second.cfg
    assert second.hydra_cfg.hydra.job.num == 1
    assert second.working_dir == f"{tmp_path}/seed=2"
    assert os.listdir(tmp_path) == ["multirun.yaml"]
