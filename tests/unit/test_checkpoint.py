"""Checkpoints on disk: complete or absent, chosen, rotated; and whether a run may go on."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from sft import process
from sft.checkpoint import folders
from sft.config import compare
from sft.errors import CheckpointError, RunError
from sft.files import begin_folder
from sft.run import record, resume


def make(folder: Path, step: int, **facts: object) -> Path:
    final = folders.path_of(folder, step)
    partial = begin_folder(final)
    (partial / "a.bin").write_bytes(bytes(1000))
    (partial / "b.json").write_text("{}")
    told = {"step": step, "ranks": 2, "stage": 1, "kind": "elementwise", **facts}
    folders.finish(partial, final, told)
    return final


def test_a_folder_has_its_name_only_once_it_is_complete(tmp_path: Path) -> None:
    final = folders.path_of(tmp_path, 4)
    partial = begin_folder(final)
    (partial / "a.bin").write_bytes(b"half")
    assert not final.exists() and folders.checkpoints(tmp_path) == []
    folders.finish(partial, final, {"step": 4})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4"]
    folders.verify(final)
    listed = json.loads((final / folders.MANIFEST).read_text())["files"]
    assert listed == {"a.bin": {"bytes": 4, "xxh3": listed["a.bin"]["xxh3"]}}


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    make(tmp_path, 4)
    final = folders.path_of(tmp_path, 4)
    partial = begin_folder(final)
    (partial / "new").touch()
    folders.finish(partial, final, {})
    assert sorted(path.name for path in final.iterdir()) == [folders.MANIFEST, "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


@pytest.mark.parametrize(
    ("name", "harm", "why"),
    [
        ("a.bin", lambda file: os.truncate(file, 999), "a.bin has 999 bytes, not 1,000"),
        ("a.bin", lambda file: file.write_bytes(bytes(999) + b"\1"), "a.bin is damaged"),
        ("b.json", lambda file: file.unlink(), "b.json is missing"),
        (folders.MANIFEST, lambda file: file.unlink(), "is not complete"),
        (folders.MANIFEST, lambda file: os.truncate(file, 30), "is damaged"),
        (folders.MANIFEST, lambda file: file.write_text('{"files": {"a": 3}}'), "is damaged"),
        (folders.MANIFEST, lambda file: file.write_bytes(b"\xff"), "is damaged"),
    ],
)
def test_the_newest_whole_one_is_chosen(tmp_path: Path, name: str, harm, why: str) -> None:
    older, newer = make(tmp_path, 9), make(tmp_path, 10)  # by number, not by name
    (tmp_path / "checkpoint-11").touch()  # a file is no checkpoint
    assert folders.choose(tmp_path, None) == (newer, [])
    harm(newer / name)
    found, passed_over = folders.choose(tmp_path, None)
    assert found == older
    [(path, reason)] = passed_over
    assert path == newer and why in reason
    with pytest.raises(CheckpointError, match=r"resume.checkpoint=checkpoint-10: .*" + why):
        folders.choose(tmp_path, "checkpoint-10")
    assert folders.choose(tmp_path, str(older)) == (older, [])
    harm(older / name)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used"):
        folders.choose(tmp_path, None)


def test_one_that_is_named_must_be_there(tmp_path: Path) -> None:
    make(tmp_path, 2)
    with pytest.raises(CheckpointError, match="has checkpoint-2\n    fix: name one of these"):
        folders.choose(tmp_path, "checkpoint-3")
    assert folders.choose(tmp_path / "nothing", None) == (None, [])


def test_a_checkpoint_of_a_different_run_is_not_used(tmp_path: Path) -> None:
    """Copied into the folder, or renamed in it; one without the run's name is of an older sft."""
    run, other = tmp_path / "run", tmp_path / "other"
    own, foreign = make(run, 10, run="a"), make(other, 30, run="c")
    shutil.copytree(foreign, run / foreign.name)
    shutil.copytree(own, run / "checkpoint-20")
    found, passed_over = folders.choose(run, None, ["a", "b"])
    assert found == own
    assert passed_over == [
        (run / "checkpoint-30", "it is a checkpoint of a different run, which was copied into this "
                                "folder"),
        (run / "checkpoint-20", "its manifest.json is that of step 10, so the folder was renamed"),
    ]  # fmt: skip
    assert folders.choose(run, None, ["c"])[0] == run / "checkpoint-30"
    with pytest.raises(CheckpointError, match=r"checkpoint-30: it is a checkpoint of a different"):
        folders.choose(run, "checkpoint-30", ["a", "b"])
    shutil.rmtree(own)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used:\n.*-30: it is a"):
        folders.choose(run, None, ["a", "b"])
    old = make(run, 40)
    assert folders.choose(run, None, ["a", "b"])[0] == old
    assert resume.changed(old, 2, 1).endswith("its manifest does not name its run")


def test_a_run_is_known_by_what_its_weights_depend_on() -> None:
    settings = {"seed": 1, "output_dir": "a", "train": {"learning_rate": 1e-4, "save_steps": 5}}
    identity = {"base": "x", "data": "y", "precision": "fp32"}
    one = record.fingerprint(settings, identity)
    moved = {**settings, "output_dir": "b", "train": {"learning_rate": 1e-4, "save_steps": 9}}
    assert record.fingerprint(moved, identity) == one
    assert record.fingerprint({**settings, "seed": 2}, identity) != one
    assert record.fingerprint(settings, {**identity, "data": "z"}) != one


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (2, None, {40, 30}),
        (2, 10, {40, 10}),
        (2, 40, {40, 30}),
        (3, 10, {40, 30, 10}),
        (9, 10, {40, 30, 20, 10}),
    ],
)
def test_the_best_and_the_newest_are_kept(
    tmp_path: Path, keep: int, best: int | None, left: set[int]
) -> None:
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    folders.rotate(tmp_path, keep, best and str(folders.path_of(tmp_path, best)))
    assert {folders.step_of(path) for path in tmp_path.iterdir()} == left


