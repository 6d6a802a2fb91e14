"""Runs that stop early, write the weights of the best evaluation, and evaluate several sets."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, records
from warm import run_warm

from sft.files import hash_of
from sft.run.outcome import cut_back, differences, outcome

INJECT = str(ROOT / "benchmarks" / "inject.py")


def facts(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def weights(folder: Path) -> str:
    return hash_of(folder / "adapter_model.safetensors")


def saved(run: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in run.glob("checkpoint-*"))


def evaluated(run: Path) -> dict[int, dict[str, Any]]:
    return {record["step"]: record for record in records(run) if "eval_loss" in record}


@pytest.fixture
def judged(saving: list[str]) -> list[str]:
    """Give the settings of a run whose rate is so high that its evaluations get worse soon."""
    own = ("learning_rate", "max_steps", "save_s")
    settings = [item for item in saving if not any(name in item for name in own)]
    settings += ["train.learning_rate=5e-2", "train.max_steps=30", "train.save_strategy=steps"]
    settings += ["train.eval_strategy=steps", "train.eval_steps=1", "train.save_total_limit=1"]
    return [*settings, "train.load_best_model_at_end=true", "train.early_stopping_patience=3"]


def test_a_run_that_is_killed_stops_where_the_straight_one_does(
    tmp_path: Path, judged: list[str]
) -> None:
    straight, run = tmp_path / "straight", tmp_path / "run"
    judged = [*judged, "train.save_steps=4"]

    def start(*words: str, fault: str = "", check: bool = True) -> Any:
        changed = {word.partition("=")[0] for word in words}
        command = [word for word in judged if word.partition("=")[0] not in changed]
        head = [INJECT, fault, "sft.train"] if fault else ["train"]
        return run_warm(*head, *command, *words, f"output_dir={run}", cwd=tmp_path, check=check)

    run_warm("train", *judged, f"output_dir={straight}", cwd=tmp_path)
    done = facts(straight)
    best, last = done["best"]["step"], done["final"]["steps"]
    figures = evaluated(straight)
    assert list(figures) == list(range(last + 1)) and last == best + 3 < 30
    assert done["best"] == {
        **{"metric": "eval_loss", "value": figures[best]["eval_loss"], "step": best},
        "written": True,
    }
    assert done["final"]["written_step"] == best
    assert done["final"]["eval_loss"] == figures[best]["eval_loss"]
    assert done["final"]["stopped_early"].startswith("eval_loss was not better than ")
    assert saved(straight) == [best, last]
    assert weights(straight / "adapter") == weights(straight / f"checkpoint-{best}")
    assert weights(straight / "adapter") != weights(straight / f"checkpoint-{last}")
    # Killed between two evaluations, then in the middle of the end.
    step = "SIGKILL:sft.training.guard.Guard.on_step_end:before"
    assert start(fault=f"{step}:{best + 2}:0", check=False).returncode != 0
    loaded = "SIGKILL:sft.training.evaluation.EvaluatingTrainer.load_best:after:1:0"
    assert start(fault=loaded, check=False).returncode != 0
    assert saved(run) == [best, last]
    assert start().returncode == 0
    assert differences(outcome(straight), outcome(run)) == []
    again = facts(run)
    assert (again["best"], again["final"]) == (done["best"], done["final"])
    # It is finished; to go on, it needs more patience, not more steps.
    refused = start(check=False)
    assert refused.returncode != 0 and "it stopped early after step" in refused.stderr
    refused = start("train.max_steps=60", "resume.allow=[train.max_steps]", check=False)
    assert "a larger train.early_stopping_patience" in refused.stderr
    allow = "resume.allow=[train.early_stopping_patience]"
    start("train.early_stopping_patience=5", allow)
    assert facts(run)["final"]["steps"] > last


def test_the_best_weights_are_written_without_a_strategy_to_save(
    tmp_path: Path, judged: list[str]
) -> None:
    own = ("save_strategy", "save_total_limit")
    command = [item for item in judged if not any(name in item for name in own)]
    command += ["train.save_strategy=no", f"output_dir={tmp_path / 'run'}"]
    step = "SIGKILL:sft.training.guard.Guard.on_step_end:before:8:0"
    run_warm(INJECT, step, "sft.train", *command, cwd=tmp_path, check=False)
    (kept,) = saved(tmp_path / "run")
    expected = weights(tmp_path / "run" / f"checkpoint-{kept}")
    run_warm("train", *command, cwd=tmp_path)
    done = facts(tmp_path / "run")
    assert done["best"]["step"] == kept and done["best"]["written"]
    assert weights(tmp_path / "run" / "adapter") == expected
    assert saved(tmp_path / "run") == []
    # The weights after the first step of the warm-up, whose rate is 0, are those before training.
    answers = ["dataset.exact_match=2", "train.metric=exact_match", "overwrite=true"]
    run_warm("train", *command, *answers, cwd=tmp_path)
    best = facts(tmp_path / "run")["best"]
    assert best == {"metric": "exact_match", "value": 0.0, "step": 1, "written": True}


@pytest.mark.parametrize("stage", ["stage2", "stage3"])
def test_two_ranks_write_the_best_weights_too(
    tmp_path: Path, judged: list[str], stage: str
) -> None:
    command = [*judged, "train.save_steps=4", f"zero={stage}", f"output_dir={tmp_path / 'run'}"]
    run_warm("train", *command, ranks=2, cwd=tmp_path)
    done = facts(tmp_path / "run")
    best = done["best"]["step"]
    assert done["final"]["steps"] == best + 3
    assert weights(tmp_path / "run" / "adapter") == weights(tmp_path / "run" / f"checkpoint-{best}")


def test_more_evaluations_change_no_weight_and_a_set_may_be_added_on_resume(
    tmp_path: Path, saving: list[str], rows: Path
) -> None:
    from sft.train import main, train

    settings = [item for item in saving if "max_steps" not in item] + ["train.max_steps=4"]
    (tmp_path / "hard.jsonl").write_text('{"prompt": "Say it.", "completion": "it is said"}\n')
    sets = [f"dataset.eval.same.path={rows}", "dataset.exact_match=3", "train.metric=exact_match"]
    every = ["train.eval_strategy=steps", "train.eval_steps=1"]
    plain, run = (f"output_dir={tmp_path / name}" for name in ("plain", "run"))
    train(main.compose([*settings, plain]))
    train(main.compose([*settings, *sets, *every, run]))
    assert weights(tmp_path / "plain" / "adapter") == weights(tmp_path / "run" / "adapter")
    assert list(evaluated(tmp_path / "run")) == [0, 1, 2, 3, 4]
    for record in evaluated(tmp_path / "run").values():
        assert record["exact_match_rows"] == 3 and record["eval_same_tokens"] > 100
    assert (
        evaluated(tmp_path / "run")[4]["eval_loss"]
        == (evaluated(tmp_path / "plain")[4]["eval_loss"])
    )
    final = facts(tmp_path / "run")["final"]
    assert {"eval_loss", "eval_same_loss", "eval_same_perplexity", "exact_match"} <= final.keys()
    cut_back(tmp_path / "run", 2)
    train(
        main.compose(
            [*settings, *sets, *every, f"dataset.eval.hard.path={tmp_path / 'hard.jsonl'}", run]
        )
    )
    assert weights(tmp_path / "plain" / "adapter") == weights(tmp_path / "run" / "adapter")
    assert ["eval_hard_loss" in record for record in evaluated(tmp_path / "run").values()] == [
        *[False] * 3,
        *[True] * 2,
    ]
