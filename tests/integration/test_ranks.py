"""Several ranks: ZeRO is really on, changes nothing but memory, and ranks that part are stopped."""

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import PLAIN, SAME_LOSS, assert_same_adapter, build_model, losses, records
from warm import run_warm

from sft.files import read_records

STAGES = ("none", "stage1", "stage2", "stage3")


# DeepSpeed JSONs as other tools write them, by the stage that they ask for.
THEIRS = {
    "none": {
        "zero_optimization": {"stage": 0, "reduce_bucket_size": 5e8},
        "bf16": {"enabled": True},
    },
    "stage2": {
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-5, "betas": [0.8, 0.999]}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 500}},
        **{"train_micro_batch_size_per_gpu": 1, "fp16": {"enabled": True}},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    },
    "stage3": {
        **{"bf16": {"enabled": True}, "gradient_clipping": 0.1, "compile": {"backend": "inductor"}},
        "zero_optimization": {
            **{"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
            **{"sub_group_size": 1e9, "reduce_bucket_size": "auto", "prefetch_bucket_size": "auto"},
            **{"stage3_param_persistence_threshold": "auto", "max_live_parameters": 0},
            **{"max_reuse_distance": 0, "gather_16bit_weights_on_model_save": True},
        },
    },
}


@pytest.fixture(scope="module")
def common(llama: Path, rows: Path) -> list[str]:
    """Give the settings that every run here has."""
    return [
        "model=hf",
        f"model.name_or_path={llama}",
        "dataset=jsonl",
        f"dataset.path={rows}",
        "dataset.eval_fraction=0.2",
        "template=chat",
        "train.num_train_epochs=2",
        "train.per_device_train_batch_size=2",
        "train.global_batch_size=8",
        "train.learning_rate=1e-2",
        "train.logging_steps=1",
        "train.save_strategy=no",
        "precision=fp32",
    ]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, common: list[str]) -> dict[str, Path]:
    """Train the same thing on one rank the plain way, and on two the fast way under each stage.

    These runs take samples and measure forgetting; those with a JSON of another tool do not.
    """
    watched = ["sample=held-out", "sample.every=3", "sample.num=3", "sample.max_new_tokens=12"]
    watched += ["sample.temperature=1", "sample.seed=5", "train.max_forgetting=0.05"]
    folder = tmp_path_factory.mktemp("stages")
    runs = {}
    for name, ranks in (("one", 1), *((stage, 2) for stage in STAGES)):
        how = PLAIN if name == "one" else [f"zero={name}"]
        runs[name] = folder / name
        command = [*common, *how, *watched, f"output_dir={runs[name]}"]
        done = run_warm("train", *command, ranks=ranks, cwd=folder)
        assert done.stderr == ""  # nothing of Accelerate or DeepSpeed
    return runs


