"""Runs that are stopped, killed, damaged or moved to other ranks go on as the same run."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm_python
from safetensors.torch import load_file, save_file
from support import ROOT, SAME_LOSS, assert_same_adapter, records
from warm import run_warm

from sft.run import record

INJECT = str(ROOT / "benchmarks" / "inject.py")


def train(*overrides: str) -> None:
    from sft.train import main, train

    train(main.compose(list(overrides)))


def cut_off(run: Path, step: int) -> None:
    """Leave what a run killed right after a checkpoint leaves."""
    from sft import prove

    prove.cut_back(run, step)


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run) if "loss" in record}


def test_a_run_goes_on_under_other_stages_and_ranks(tmp_path: Path, saving: list[str]) -> None:
    """One rank straight; and 2 under stage 2, killed, 2 under stage 3, stopped, 1 without ZeRO."""
    straight, run = tmp_path / "straight", tmp_path / "run"
    # Two steps an epoch, so that each start but the first is in the middle of a later one.
    saving = [item for item in saving if "save_steps" not in item]
    saving += ["train.save_steps=3", "dataset.max_rows=12"]
    train(*saving, f"output_dir={straight}")

    def two_ranks(fault: str, stage: str) -> subprocess.CompletedProcess[str]:
        command = [fault, "sft.train", *saving, f"zero={stage}", f"output_dir={run}"]
        return run_warm(INJECT, *command, ranks=2, cwd=tmp_path, check=False)

    killed = two_ranks("SIGKILL:sft.training.guard.Guard.on_step_end:before:4:1", "stage2")
    assert killed.returncode != 0
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-3"]
    stopped = two_ranks("SIGUSR1:sft.training.guard.Guard.on_step_end:before:2:1", "stage3")
    assert "checkpoint-3 (made by 2 ranks under ZeRO stage 2; now 2 ranks under stage 3)" in (
        stopped.stdout
    )
    assert "stopped by another rank's signal after step 5, which is saved" in stopped.stderr
    again = run_warm("train", *saving, "report.every=1", f"output_dir={run}", cwd=tmp_path)
    assert "checkpoint-5 (made by 2 ranks under ZeRO stage 3; now 1 ranks" in again.stdout
    assert losses(run) == pytest.approx(losses(straight), rel=SAME_LOSS)
    assert_same_adapter(run, straight, rate=1e-2, steps=6)
    record = json.loads((run / "run.json").read_text())
    assert [(item["from"], item["ranks"]) for item in record["resumed"]] == [
        ("checkpoint-3", 2),
        ("checkpoint-5", 1),
    ]
    assert [(item["status"], item["step"]) for item in record["stops"]] == [
        ("failed", 3),  # rank 1 was killed, and rank 0 lived to say so
        ("stopped", 5),
    ]
    assert "another rank's signal" in record["stops"][1]["reason"]
    assert record["started"] < record["stops"][0]["time"] <= record["stops"][1]["time"]
    assert record["stops"][1]["time"] < record["ended"]
    page = (run / "report.html").read_text()
    assert "resumed twice" in page and "from checkpoint-5, on 1 rank<" in page
    tokens = [line["num_tokens"] for line in records(straight) if "num_tokens" in line]
    assert [line["num_tokens"] for line in records(run) if "num_tokens" in line] == tokens


@pytest.mark.usefixtures("warm_ranks")
def test_torchrun_restarts_what_died(tmp_path: Path, saving: list[str]) -> None:
    """With overwrite=true too, which means the first start only."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "1"]
    fault = "SIGKILL:sft.training.guard.Guard.on_step_end:before:3:1"
    more = ["output_dir=run", "overwrite=true"]
    done = subprocess.run(
        [*start, "--nproc_per_node", "2", INJECT, fault, "sft.train", *saving, *more],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "resuming from run/checkpoint-2" in done.stdout
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")],
)
def test_a_signal_saves_and_stops(
    tmp_path: Path, saving: list[str], number: int, code: int, name: str
) -> None:
    gone = ("train.max_steps", "train.save_s")
    command = [item for item in saving if not item.startswith(gone)]
    command += ["train.max_steps=5000", "train.save_strategy=no", "output_dir=run"]
    command += ["train.dataloader_num_workers=2"]  # which die of a signal, if it reaches them
    # Ctrl-C with a real start; on both ways signals reach the whole group, loader workers too.
    python = sys.executable if number == signal.SIGINT else warm_python.executable()
    child = subprocess.Popen(
        [python, "-m", "sft.train", *command],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    run = tmp_path / "run"
    wait_for_step(child, run, 1)
    os.killpg(child.pid, number)  # as a scheduler, timeout and a terminal do
    _, errors = child.communicate(timeout=60)
    assert child.returncode == code
    [saved] = run.glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert f"{name}: the run stops after it has saved this step" in errors
    assert errors.endswith(
        f"error: stopped by {name} after step {step}, which is saved; "
        "give the same command again to resume the run\n"
    )
    assert max(losses(run)) == step
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "stopped"
    assert record["reason"].startswith(f"stopped by {name} after step {step}, which is saved")


def wait_for_step(child: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while not (run / "metrics.jsonl").exists() or max(losses(run), default=0) < step:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_ranks_save_when_torchrun_is_stopped_and_when_it_is_killed(
    tmp_path: Path, saving: list[str]
) -> None:
    """With loader workers, which are in a rank's process group: torchrun signals that."""
    from sft.checkpoint import folders

    gone = ("train.max_steps", "train.save_s")
    command = [item for item in saving if not item.startswith(gone)]
    command += ["train.max_steps=5000", "train.save_strategy=no", "output_dir=run"]
    command += ["train.dataloader_num_workers=1"]
    run, step = tmp_path / "run", 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    warm = {"PYTHON_EXEC": warm_python.executable()}
    # What SIGKILL leaves of torchrun is seen only by ranks that it has started itself.
    for number, code, how in ((signal.SIGTERM, 1, warm), (signal.SIGKILL, -9, {})):
        child = subprocess.Popen(
            [*torchrun, "--nproc_per_node=2", "-m", "sft.train", *command],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1", **how},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for_step(child, run, step + 2)
        ranks = psutil.Process(child.pid).children()
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)  # the ranks have its end of the pipe too
        psutil.wait_procs(ranks, timeout=30)
        assert child.returncode == code  # torchrun's own, whatever the ranks exit with
        before, step = step, max(losses(run))
        saved = folders.checkpoints(run)[0]
        assert folders.step_of(saved) == step > before
        assert f"stopped by SIGTERM after step {step}, which is saved" in errors
        assert json.loads((run / "run.json").read_text())["status"] == "stopped"


def test_a_second_ctrl_c_ends_at_once() -> None:
    from sft.training.signals import Signals

    with Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Signals() as signals:
        for _ in range(3):  # a scheduler's, and torchrun's again
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_loader_worker_is_not_signalled_with_its_rank_and_dies_with_it() -> None:
    """Forked while a run watches its signals, and only then."""
    from sft.training.signals import Signals, end_with_rank

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def worker() -> None:
        end_with_rank(lambda number: theirs.send((os.getpid(), os.getpgid(0))), 0)
        time.sleep(600)

    def rank() -> None:
        with Signals():
            context.Process(target=worker).start()
            time.sleep(600)

    process = context.Process(target=rank)
    process.start()
    assert os.getpgid(process.pid) == os.getpgid(0)  # forked outside of Signals
    assert ours.poll(60)
    pid, group = ours.recv()
    assert group == pid
    process.kill()
    process.join(60)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=60)
    assert not psutil.pid_exists(pid)


def test_a_rank_that_ends_late_is_not_stopped_as_it_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launcher sends SIGTERM to all ranks once the first has ended."""
    from sft.errors import RunError
    from sft.training.signals import Signals

    before = signal.getsignal(signal.SIGTERM)
    for ranks, left in (("2", signal.SIG_IGN), ("1", before)):
        monkeypatch.setenv("WORLD_SIZE", ranks)
        try:
            with pytest.raises(RunError, match="planted"), Signals():
                raise RunError("planted")
            assert signal.getsignal(signal.SIGTERM) == left
        finally:
            signal.signal(signal.SIGTERM, before)


def test_an_evaluation_that_was_cut_off_is_made_up_for(tmp_path: Path, saving: list[str]) -> None:
    """Of the last step of an epoch, after which the checkpoint was written and the run killed."""
    run = tmp_path / "run"
    epochs = [item for item in saving if "max_steps" not in item]
    epochs += ["train.num_train_epochs=2", "train.eval_strategy=epoch", f"output_dir={run}"]
    train(*epochs)
    whole = records(run)
    steps = max(losses(run)) // 2
    assert steps % 2 == 0  # so that there is a checkpoint of the epoch's last step
    shutil.copytree(run / f"checkpoint-{2 * steps}", tmp_path / "last")
    cut_off(run, 2 * steps)
    state_file = run / f"checkpoint-{2 * steps}" / "trainer_state.json"
    state = json.loads(state_file.read_text())
    assert not any("eval_loss" in log and log["step"] == 2 * steps for log in state["log_history"])
    train(*epochs)
    found, expected = (
        [record.trained(line) for line in lines if "eval_loss" in line]
        for lines in (records(run), whole)
    )
    assert found == expected


@pytest.mark.parametrize("evaluates", ["steps", "epoch"])
def test_a_run_that_is_stopped_after_its_last_step_logs_what_it_would_have(
    tmp_path: Path, saving: list[str], evaluates: str
) -> None:
    """The evaluation of the last step, and in its place: before the summary of training."""
    from sft import prove

    command = [*saving, f"train.eval_strategy={evaluates}"]
    command += ["train.eval_steps=4"] if evaluates == "steps" else []
    train(*command, f"output_dir={tmp_path / 'straight'}")
    fault = "SIGUSR1:sft.training.guard.Guard.on_step_end:before:6:0"
    command += [f"output_dir={tmp_path / 'run'}"]
    stopped = run_warm(INJECT, fault, "sft.train", *command, cwd=tmp_path, check=False)
    assert stopped.returncode == 75
    assert "after step 6, which is saved" in stopped.stderr
    run_warm("train", *command, cwd=tmp_path)
    straight, run = (prove.outcome(tmp_path / name) for name in ("straight", "run"))
    assert prove.differences(straight, run) == []
    kinds = [
        next(kind for kind in ("eval_loss", "train_runtime", "loss") if kind in record)
        for record in records(tmp_path / "run")
        if record["step"] == 6
    ]
    assert kinds == ["loss", "eval_loss", "train_runtime"]


def test_checkpoints_hold_no_pickle_and_the_best_is_kept(tmp_path: Path, saving: list[str]) -> None:
    run = tmp_path / "run"
    train(*saving, "train.eval_strategy=steps", "train.eval_steps=2", f"output_dir={run}")
    evaluated = {line["step"]: line["eval_loss"] for line in records(run) if "eval_loss" in line}
    best = min((step for step in evaluated if step), key=evaluated.__getitem__)
    kept = {int(path.name.split("-")[1]) for path in run.glob("checkpoint-*")}
    assert kept == ({best, 6} if best != 6 else {4, 6})
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes <= {
        ".json",
        ".html",
        ".jsonl",
        ".safetensors",
        ".jinja",
        ".md",
        ".yaml",
        ".log",
        "",
    }


def test_what_is_trained_may_not_change_unnoticed(
    tmp_path: Path, saving: list[str], rows: Path
) -> None:
    from sft.checkpoint import folders
    from sft.errors import RunError

    run, own = tmp_path / "run", tmp_path / "own.jsonl"
    shutil.copy(rows, own)
    command = [item for item in saving if not item.startswith("dataset.path")]
    command += [f"dataset.path={own}", f"output_dir={run}"]
    train(*command)
    cut_off(run, 4)
    changed = [item for item in command if "learning_rate" not in item]
    with pytest.raises(RunError, match=r"learning_rate: 0.01 there, 0.002 here(.|\n)*resume.allow"):
        train(*changed, "train.learning_rate=0.002")
    own.write_text(own.read_text().replace("abc 0", "abd 0"))
    os.utime(own, (1, 1))
    with pytest.raises(RunError, match=r"has changed:\n    data: \w+ there, \w+ here"):
        train(*command)
    with pytest.raises(RunError, match=r"resume.allow=\[train.learning_rate,data\]"):
        train(*changed, "train.learning_rate=0.002", "resume.allow=[train.learning_rate]")
    allowed = "resume.allow=[data,train.learning_rate]"
    train(*changed, "train.learning_rate=0.002", "train.lr_scheduler_type=cosine", allowed)
    rates = {line["step"]: line["learning_rate"] for line in records(run) if "loss" in line}
    assert 0 < rates[5] < 0.002 < rates[4] < 0.01
    [resumed] = json.loads((run / "run.json").read_text())["resumed"]
    assert [line.split(":")[0] for line in resumed["allowed"]] == ["train.learning_rate", "data"]
    # Each checkpoint names its run as it was when it was saved.
    fingerprints = json.loads((run / "run.json").read_text())["fingerprints"]
    named = [folders.manifest(path)["run"] for path in reversed(folders.checkpoints(run))]
    assert named == fingerprints and len(set(named)) == 2


def test_prepared_data_is_resumed_with_the_template_that_it_was_made_with(
    tmp_path: Path, saving: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.data import __main__ as door

    monkeypatch.chdir(tmp_path)
    gone = ("train.", "precision")
    prepare = [item for item in saving if not item.startswith(gone)]
    door.data(door.main.compose([*prepare, "output=prepared"]))
    command = [item for item in saving if not item.startswith(("dataset", "template"))]
    command += ["dataset=pretokenized", "dataset.path=prepared", "output_dir=run"]
    train(*command)
    cut_off(tmp_path / "run", 4)
    train(*command)
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5, 6]


def test_another_base_under_the_same_name_is_noticed(
    tmp_path: Path, saving: list[str], llama: Path
) -> None:
    from sft.errors import RunError

    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(llama, base)
    command = [item for item in saving if "name_or_path" not in item]
    command += [f"model.name_or_path={base}", f"output_dir={run}"]
    train(*command)
    cut_off(run, 4)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"has changed:\n    base: \w+ there, \w+ here"):
        train(*command)


def test_auto_is_what_the_run_began_with_on_another_processor(
    tmp_path: Path, saving: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 was faster where the first run began, bf16 instructions where the other did."""
    from sft.fast import cpu_products, speed
    from sft.model import precision

    monkeypatch.setattr(precision, "SMALL", 0)  # as if this were a wide model
    command = [item for item in saving if "precision" not in item]
    ways = [cpu_products.NATIVE, cpu_products.WIDENED, cpu_products.SHORTENED]

    def processor(possible: list[str], *figures: float) -> None:
        measured = dict(zip([speed.FLOAT32, *possible], figures, strict=True))
        monkeypatch.setattr(cpu_products, "ways", lambda dtype: possible)
        monkeypatch.setattr(speed, "speeds", lambda: measured)

    def trained(name: str, then: Any) -> dict[str, Any]:
        """Train on one processor, and again from step 4 on another."""
        train(*command, f"output_dir={tmp_path / name}")
        straight = losses(tmp_path / name)
        cut_off(tmp_path / name, 4)
        then()
        train(*command, f"output_dir={tmp_path / name}")
        record = json.loads((tmp_path / name / "run.json").read_text())
        assert record["status"] == "finished"
        assert losses(tmp_path / name) == straight
        return record

    processor(ways, 150.0, 81.0, 135.0, 139.0)
    found = trained("first", lambda: processor(ways, 100.0, 190.0, 75.0, 90.0))
    assert found["identity"]["precision"] == "fp32"
    assert found["resumed"][0]["allowed"] == []

    monkeypatch.setattr(cpu_products, "_ways", {})
    processor(ways, 100.0, 60.0, 90.0, 140.0)
    found = trained("other", lambda: processor(ways, 100.0, 190.0, 75.0, 90.0))
    assert found["identity"]["products"] == cpu_products.SHORTENED
    assert found["resumed"][0]["allowed"] == []

    cut_off(tmp_path / "other", 4)
    processor([cpu_products.WIDENED], 100.0, 90.0)
    train(*command, f"output_dir={tmp_path / 'other'}")
    found = json.loads((tmp_path / "other" / "run.json").read_text())
    assert (found["identity"]["precision"], found["identity"]["products"]) == (
        "bf16",
        cpu_products.WIDENED,
    )
    noted = f"products: {cpu_products.SHORTENED} there, {cpu_products.WIDENED} here"
    assert found["resumed"][-1]["allowed"] == [noted]


def test_a_restarted_command_does_not_go_back_again(
    tmp_path: Path, saving: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.config.settings import fill_names
    from sft.run.run import Run
    from sft.train import main

    run = tmp_path / "run"
    train(*saving, f"output_dir={run}")
    cut_off(run, 6)
    config = main.compose([*saving, f"output_dir={run}", "resume.checkpoint=checkpoint-4"])
    fill_names(config)
    assert Run(config).resume_point() == run / "checkpoint-4"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Run(config).resume_point() == run / "checkpoint-6"


def test_a_loss_that_is_not_finite_names_its_rows(
    tmp_path: Path, saving: list[str], llama: Path
) -> None:
    """A word that only rows 6, 12, 18 and 24 have makes the model answer NaN."""
    from transformers import AutoTokenizer

    from sft.errors import RunError

    base = tmp_path / "base"
    shutil.copytree(llama, base)
    tokens = AutoTokenizer.from_pretrained(base)("Zq", add_special_tokens=False)["input_ids"]
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][tokens] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    data = tmp_path / "rows.jsonl"
    lines = [
        {"prompt": f"say {i}" + " Zq" * (i % 6 == 0), "completion": str(i)} for i in range(1, 25)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    gone = ("model.name_or_path", "dataset.", "train.max_steps")
    command = [item for item in saving if not item.startswith(gone)]
    command += [f"model.name_or_path={base}", f"dataset.path={data}", "train.max_steps=12"]
    with pytest.raises(RunError, match=r"step \d+: the loss is nan \(rows ([\d, ]+)\)") as stopped:
        train(*command, f"output_dir={tmp_path / 'stop'}")
    named = {int(row) for row in str(stopped.value).split("(rows ")[1].split(")")[0].split(", ")}
    assert named & {6, 12, 18, 24} and len(named) == 2  # the micro-batch
    run = tmp_path / "skip"
    told = tmp_path / "told"
    ask = f"on_alert=cat >> {told}"
    train(*command, "train.on_nan=skip", f"output_dir={run}", ask)
    assert "on_alert: null" in (run / "config.yaml").read_text()  # it may hold a secret
    alerts = [json.loads(line) for line in (run / "alerts.jsonl").read_text().splitlines()]
    assert {alert["kind"] for alert in alerts} == {"nan"} and alerts[0]["rows"]
    record = json.loads((run / "run.json").read_text())
    found = losses(run)
    assert record["final"]["skipped_steps"] == sum(loss is None for loss in found.values()) > 0
    finite = [loss for loss in found.values() if loss is not None]
    assert finite[-1] < finite[0]
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in adapter.values())
    assert json.loads(told.read_text().splitlines()[0])["rows"] == alerts[0]["rows"]


def test_rows_are_named_right_in_a_later_epoch_that_was_resumed_on_two_ranks(
    tmp_path: Path, saving: list[str], llama: Path
) -> None:
    """Four rows have no finite loss; each epoch of six steps skips them, and names no other."""
    from transformers import AutoTokenizer

    base, data, run = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "run"
    shutil.copytree(llama, base)
    tokens = AutoTokenizer.from_pretrained(base)("Zq", add_special_tokens=False)["input_ids"]
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][tokens] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    lines = [
        {"prompt": f"say {i}" + " Zq" * (i % 6 == 0), "completion": str(i)} for i in range(1, 25)
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    gone = ("model.name_or_path", "dataset.", "train.max_steps", "train.per_device")
    command = [item for item in saving if not item.startswith(gone)]
    command += [f"model.name_or_path={base}", f"dataset.path={data}", f"output_dir={run}"]
    command += ["train.max_steps=18", "train.on_nan=skip", "train.per_device_train_batch_size=1"]
    fault = "SIGKILL:sft.training.guard.Guard.on_step_end:before:9:1"  # after checkpoint-8
    killed = run_warm(INJECT, fault, "sft.train", *command, ranks=2, cwd=tmp_path, check=False)
    assert killed.returncode != 0
    again = run_warm("train", *command, ranks=2, cwd=tmp_path)
    assert "resuming from" in again.stdout and "checkpoint-8" in again.stdout
    named: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for line in (killed.stdout + again.stdout).splitlines():
        if found := re.match(r"step (\d+): the loss is nan \(rows ([\d, ]+)\)", line):
            rows = {int(row) for row in found[2].split(", ")}
            named[(int(found[1]) - 1) // 6] |= rows
    assert named == {epoch: {6, 12, 18, 24} for epoch in range(3)}


def test_a_loss_that_jumps_stops_the_run(tmp_path: Path, saving: list[str], llama: Path) -> None:
    """One row of 120 has a word that confuses the model; its turn comes after 20 steps."""
    from transformers import AutoTokenizer

    from sft.data.sampler import order_of
    from sft.errors import RunError

    seed = next(seed for seed in range(99) if order_of(120, seed, 0).index(0) > 100)
    base = tmp_path / "base"
    shutil.copytree(llama, base)
    tokens = AutoTokenizer.from_pretrained(base)("Zq", add_special_tokens=False)["input_ids"]
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][tokens] *= 1000
    tensors["lm_head.weight"][tokens] *= -1000
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    data = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"say {i}", "completion": str(i) + " Zq" * (i == 0)} for i in range(120)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    gone = ("model.name_or_path", "dataset.", "train.max_steps", "train.save_s")
    command = [item for item in saving if not item.startswith(gone)]
    command += [f"model.name_or_path={base}", f"dataset.path={data}", f"seed={seed}"]
    command += ["train.max_steps=30", "train.max_loss_jump=3"]
    with pytest.raises(RunError, match=r"step 2\d: the loss jumped to .* \(rows (1|.* 1), "):
        train(*command, f"output_dir={tmp_path / 'run'}")


