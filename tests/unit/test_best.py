"""Which evaluation is the best, and when a run stops, by what it has logged."""

import math
from typing import Any

import pytest
from unit.test_checks import legal_config

from sft.config import evaluation
from sft.config.checks import check
from sft.config.settings import TrainConfig
from sft.run import record
from sft.training.best import Best, Verdict


def judged(values: list[float], steps: list[int] | None = None, **settings: Any) -> Verdict:
    """Judge evaluations after steps 10, 20, ..., and one before training."""
    history = [{"step": 0, "eval_loss": 0.0}]
    history += [
        {"step": 10 * number, "eval_loss": value, "eval_hard_loss": -value}
        for number, value in enumerate(values, 1)
    ]
    return Best(TrainConfig(**settings)).judge(history, steps)


def test_the_best_evaluation_and_the_patience() -> None:
    assert judged([]) == Verdict(None, None, 0, False)
    assert judged([3.0, 2.0, 2.0, 2.5]) == Verdict(20, 2.0, 2, False)
    assert judged([3.0, 2.0, 2.0, 2.5], early_stopping_patience=2).stops
    assert not judged([3.0, 2.0, 2.0, 1.9], early_stopping_patience=2).stops
    assert judged([3.0, math.nan, math.inf]) == Verdict(10, 3.0, 2, False)
    assert judged([math.nan, math.nan], early_stopping_patience=2) == Verdict(None, None, 2, True)
    # Only these have a checkpoint.
    assert judged([3.0, 1.0, 2.0], steps=[10, 30]).step == 30


def test_the_threshold_is_measured_from_the_best_as_in_transformers() -> None:
    """Small gains move the best, and do not reset the patience."""
    found = judged([1.0, 0.95, 0.9, 0.85], early_stopping_threshold=0.1, early_stopping_patience=3)
    assert found == Verdict(40, 0.85, 3, True)
    assert judged([1.0, 0.95, 0.8], early_stopping_threshold=0.1).waited == 0


def test_the_direction_is_that_of_the_figure_unless_it_is_set() -> None:
    assert not evaluation.greater_is_better(TrainConfig(metric="eval_perplexity"))
    assert evaluation.greater_is_better(TrainConfig(metric="mean_token_accuracy"))
    assert judged([1.0, 2.0], greater_is_better=True).step == 20
    assert judged([1.0, 2.0], metric="eval_hard_loss").step == 20
    history = [{"step": 1, "eval_loss": 1.0, "exact_match": 0.5}]
    history += [{"step": 2, "eval_loss": 0.5, "exact_match": 0.25}]
    assert Best(TrainConfig(metric="exact_match")).judge(history).step == 1


def test_a_figure_of_training_is_the_last_logged_one() -> None:
    history: list[dict[str, float]] = [{"step": 1, "eval_loss": 1.0}]  # nothing was logged before
    history += [{"step": 2, "loss": 3.0}, {"step": 3, "loss": 2.0}, {"step": 3, "eval_loss": 1.0}]
    history += [{"step": 5, "eval_loss": 1.0}, {"step": 5, "train_runtime": 3.0}]
    assert Best(TrainConfig(metric="loss")).judge(history) == Verdict(3, 2.0, 1, False)


HELD_OUT: dict[str, Any] = {"dataset__eval_fraction": 0.1}
SET = {"dataset__eval": {"hard": {"path": "hard.jsonl"}}}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {**HELD_OUT, **SET, "train__metric": "eval_hrd_loss"},
            "train.metric=eval_hrd_loss|is no figure of this run's evaluations; these are "
            "eval_loss, eval_perplexity, eval_hard_loss, eval_hard_perplexity, loss, entropy, "
            "mean_token_accuracy|train.metric=eval_hard_loss",
        ),
        (
            SET,
            "train.metric=eval_loss|the only held-out rows are the sets of dataset.eval, so it "
            "must name one of them|train.metric=eval_hard_loss",
        ),
        (
            {**HELD_OUT, "train__metric": "exact_match"},
            "train.metric=exact_match|no held-out prompt is answered|dataset.exact_match=200",
        ),
        (
            {"train__load_best_model_at_end": True},
            "train.load_best_model_at_end=true|there are no held-out rows; there is no evaluation "
            "that could be the best|dataset.eval_fraction=0.05",
        ),
        (
            {"train__metric": "loss"},
            "train.metric=loss|has no effect: there is no evaluation|dataset.eval_fraction=0.05",
        ),
        (
            {**HELD_OUT, "dataset__eval": {"a.b": {"path": "x"}}},
            "dataset.eval.a.b={'path': 'x'}|the name of a set has letters, digits, _ and -, at "
            "most 64 of them|dataset.eval.NAME={'path': 'x'}",
        ),
        (
            {**HELD_OUT, "dataset__eval": {"a": {"max_rows": 3}}},
            "dataset.eval.a={'max_rows': 3}|needs a path|dataset.eval.a={path: FILE}",
        ),
        (
            {**HELD_OUT, "dataset__eval": {"a": {"path": "x", "weight": 2, "max_rows": 0}}},
            "dataset.eval.a.weight=2|the keys of a source are columns, max_rows, path, roles, "
            "split, subset|remove it\ndataset.eval.a.max_rows=0|must be a whole number of rows, at "
            "least 1|dataset.eval.a.max_rows=null",
        ),
        ({**HELD_OUT, "dataset__eval": {"a": {"split": "test"}}}, ""),
        ({**SET, "train__metric": "eval_hard_loss", "train__early_stopping_patience": 1}, ""),
        ({**HELD_OUT, "dataset__max_eval_rows": 5, **SET}, ""),
    ],
)
def test_what_cannot_be_judged_is_refused(settings: dict[str, Any], said: str) -> None:
    found = check(legal_config(**settings))
    assert "\n".join(f"{p.setting}|{p.rule}|{p.fix}" for p in found) == said


@pytest.mark.parametrize("name", ["hard", "a-b", "0"])
def test_how_long_a_set_took_is_no_part_of_what_is_trained(name: str) -> None:
    assert evaluation.NAME.fullmatch(name)
    logged = {"step": 1, f"eval_{name}_loss": 2.0, f"eval_{name}_seconds": 0.1}
    assert record.trained(logged) == {"step": 1, f"eval_{name}_loss": 2.0}