def run_script(folder: Path, text: str, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run a script on two ranks."""
    script = folder / "script.py"
    script.write_text(text)
    return run_warm(str(script), *overrides, ranks=2, cwd=folder, check=False)


def test_stages_and_rank_counts_give_the_plain_losses(stages: dict[str, Path]) -> None:
    expected = losses(stages["one"])
    assert len(expected) == 6  # 19 samples, 8 a step and 3 in the last, 2 epochs
    assert expected[-1] < expected[0] - 1
    for name in STAGES:
        assert losses(stages[name]) == pytest.approx(expected, rel=SAME_LOSS), name


@pytest.mark.parametrize("stage", THEIRS)
def test_a_json_of_another_tool_trains_what_ours_does(
    stage: str, stages: dict[str, Path], common: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(THEIRS[stage]))
    command = [*common, f"zero.config={file}", "output_dir=run"]
    done = run_warm("train", *command, ranks=2, cwd=tmp_path)
    assert done.stderr == ""
    found, expected = (
        load_file(run / "adapter" / "adapter_model.safetensors")
        for run in (tmp_path / "run", stages[stage])
    )
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].equal(tensor), name
    choice = json.loads((tmp_path / "run" / "run.json").read_text())["choices"]["zero.config"]
    lines = choice["reason"].splitlines()
    assert lines[1:] and all(line.startswith("theirs.json") for line in lines[1:])
    printed = " ".join(done.stdout.split())
    for line in lines:
        assert " ".join(line.split()) in printed


def test_stages_and_rank_counts_give_the_same_samples(stages: dict[str, Path]) -> None:
    found = {name: read_records(run / "samples.jsonl") for name, run in stages.items()}
    for name, samples in found.items():
        assert [(s["step"], s["index"]) for s in samples] == [
            (step, index) for step in (0, 3, 6) for index in range(3)
        ], name
        assert samples[:3] == found["one"][:3], name  # the model is still the same to the last bit
        assert all(sample["reference"] for sample in samples)
        assert all(sample["tokens"] == 12 or sample["stopped"] for sample in samples)
    assert found["none"] == found["stage1"] == found["stage2"]
    assert len({sample["answer"] for sample in found["one"]}) > 3


def test_stages_and_rank_counts_measure_the_same_forgetting(stages: dict[str, Path]) -> None:
    found = {
        name: json.loads((run / "run.json").read_text())["forgetting"]
        for name, run in stages.items()
    }
    one = found["one"]
    assert one["change"] == pytest.approx(one["after"] / one["before"] - 1)
    assert one["flagged"] is (one["change"] > 0.05)
    assert 1 < one["before"] < 20 and abs(one["change"]) > 0.01
    for name in STAGES:
        assert found[name]["before"] == pytest.approx(one["before"], rel=1e-6), name
        assert found[name]["after"] == pytest.approx(one["after"], rel=1e-4), name


def test_stages_and_rank_counts_log_the_same_metrics(stages: dict[str, Path]) -> None:
    logged = {
        name: [record for record in records(run) if "loss" in record]
        for name, run in stages.items()
    }
    for name in STAGES:
        for found, expected in zip(logged[name], logged["one"], strict=True):
            assert found["entropy"] == pytest.approx(expected["entropy"], abs=1e-4), name
            assert found["mean_token_accuracy"] == expected["mean_token_accuracy"], name
            assert found["num_tokens"] == expected["num_tokens"], name
    assert logged["one"][-1]["num_tokens"] > 1000


def test_figures_of_a_record_agree_with_one_another_and_with_the_clock(
    stages: dict[str, Path],
) -> None:
    parts = ("data", "compute", "optimizer", "evaluation", "saving", "other")
    for name, run in stages.items():
        logged = [record for record in records(run) if "loss" in record]
        before = 0
        for record in logged:
            assert min(record[f"seconds_{part}"] for part in parts[:3]) > 0, name
            assert record["memory_resident"] > 50 * 2**20
            took = sum(record[f"seconds_{part}"] for part in parts)
            took -= record["seconds_evaluation"] + record["seconds_saving"]
            assert record["seconds_per_step"] == pytest.approx(took, rel=0.001)
            # Of all ranks: what num_tokens grows by.
            tokens, before = record["num_tokens"] - before, record["num_tokens"]
            assert record["tokens_per_second"] * took == pytest.approx(tokens, rel=0.02), name
        assert logged[3]["seconds_evaluation"] > 0  # of the first epoch's end
        assert not any(record["seconds_evaluation"] for record in logged[:3])
        # From the first record to the last.
        wall = logged[-1]["time"] - logged[0]["time"]
        parted = sum(record[f"seconds_{part}"] for record in logged[1:] for part in parts)
        assert parted == pytest.approx(wall, rel=0.02, abs=0.001), name
    found = {
        name: json.loads((run / "run.json").read_text())["operations"]
        for name, run in stages.items()
    }
    for stage in STAGES[1:]:  # the same is computed, except the adapter by PEFT under stage3
        assert found[stage]["per_token"] == pytest.approx(found["none"]["per_token"], rel=0.01)
    # All layers are checkpointed and all positions scored.
    assert found["one"]["per_token"] > 1.2 * found["none"]["per_token"]
    assert len({facts["convention_6n"] for facts in found.values()}) == 1


def test_stages_and_rank_counts_give_the_plain_adapter(stages: dict[str, Path]) -> None:
    expected = load_file(stages["one"] / "adapter" / "adapter_model.safetensors")
    assert len(expected) == 28  # 2 layers x 7 linears x A and B
    for name in STAGES:
        assert_same_adapter(stages[name], stages["one"], rate=1e-2, steps=6)


def test_evaluation_is_the_same_on_any_number_of_ranks(stages: dict[str, Path]) -> None:
    for index in range(3):  # before, after the first and the second epoch
        found = {
            name: [record for record in records(run) if "eval_loss" in record][index]
            for name, run in stages.items()
        }
        assert len({record["eval_tokens"] for record in found.values()}) == 1
        for record in found.values():
            assert record["eval_loss"] == pytest.approx(found["one"]["eval_loss"], rel=SAME_LOSS)


def test_zero_divides_memory_by_the_ranks(stages: dict[str, Path]) -> None:
    """Stages 1 and 2 halve the optimizer's state on 2 ranks; stage 3 halves the parameters too."""

    def bytes_of(name: str, kind: str) -> list[int]:
        record = json.loads((stages[name] / "run.json").read_text())
        assert record["status"] == "finished"
        return [rank[f"{kind}_bytes"] for rank in record["ranks_memory"]]

    whole_state, whole_model = bytes_of("none", "optimizer"), bytes_of("none", "parameter")
    assert len(whole_state) == 2 and whole_state[0] == whole_state[1]
    for stage in ("stage1", "stage2", "stage3"):
        for share in bytes_of(stage, "optimizer"):
            assert share == pytest.approx(whole_state[0] / 2, rel=0.05), stage
    for stage in ("stage1", "stage2"):
        assert bytes_of(stage, "parameter") == whole_model
    for share in bytes_of("stage3", "parameter"):
        assert share == pytest.approx(whole_model[0] / 2, rel=0.05)


def test_one_rank_with_little_memory_makes_all_recompute(
    tmp_path: Path, llama: Path, rows: Path
) -> None:
    """Under ZeRO-3 ranks that pass the layers in different orders would wait for ever."""
    run = run_script(
        tmp_path,
        "import os, sys, sft.plan.memory, sft.train\n"
        "if os.environ['RANK'] == '1':\n"
        "    sft.plan.memory.available = lambda: 1\n"
        "sft.train.main(sys.argv[1:])\n",
        *("model=hf", f"model.name_or_path={llama}", "dataset=jsonl", f"dataset.path={rows}"),
        *("template=chat", "train.per_device_train_batch_size=2", "train.global_batch_size=4"),
        *("train.max_steps=2", "zero=stage3", "dataset.exact_match=3"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("exact match 0.0%") == 2  # before and after training
    said = " ".join(run.stdout.split())  # reasons are wrapped
    assert "train.gradient_checkpointing true rank 1 has too little memory" in said
    assert "of weights and optimizer state plus a margin of 30% do not fit into 0 MiB free" in said
    assert "stage3.json as set; sizes in elements, chosen for the model: stage3_" in said


@pytest.mark.parametrize(("family", "precision"), [("llama", "fp32"), ("qwen3_moe", "bf16")])
def test_ranks_that_part_stop_the_run(
    tmp_path: Path, llama: Path, rows: Path, family: str, precision: str
) -> None:
    """The stock evaluate, called before training, silently switches DDP's gradient sync off."""
    base = llama if family == "llama" else build_model(tmp_path / family, family, tied=False)
    result = run_script(
        tmp_path,
        "import sys, trl, sft.cli.command, sft.training.summary, sft.train\n"
        "describe = sft.training.summary.describe_run\n"
        "def evaluate_first(config, trainer, *rest):\n"
        "    describe(config, trainer, *rest)\n"
        "    trl.SFTTrainer.evaluate(trainer)\n"
        "sft.training.summary.describe_run = evaluate_first\n"
        "sft.cli.command.time.sleep = lambda seconds: None\n"  # for another rank to speak first
        "sft.train.main(sys.argv[1:])\n",
        *("model=hf", f"model.name_or_path={base}", "dataset=jsonl", f"dataset.path={rows}"),
        *("template=chat", "train.per_device_train_batch_size=2", "train.global_batch_size=4"),
        *("train.max_steps=3", f"precision={precision}"),
    )
    assert result.returncode == 1
    assert "the trained parameters of ranks [1] differ from rank 0's" in result.stderr
    run = next((tmp_path / "outputs").iterdir())
    assert json.loads((run / "run.json").read_text())["status"] == "failed"


def test_memory_that_runs_out_on_one_rank_ends_the_samples_and_not_the_run(
    tmp_path: Path, common: list[str], stages: dict[str, Path]
) -> None:
    run = run_script(
        tmp_path,
        "import os, sys, torch, sft.watch.samples, sft.train\n"
        "answer, calls = sft.watch.samples.continuations, []\n"
        "def fail(*given, **options):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 2:\n"
        "        raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB')\n"
        "    return answer(*given, **options)\n"
        "sft.watch.samples.continuations = fail\n"
        "sft.train.main(sys.argv[1:])\n",
        *(*common, "sample=held-out", "sample.every=1", "sample.num=2", "output_dir=run"),
    )
    assert run.returncode == 0, run.stdout + run.stderr
    said = "warning: no more samples are taken, because memory has run out: CUDA out of memory"
    assert run.stdout.count(said) == 1
    samples = read_records(tmp_path / "run" / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 0]
    found, expected = (
        load_file(where / "adapter" / "adapter_model.safetensors")
        for where in (tmp_path / "run", stages["none"])
    )
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
