"""Find the files of rows that a path names, and those beside them that are not read."""

from __future__ import annotations

import glob
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sft.data.named_splits import choose, files_of_split
from sft.data.readers import TABLES, TEXT, kind_of, read_errors
from sft.errors import DataError, SourceError, few
from sft.files import without_protocol

# The names of files with a known ending that hold no rows, in lower case.
NO_DATA = re.compile(
    r"(readme([-_]\w{2,5})?|licen[cs]e|notice|changelog|citation|contributing|code_of_conduct)"
    r"(\.md|\.txt|\.rst|\.html)?|requirements\.txt"
    r"|(dataset_infos?|dataset_dict|state|croissant)\.json"
)
IRREGULAR = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
Entry = tuple[str, str]  # a path, and what it is if it is no regular file


@dataclass(frozen=True)
class Location:
    """What a path names.

    Attributes:
        path: The path; a local one without ``file://``.
        files: The files to read, in order; none if the path is the id of a hub dataset.
        unused: Files of the folder that are not read, by their names within it.
        unexpected: Those of them whose names do not say, as README.md does, that they hold no rows.
        root: The folder that names are given within.
        has_splits: Whether the folder has splits: ``DatasetDict.save_to_disk`` wrote it, or the
            names of its files say so.
    """

    path: str
    files: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    root: str = ""
    has_splits: bool = False

    @property
    def remote(self) -> bool:
        """Return whether fsspec reads the files."""
        return "://" in self.path


def resolve(path: str, split: str | None = "train") -> Location:
    """Find the files that a path names: the one place that decides what is read.

    Args:
        path: File, folder, pattern, URL or hub id.
        split: Split of a folder that has several; None: the first.

    Raises:
        DataError: The path does not exist, or not all of its files can be read together.
    """
    path = without_protocol(path)
    with read_errors(path):
        found = _remote(path, split) if "://" in path else _local(path, split)
    if split not in (None, "train") and found.files and not found.has_splits:
        raise DataError(
            f"{path} has no split {split}: files have no splits\n"
            "    fix: dataset.eval_path=FILE instead of dataset.eval_split, or dataset.split=train"
        )
    return found


def _local(path: str, split: str | None) -> Location:
    local = Path(path).expanduser()
    if local.is_dir():
        return _of_folder(str(local), list(_walk(local)), split)
    if os.path.lexists(local):
        if problem := _irregular(local):
            raise SourceError(f"{path} is {problem}, not a file of rows", "FILE")
        return Location(path, [str(local)], root=str(local.parent))
    if found := sorted(glob.glob(str(local), recursive=True)):
        files = [Path(name) for name in found if not os.path.isdir(name)]
        entries = [(str(file), _irregular(file)) for file in files]
        # A folder that matches is not read, unless files within it match, too, as with **.
        parents = {str(parent) for file in files for parent in file.parents}
        folders = [
            name for name in found if os.path.isdir(name) and name.rstrip("/") not in parents
        ]
        entries += [(name, "a folder") for name in folders]
        return _chosen(path, os.path.dirname(found[0]), entries)
    may_be_hub_id = not (local.is_absolute() or path.startswith(".") or path.count("/") > 1)
    if kind_of(path) or glob.has_magic(path) or not may_be_hub_id:
        where = f"FILE; a relative path starts at {Path.cwd()}"
        raise SourceError(f"there is no file or folder {path}", where)
    return Location(path)


def _irregular(file: Path) -> str:
    """Return what stands in a regular file's place; "" if it is a regular file."""
    try:
        mode = file.stat().st_mode
    except OSError:
        return f"a broken link to {os.readlink(file)}" if file.is_symlink() else "gone"
    return next((name for is_kind, name in IRREGULAR if is_kind(mode)), "")


def _refuse(error: OSError) -> None:
    raise error


def _walk(folder: Path) -> Iterator[Entry]:
    """Yield the entries below a folder, in order; a folder that is linked twice is read once.

    A hidden folder is not entered and is an entry itself.
    """
    seen = {os.path.realpath(folder)}
    found: list[tuple[Path, str]] = []
    for parent, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        inside = sorted(folders)
        folders.clear()
        for name in inside:
            real = os.path.realpath(os.path.join(parent, name))
            if name.startswith("."):
                found.append((Path(parent, name), "a hidden folder"))
            elif real not in seen:
                folders.append(name)
            seen.add(real)
        found += [(path, _irregular(path)) for name in files if (path := Path(parent, name))]
    yield from ((str(path), what) for path, what in sorted(found, key=lambda item: item[0].parts))


