"""A run's life: refused before it starts, killed, resumed, finished, and left alone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import build_model, records, run_sft
from transformers import TrainerCallback
from warm import run_warm


@pytest.fixture
def common(llama: Path, rows: Path) -> list[str]:
    return [
        "model=hf",
        f"model.name_or_path={llama}",
        "dataset=jsonl",
        f"dataset.path={rows}",
        "dataset.eval_fraction=0.34",
        "template=chat",
        "train.per_device_train_batch_size=2",
        "train.global_batch_size=4",
        "train.logging_steps=1",
        "train.learning_rate=1e-2",
        "precision=fp32",  # auto measures, and may choose otherwise for the next run
    ]


def changed(common: list[str], *overrides: str) -> list[str]:
    """Put overrides in the place of those with the same key, which may not be given twice."""
    keys = {item.partition("=")[0] for item in overrides}
    return [item for item in common if item.partition("=")[0] not in keys] + list(overrides)


def test_a_killed_run_goes_on_where_its_last_checkpoint_was(
    tmp_path: Path, common: list[str]
) -> None:
    """kill -9 between two checkpoints, the same command again: the losses of a straight run."""
    common = [
        *common,
        "train.save_strategy=steps",
        "train.save_steps=4",
        "train.num_train_epochs=4",
    ]
    run_warm("train", *common, "output_dir=straight", cwd=tmp_path)
    command = [sys.executable, "-m", "sft.train", *common, "output_dir=killed"]
    child = subprocess.Popen(
        command,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("step  6/16"):
            child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    # An incomplete checkpoint is skipped.
    broken = tmp_path / "killed" / "checkpoint-8"
    broken.mkdir(exist_ok=True)
    (broken / "adapter_model.safetensors").write_bytes(b"half")
    (broken / "manifest.json").unlink(missing_ok=True)

    again = run_warm("train", *common, "output_dir=killed", cwd=tmp_path)

    assert "killed/checkpoint-8 is not used: manifest.json is missing" in again.stdout
    assert "resuming from killed/checkpoint-4" in again.stdout
    assert again.stderr == ""
    resumed, never_killed = (
        {
            record["step"]: [record[key] for key in ("loss", "entropy", "num_tokens")]
            for record in records(tmp_path / name)
            if "loss" in record
        }
        for name in ("killed", "straight")
    )
    assert resumed == never_killed
    assert len(resumed) == 16
    # Each record once; and a clock of its own, which does not count the time until the restart.
    lines = [record for record in records(tmp_path / "killed") if "loss" in record]
    assert len(lines) == 16
    assert all(0 < line["seconds_per_step"] < 10 for line in lines)
    assert all(0 < line["seconds_left"] < 100 for line in lines[:-1])
    straight, killed = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("straight", "killed")
    )
    assert all(straight[key].equal(killed[key]) for key in straight)


def test_a_finished_run_is_left_alone(tmp_path: Path, common: list[str]) -> None:
    short = [*common, "train.max_steps=2", "output_dir=run"]
    run_warm("train", *short, cwd=tmp_path)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()

    again = run_sft("train", *short, cwd=tmp_path, check=False)
    assert again.returncode == 1
    assert "run is finished\n    fix: run_name=NAME" in again.stderr
    assert "; python -m sft.merge run=run merges its adapter" in again.stderr
    assert "Traceback" not in again.stderr

    other = run_warm("train", *short, "seed=7", "lora.r=4", cwd=tmp_path, check=False)
    assert other.returncode == 1
    assert "lora.r: 8 there, 4 here" in other.stderr
    assert "seed: 42 there, 7 here" in other.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before

    run_warm("train", *short, "seed=7", "overwrite=true", cwd=tmp_path)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["final"]["steps"] == 2
    assert record["versions"]["trl"].count(".") == 2


@pytest.mark.parametrize(
    ("overrides", "code", "messages"),
    [
        (["lora.r=0", "train.learning_rat=1"], 2, ["2 settings are refused", "lora.r=0"]),
        (
            ["model.name_or_path=./nowhere"],
            1,
            ["there is no model folder ./nowhere\n    fix: model.name_or_path="],
        ),
        (
            ["model.name_or_path=nobody/nothing"],
            1,
            ["nobody/nothing cannot be loaded", "HF_HUB_OFFLINE=1", "model=tiny"],
        ),
        (["dataset.path=nobody/nothing"], 1, ["nobody/nothing cannot be loaded", "dataset=demo"]),
        (["dataset.path=missing.jsonl"], 1, ["there is no file or folder missing.jsonl"]),
        (["dataset.path=empty.jsonl"], 1, ["empty.jsonl is empty"]),
        (["dataset.columns={prompt: question}"], 1, ["has no column question; it has prompt"]),
        (
            ["template=alpaca"],
            1,
            [
                "rows.jsonl:1: template=alpaca",
                "cannot render a completion",
                "needs the columns output",
                "prompt, completion",
            ],
        ),
        (["dataset.max_length=8"], 1, ["longer than dataset.max_length=8", "overlong=split"]),
        (
            ["lora.target_modules=[q_proj,qproj]", "lora.rank_pattern={up: 4}"],
            2,
            ["target_modules: qproj", "did you mean q_proj?", "rank_pattern: up"],
        ),
        (["lora.modules_to_save=[head]"], 2, ["modules_to_save: head", "matches no module"]),
        (["precision=fp16"], 2, ["there is no GPU"]),
    ],
)
def test_what_is_wrong_is_said_once_and_leaves_nothing_behind(
    tmp_path: Path,
    common: list[str],
    overrides: list[str],
    code: int,
    messages: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sft.train import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SystemExit) as stopped:
        main(changed(common, *overrides))
    assert stopped.value.code == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for message in messages:
        assert message in said, said
    assert not (tmp_path / "outputs").exists()


def test_a_bad_setting_is_said_by_one_rank(tmp_path: Path, common: list[str]) -> None:
    result = run_sft("train", *common, "lora.r=0", ranks=2, cwd=tmp_path, check=False)
    assert result.returncode == 1
    assert result.stderr.count("error: 1 setting is refused") == 1
    # torchrun's own account of the failure comes last; it ends with our message too.
    assert "lora.r=0\n      must be from 1 to 65536" in result.stderr.rpartition("Root Cause")[2]


def test_evaluation_counts_every_token_once(tmp_path: Path, common: list[str]) -> None:
    """The figure is the mean over tokens, whatever the batch; a batch mean would differ."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sft.config.settings import fill_names
    from sft.data.prepare import prepare
    from sft.data.template import Template
    from sft.train import main, train

    found = []
    for size in (1, 3, 8):
        config = main.compose(
            [
                *common,
                f"train.per_device_eval_batch_size={size}",
                "train.max_steps=1",
                f"output_dir={tmp_path / str(size)}",
            ]
        )
        train(config)
        found.append(next(r for r in records(tmp_path / str(size)) if "eval_loss" in r))
    fill_names(config)
    model = AutoModelForCausalLM.from_pretrained(config.model.name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(config.model.name_or_path)
    held_out = prepare(config.dataset, Template(config.template, tokenizer), config.seed).eval
    assert held_out is not None and len(held_out.dataset) == 8
    total, tokens = 0.0, 0
    for sample in held_out.dataset:
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor(sample["labels"])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        kept = labels[1:] != -100
        total += torch.nn.functional.cross_entropy(
            logits[kept], labels[1:][kept], reduction="sum"
        ).item()
        tokens += int(kept.sum())
    for record in found:
        assert record["eval_tokens"] == tokens
        assert record["eval_loss"] == pytest.approx(total / tokens, abs=2e-6)


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path: Path, common: list[str]) -> None:
    from sft.errors import RunError
    from sft.train import main, train

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    for overwrite in ("true", "false"):
        with pytest.raises(RunError, match="holds files that are not a run's"):
            train(main.compose([*common, f"output_dir={precious}", f"overwrite={overwrite}"]))
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    with pytest.raises(RunError, match="is a file"):
        train(main.compose([*common, f"output_dir={precious / 'thesis.txt'}"]))


