"""The steps after which a run is logged, evaluated and saved; and which checkpoints stay."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState
from unit.test_checks import found

from sft.checkpoint import folders
from sft.config.settings import TrainConfig
from sft.errors import ConfigError
from sft.files import begin_folder
from sft.plan.schedule import choose_cadence, points
from sft.train import main
from sft.training.cadence import WithinEpochs


def test_points_are_evenly_spaced_and_the_last_is_the_epochs_end() -> None:
    assert points(10, 4) == [3, 5, 8, 10]
    assert points(5, 5) == [1, 2, 3, 4, 5]
    assert points(7, 1) == [7]
    for per_epoch in range(1, 40):
        for count in range(1, per_epoch + 1):
            spaced = points(per_epoch, count)
            gaps = [b - a for a, b in zip([0, *spaced], spaced, strict=False)]
            assert spaced[-1] == per_epoch
            assert max(gaps) - min(gaps) <= 1
            assert min(gaps) >= 1


def chosen(samples: int, evaluates: bool = True, **settings: Any) -> dict[str, tuple[Any, str]]:
    train = TrainConfig(**{"global_batch_size": 4, "save_total_limit": 2, **settings})
    choices = choose_cadence(train, samples, evaluates)
    return {choice.setting: (choice.value, choice.reason) for choice in choices}


@pytest.mark.parametrize(
    ("step", "stops", "evaluates"), [(6, True, False), (6, False, True), (16, True, True)]
)
def test_an_early_stop_within_an_epoch_is_not_evaluated_twice(
    step: int, stops: bool, evaluates: bool
) -> None:
    """Only the last step of a run, which stops it too, is evaluated as its epoch ends."""
    within = WithinEpochs(TrainConfig(global_batch_size=4, evals_per_epoch=3), 16)
    control = TrainerControl(should_training_stop=stops, should_evaluate=True)
    within.on_epoch_end(None, TrainerState(global_step=step, max_steps=16), control)
    assert control.should_evaluate is evaluates


def test_a_share_is_rounded_up_to_steps_and_a_count_is_listed() -> None:
    steps = {"eval_strategy": "steps", "save_strategy": "steps"}
    shares = {"eval_steps": 0.1, "save_steps": 0.5, "logging_steps": 0.01}
    assert chosen(40, num_train_epochs=2.5, **steps, **shares) == {  # 25 steps
        "train.logging_steps": (1, "0.01 of 25 steps"),
        "train.eval_steps": (3, "0.1 of 25 steps"),
        "train.save_steps": (13, "0.5 of 25 steps"),
    }
    assert chosen(40, max_steps=30, **steps, **shares)["train.eval_steps"][0] == 3
    assert chosen(40, eval_steps=5, save_steps=7, **steps) == {}  # as set
    listed = chosen(40, evals_per_epoch=4, saves_per_epoch=1)
    assert listed == {
        "train.evals_per_epoch": (4, "after steps 3, 5, 8, 10 of the 10 of each epoch"),
        "train.saves_per_epoch": (1, "after steps 10 of the 10 of each epoch"),
    }
    assert chosen(400, evals_per_epoch=50)["train.evals_per_epoch"][1].endswith(
        "22, 24, ... of the 100 of each epoch"
    )
    limit = (
        "the newest checkpoint; the one with the best evaluation stays beside it, if they differ"
    )
    assert chosen(40, save_total_limit=1) == {"train.save_total_limit": (1, limit)}
    assert chosen(40, evaluates=False, save_total_limit=1) == {}


def test_more_points_than_steps_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        chosen(10, evals_per_epoch=4, saves_per_epoch=5)
    assert [(p.setting, p.rule, p.fix) for p in error.value.problems] == [
        (
            f"train.{name}s_per_epoch={count}",
            "is more than the 3 steps of an epoch",
            f"train.{name}s_per_epoch=3",
        )
        for name, count in (("eval", 4), ("save", 5))
    ]


def test_settings_that_contradict_each_other_are_refused() -> None:
    held_out = {"dataset__eval_fraction": 0.1}
    assert found(train__evals_per_epoch=4, train__saves_per_epoch=2, **held_out) == []
    assert found(train__evals_per_epoch=4) == [
        ("train.evals_per_epoch=4", "there are no held-out rows", "dataset.eval_fraction=0.05")
    ]
    assert found(train__evals_per_epoch=4, train__eval_steps=5, **held_out) == [
        (
            "train.eval_steps=5",
            "has no effect with train.eval_strategy=epoch",
            "train.eval_steps=null",
        )
    ]
    assert found(train__saves_per_epoch=4, train__save_strategy="no") == [
        (
            "train.saves_per_epoch=4",
            "has no effect with train.save_strategy=no",
            "train.save_strategy=epoch",
        )
    ]
    assert found(train__saves_per_epoch=4, dataset__streaming=True, train__max_steps=100) == [
        (
            "train.saves_per_epoch=4",
            "with dataset.streaming the length of an epoch is not known",
            "train.saves_per_epoch=null train.save_strategy=steps train.save_steps=0.1",
        )
    ]
    rule = "must be a whole number of steps of at least 1, or a fraction of all steps below 1"
    for value in (1.5, 0, -1, 0.0):
        problem = (f"train.logging_steps={value}", rule, "train.logging_steps=10")
        assert found(train__logging_steps=value) == [problem]


def test_a_whole_number_stays_one_and_text_is_a_number() -> None:
    command = ["dataset.path=x.jsonl", "train.save_strategy=steps"]
    for written, value in (("7", 7), ("0.25", 0.25), ("1e-1", 0.1), ("'7'", 7)):
        train = main.compose([*command, f"train.save_steps={written}"]).train
        assert (type(train.save_steps), train.save_steps) == (type(value), value)
        assert type(train.logging_steps) is int
    assert main.compose([*command, "train.save_total_limit=null"]).train.save_total_limit is None


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, 8, [8]),
        (1, 4, [4, 8]),
        (1, None, [8]),
        (2, 8, [6, 8]),
        (2, 4, [4, 8]),
        (3, 2, [2, 6, 8]),
        (None, 4, [2, 4, 6, 8]),
        (2, 99, [6, 8]),  # the best one is gone
    ],
)
def test_the_newest_and_the_best_stay(
    tmp_path: Path, keep: int | None, best: int | None, left: list[int]
) -> None:
    for step in (2, 4, 6, 8):
        folders.path_of(tmp_path, step).mkdir()
    folders.rotate(tmp_path, keep, best and str(folders.path_of(tmp_path, best)))
    assert sorted(map(folders.step_of, folders.checkpoints(tmp_path))) == left


class Killed(BaseException):
    """Stands for SIGKILL: nothing but the file system is left."""


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("best", [2, 4])
def test_a_kill_at_any_moment_leaves_a_complete_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int, best: int
) -> None:
    """Each change of the file system, while step 4 is saved after step 2, is once the last."""
    left = 0  # changes before the kill

    def counted(function: Any) -> Any:
        def changing(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return function(*args, **kwargs)

        return changing

    def save(run: Path, step: int) -> None:
        final = folders.path_of(run, step)
        partial = begin_folder(final)
        (partial / "weights").write_text(str(step))
        folders.finish(partial, final, {"run": "x", "step": step})
        folders.rotate(run, keep, str(folders.path_of(run, best)))

    killed_after: list[list[int]] = []
    for moment in range(100):
        run = tmp_path / str(moment)
        run.mkdir()
        save(run, 2)
        left = moment
        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "mkdir", "write_text", "open"):
                patch.setattr(Path, name, counted(getattr(Path, name)))
            patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
            try:
                save(run, 4)
                ended = True
            except Killed:
                ended = False
        whole = [path for path in folders.checkpoints(run) if folders.damage(path) is None]
        assert whole == folders.checkpoints(run)  # none that is incomplete has a final name
        killed_after.append(sorted(map(folders.step_of, whole)))
        if ended:
            break
    assert all(killed_after)
    assert killed_after[0] == [2]
    assert killed_after[-1] == ([4] if (keep, best) == (1, 4) else [2, 4])
    assert len(killed_after) > 5