def _remote(path: str, split: str | None) -> Location:
    import fsspec

    filesystem, root = fsspec.url_to_fs(path)
    # A server has no folders, but may list files on a page whose address ends in a slash.
    is_page = path.startswith(("http://", "https://"))
    may_be_folder = path.endswith("/") if is_page else not glob.has_magic(path)
    if may_be_folder and filesystem.isdir(root):
        found = filesystem.find(root, detail=True)
        kinds = {name: info["type"] for name, info in found.items()}
        entries = [
            (filesystem.unstrip_protocol(name), "" if kind == "file" else kind)
            for name, kind in sorted(kinds.items(), key=lambda item: item[0].split("/"))
        ]
        return _of_folder(filesystem.unstrip_protocol(root).rstrip("/"), entries, split)
    if "::" in path and not glob.has_magic(path):  # a file in an archive
        return Location(path, [path], root=path)
    files = [file.fs.unstrip_protocol(file.path) for file in fsspec.open_files(path)]
    if not files:
        raise SourceError(f"there is no file at {path}", "URL of a file")
    root = os.path.dirname(files[0])
    return (
        _chosen(path, root, [(f, "") for f in files])
        if len(files) > 1
        else Location(path, files, root=root)
    )


def _of_folder(root: str, entries: list[Entry], split: str | None) -> Location:
    """Return what a folder's entries are: a dataset that Datasets saved, or files of rows."""
    names = {name for name, what in entries if not what}
    parents = {os.path.dirname(name) for name in names}
    saved = sorted(f for f in parents if {f"{f}/state.json", f"{f}/dataset_info.json"} <= names)
    if f"{root}/dataset_dict.json" in names:
        splits = _loaded(f"{root}/dataset_dict.json")["splits"]
        split = choose(root, split, splits)
        return Location(root, _shards(f"{root}/{split}", names), root=root, has_splits=True)
    if root in saved:
        return Location(root, _shards(root, names), root=root)
    if saved:
        rule = f"{root} holds {len(saved)} folders that Datasets saved; only one can be read"
        raise SourceError(rule, saved[0])
    found = _chosen(root, root, entries)
    if kind_of(found.files[0]) in TEXT:  # of which a name tells the subject
        return found
    files = files_of_split(root, found.files, split)
    if files == found.files:
        return found
    others = [name.removeprefix(root).lstrip("/") for name in found.files if name not in files]
    return replace(found, files=files, unused=[*found.unused, *others], has_splits=True)


def _shards(folder: str, names: set[str]) -> list[str]:
    """Return the Arrow files of a dataset that ``save_to_disk`` wrote."""
    state = _loaded(f"{folder}/state.json")
    if any("indices" in key and value for key, value in state.items()):
        raise DataError(
            f"{folder} was saved by an old release of Datasets, with its rows in their own order"
            "\n    fix: load it and save it with a newer release"
        )
    files = [f"{folder}/{item['filename']}" for item in state["_data_files"]]
    if missing := [file for file in files if file not in names]:  # or outside of the folder
        raise DataError(f"{missing[0]} is no file of the dataset {folder}\n    fix: save it again")
    return files


def _loaded(file: str) -> Any:
    import fsspec

    with read_errors(file), fsspec.open(file, "rb") as opened:
        return json.load(opened)


def _chosen(path: str, root: str, entries: Sequence[Entry]) -> Location:
    """Choose the files to read among the entries of a folder or pattern.

    Raises:
        DataError: None of them holds rows, or not all that do can be read together.
    """

    def short(name: str) -> str:
        return name.removeprefix(root).lstrip("/")

    hidden = {name for name, _ in entries if any(p.startswith(".") for p in short(name).split("/"))}
    known = {name for name, _ in entries if NO_DATA.fullmatch(os.path.basename(name).lower())}
    for name, what in entries:
        if what and kind_of(name) and what[2:] not in ("folder", "hidden folder"):
            raise DataError(f"{name} is {what}, not a file of rows\n    fix: remove it")
    rows = [name for name, what in entries if not what and kind_of(name) and name not in hidden]
    rows = [name for name in rows if name not in known] or rows  # a README may be all there is
    texts = [name for name in rows if kind_of(name) in TEXT]
    tables = [name for name in rows if kind_of(name) in TABLES]
    if not rows:
        found = few(short(name) for name, _ in entries)
        raise DataError(
            f"{path} holds no file of a known kind{', but ' * bool(found)}{found}\n"
            f"    fix: a folder with files of rows: {', '.join((*TEXT, *TABLES))}"
        )
    if texts and tables:
        raise SourceError(
            f"{path} holds plain text ({few(map(short, texts))}) and tables "
            f"({few(map(short, tables))}), which are not read together",
            f"'{root}/**/*{kind_of(tables[0])}', a pattern for some of them",
        )
    read = set(rows)
    unused = [name for name, _ in entries if name not in read]
    unexpected = [short(name) for name in unused if name not in hidden | known]
    return Location(path, rows, list(map(short, unused)), unexpected, root)