def test_two_processes_do_not_share_a_folder(tmp_path: Path, common: list[str]) -> None:
    import fcntl

    from sft.errors import RunError
    from sft.train import main, train

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RunError, match="another process trains in"):
            train(main.compose([*common, f"output_dir={tmp_path / 'run'}"]))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_run_cut_off_after_its_last_checkpoint_trains_no_step_more(
    tmp_path: Path, common: list[str]
) -> None:
    from sft.train import main, train

    run = tmp_path / "run"
    short = [*common, "train.max_steps=2", "train.save_strategy=steps", "train.save_steps=1"]
    short += ["train.lr_scheduler_type=constant", "train.warmup_steps=0", f"output_dir={run}"]
    train(main.compose(short))
    before = load_file(run / "adapter" / "adapter_model.safetensors")
    first = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**first, "status": "running"}))
    train(main.compose(short))
    again = json.loads((run / "run.json").read_text())
    assert again["status"] == "finished"
    assert again["final"]["steps"] == 2
    assert again["final"]["loss"] == first["final"]["loss"]
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(after[key].equal(before[key]) for key in before)
    assert [record["step"] for record in records(run) if "loss" in record] == [1, 2]


def test_figures_change_nothing_of_what_is_trained(
    tmp_path: Path, common: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes of the adapter, and what a checkpoint holds of the records."""
    from sft.run import record
    from sft.train import main, train
    from sft.training import timed, trainer

    found = {}
    for name, kind in (("with", timed.TimedTrainer), ("without", trainer.Trainer)):
        command = [*common, "train.max_steps=3", "lora.lora_dropout=0.1"]
        if kind is trainer.Trainer:
            plain = type("Plain", (trainer.Trainer,), {"figures": Unwatched()})
            monkeypatch.setattr(timed, "TimedTrainer", plain)
        train(main.compose([*command, f"output_dir={tmp_path / name}"]))
        state = json.loads((tmp_path / name / "checkpoint-3" / "trainer_state.json").read_text())
        found[name] = (
            (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes(),
            [record.trained(line) for line in records(tmp_path / name) if "loss" in line],
            [line for line in state["log_history"] if "loss" in line],
        )
    assert found["with"] == found["without"]
    logged = [line for line in records(tmp_path / "with") if "loss" in line]
    assert all("operations_per_second" in line for line in logged)
    assert not record.MEASURED & {key for line in found["with"][2] for key in line}


class Unwatched(TrainerCallback):
    """In the place of the figures."""

    def facts(self, parameters: int) -> None:
        pass


def test_a_resumed_run_logs_as_often_as_it_is_told_now(tmp_path: Path, common: list[str]) -> None:
    from sft.train import main, train

    run = tmp_path / "run"
    command = [*common, "train.max_steps=4", "train.save_strategy=steps", "train.save_steps=2"]
    command += [f"output_dir={run}"]
    train(main.compose(command))
    first = {record["step"]: record for record in records(run) if "loss" in record}
    assert list(first) == [1, 2, 3, 4]
    # As if it had been cut off after step 2.
    shutil.rmtree(run / "checkpoint-4")
    finished = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**finished, "status": "running"}))
    train(main.compose(changed(command, "train.logging_steps=2")))
    again = {record["step"]: record for record in records(run) if "loss" in record}
    assert list(again) == [1, 2, 4]
    assert again[4]["num_tokens"] == first[4]["num_tokens"]
    assert again[4]["loss"] == pytest.approx((first[3]["loss"] + first[4]["loss"]) / 2, rel=1e-6)
    assert again[4]["entropy"] == first[4]["entropy"]  # of the step that is logged


def test_weights_that_a_file_lacks_are_not_made_up(
    tmp_path: Path, llama: Path, common: list[str]
) -> None:
    import shutil

    from safetensors.torch import save_file

    from sft.errors import ModelError
    from sft.train import main, train

    broken = tmp_path / "broken"
    shutil.copytree(llama, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    config = main.compose([*common, f"output_dir={tmp_path / 'run'}"])
    config.model.name_or_path = str(broken)
    with pytest.raises(
        ModelError, match=r"lack 1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        train(config)
    (broken / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ModelError, match=r"weights of .* cannot be loaded"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_data_longer_than_the_positions_is_refused(
    tmp_path: Path, rows: Path, common: list[str]
) -> None:
    from sft.errors import ModelError
    from sft.train import main, train

    base = build_model(tmp_path / "base", "gpt2", True, n_positions=16)
    config = main.compose([*common, f"output_dir={tmp_path / 'run'}"])
    config.model.name_or_path = str(base)
    with pytest.raises(ModelError, match="tokens, but the model has 16 positions"):
        train(config)


def test_modules_to_save_have_float32_masters(tmp_path: Path, common: list[str]) -> None:
    from sft.train import main, train

    run = tmp_path / "run"
    extra = ["precision=bf16", "lora.modules_to_save=[lm_head]", "train.max_steps=2"]
    train(main.compose(changed(common, *extra, f"output_dir={run}")))
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
    assert any("lm_head" in key for key in tensors)
