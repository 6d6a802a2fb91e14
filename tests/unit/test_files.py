"""Folders that are complete or absent: what is left after an error, a kill and a success."""

import shutil
from pathlib import Path

import pytest

from sft.errors import MergeError
from sft.files import begin_folder, new_folder, partial_of
from sft.merge.claim import claimed
from sft.merge.report import REPORT


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_new_folder_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    for content in ("old", "new"):  # the second replaces the first
        with new_folder(tmp_path / "runs" / "out") as partial:
            (partial / content).mkdir()
            (partial / content / "file").write_text(content)
            assert (tmp_path / "runs" / "out" / "old").exists() is (content == "new")
    assert names(tmp_path / "runs") == ["out", "out/new", "out/new/file"]


def test_after_an_error_the_earlier_folder_is_left(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out") as partial:
        (partial / "good").touch()
    for error in (OSError("disk"), KeyboardInterrupt()):
        with pytest.raises(type(error)), new_folder(tmp_path / "out") as partial:
            (partial / "half").touch()
            raise error
        assert names(tmp_path) == ["out", "out/good"]


def test_what_a_kill_left_is_emptied_in_place(tmp_path: Path) -> None:
    """So that a lock on the folder holds for what is written after it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    partial = partial_of(tmp_path / "out")
    (partial / "deep" / "er").mkdir(parents=True)
    (partial / "file").touch()
    (partial / "link").symlink_to(outside)
    inode = partial.stat().st_ino
    assert begin_folder(tmp_path / "out").stat().st_ino == inode
    assert list(partial.iterdir()) == [] and (outside / "precious").is_file()


def test_an_output_is_claimed_until_it_has_its_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with claimed(out) as partial:
        (partial / REPORT).touch()
        with pytest.raises(MergeError, match="another merge is writing"), claimed(out):
            pass
        assert names(partial) == [REPORT]
    assert names(tmp_path) == ["out", f"out/{REPORT}"]


def test_a_replaced_folder_is_deleted_after_the_new_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill while the old one is deleted must not leave the name without a folder."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    seen: list[list[str]] = []
    delete = shutil.rmtree

    def watched(path: Path, **options: bool) -> None:
        if path.exists():
            seen.append(names(out))
        delete(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    with new_folder(out) as partial:
        (partial / "new").touch()
    assert seen == [["new"]]
    assert names(tmp_path) == ["out", "out/new"]