def test_what_a_kill_left_is_removed_and_what_came_later_set_aside(tmp_path: Path) -> None:
    old, new = make(tmp_path, 2), make(tmp_path, 4)
    begin_folder(folders.path_of(tmp_path, 6))
    (tmp_path / "checkpoint-1.partial-old").mkdir()
    folders.tidy(tmp_path, old)
    assert {path.name for path in tmp_path.iterdir()} == {old.name, f"{new.name}.set_aside"}
    assert folders.choose(tmp_path, None) == (old, [])


@pytest.mark.parametrize(
    ("kind", "ranks", "stage", "said"),
    [
        ("elementwise", 2, 1, ""),
        ("elementwise", 3, 0, "made by 2 ranks under ZeRO stage 1; now 3 ranks under stage 0"),
        ("by rank", 2, 1, ""),
        ("by rank", 4, 1, None),
        ("by rank", 2, 2, None),
        ("by parameter", 2, 2, None),
    ],
)
def test_state_that_cannot_go_elsewhere_is_refused(
    tmp_path: Path, kind: str, ranks: int, stage: int, said: str | None
) -> None:
    path = make(tmp_path, 2, kind=kind)
    if said is None:
        refusal = f"saved {kind}: it cannot be restored on {ranks} ranks"
        with pytest.raises(CheckpointError, match=refusal):
            resume.changed(path, ranks, stage)
    else:
        assert said in resume.changed(path, ranks, stage)


def test_only_what_changes_training_is_a_difference() -> None:
    before = {"seed": 1, "train": {"learning_rate": 1e-4, "save_steps": 5}}
    now = {"seed": 1, "train": {"learning_rate": 2e-4, "save_steps": 9}}
    now["zero"] = {"config": "a", "overrides": {"deep": {"key": 1}}}
    assert compare.differences(before, now) == {
        "train.learning_rate": "train.learning_rate: 0.0001 there, 0.0002 here"
    }
    assert compare.differences({"a": {"b": 1}}, {"a": {}}) == {
        "a": "a: unset there, {} here",
        "a.b": "a.b: 1 there, unset here",
    }


def test_a_restarted_command_is_known() -> None:
    assert not process.restarted({})
    assert not process.restarted({"TORCHELASTIC_RESTART_COUNT": "0"})
    assert process.restarted({"TORCHELASTIC_RESTART_COUNT": "1"})
    assert process.restarted({"SLURM_RESTART_COUNT": "2", "TORCHELASTIC_RESTART_COUNT": "0"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(
            ("run.json", '{"status": "fin'),
            ("run.json", ""),
            ("run.json", "[" * 100_000),
            ("run.json", "[]"),
            ("run.json", "\udcff"),
            ("run.json", '{"identity": 3}'),
            ("run.json", '{"fingerprints": "a"}'),
        ),
        *(("config.yaml", "a: ["), ("config.yaml", ""), ("config.yaml", "[1]")),
    ],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path: Path, name: str, text: str) -> None:
    assert record.read(tmp_path) == {}
    (tmp_path / name).write_text(text, errors="surrogateescape")
    read = record.read if name == record.RECORD else record.settings
    with pytest.raises(RunError, match=rf"{name} is damaged\n    fix: restore the file, or over"):
        read(tmp_path)


def test_a_folder_that_is_removed_while_the_run_trains_is_said_to_be_gone(tmp_path: Path) -> None:
    """By what writes into it: a logged line, a checkpoint, and the weights at the end."""
    from types import SimpleNamespace

    from sft.checkpoint.rank_zero import RankZero
    from sft.watch.callbacks import MetricsFile

    run, gone = tmp_path / "run", r"the run's folder .*run is gone: it was removed or renamed"
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=3)
    with pytest.raises(RunError, match=gone):
        MetricsFile(run / record.METRICS).on_log(None, state, None, {"loss": 1.0})
    for path in (folders.path_of(run, 3), run / record.ADAPTER):
        with pytest.raises(CheckpointError, match=gone) as error, RankZero(path) as main:
            main.do(begin_folder, path)
        assert "space" not in str(error.value)
    assert not run.exists()


def test_json_of_a_checkpoint_that_is_nested_deeply_is_damaged(tmp_path: Path) -> None:
    from sft.checkpoint import restore

    folder = begin_folder(tmp_path / "checkpoint-4")
    folders.finish(folder, tmp_path / "checkpoint-4", {"step": 4})
    (tmp_path / "checkpoint-4" / folders.MANIFEST).write_text("[" * 100_000)
    assert folders.damage(tmp_path / "checkpoint-4") == f"{folders.MANIFEST} is damaged"
    live: Any = None
    (tmp_path / "checkpoint-4" / "state.json").write_text("[" * 100_000)
    with pytest.raises(
        CheckpointError, match=r"state.json is damaged: .*nested(.|\n)*fix: restore"
    ):
        restore.restore(live, tmp_path / "checkpoint-4")


@pytest.mark.parametrize("change", [{"ranks": None}, {"stage": "1"}, {"kind": "new"}])
def test_a_manifest_that_does_not_say_what_made_it_is_refused(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    made = {"step": 4, "run": "r", "ranks": 1, "stage": 0, "kind": "elementwise"}
    final = tmp_path / "checkpoint-4"
    folders.finish(begin_folder(final), final, made)
    assert resume.changed(final, 1, 0) == ""
    folders.finish(begin_folder(final), final, {**made, **change})
    with pytest.raises(CheckpointError, match="does not say which ranks made it"):
        resume.changed(final, 1, 0)