def test_a_full_disk_loses_nothing(tmp_path: Path, saving: list[str]) -> None:
    """On a file system that is filled before the second checkpoint."""
    from sft.checkpoint import folders
    from sft.errors import CheckpointError

    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a small file system")
    try:
        with pytest.raises(CheckpointError, match=r"cannot be saved: .*No space left") as full:
            train(*saving, f"output_dir={disk / 'run'}")
        left = folders.checkpoints(disk / "run")[0]
        assert f"the newest checkpoint is {left}" in str(full.value)
        del full  # whose frames hold the run, and the run its lock
        folders.verify(left)
        assert not list((disk / "run").glob("*.partial*"))
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        train(*saving, f"output_dir={disk / 'run'}")
        assert list(losses(disk / "run")) == [1, 2, 3, 4, 5, 6]
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_finished_run_is_not_trained_over_by_one_that_came_late(
    tmp_path: Path, saving: list[str]
) -> None:
    from sft.config.settings import fill_names
    from sft.errors import RunError
    from sft.run.run import Run
    from sft.train import main

    config = main.compose([*saving, f"output_dir={tmp_path / 'run'}"])
    fill_names(config)
    late = Run(config)
    assert late.resume_point() is None
    train(*saving, f"output_dir={tmp_path / 'run'}")
    with pytest.raises(RunError, match="another process has trained in"):
        late.claim()
