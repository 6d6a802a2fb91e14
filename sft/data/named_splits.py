"""Choose the files of one split in a folder that holds several."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sft.errors import DataError, SourceError

# The words in a path that stand for a split, as in datasets.data_files.SPLIT_KEYWORDS; the first
# split of a folder is the one that it has of them, in this order.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_WORD = re.compile(r"[^\W\d_]+")


def choose(root: str, split: str | None, splits: Sequence[str]) -> str:
    """Return the split of a folder that was asked for, or its first.

    Raises:
        DataError: The folder does not have it.
    """
    split = split or splits[0]
    meant = next((name for name, words in SPLITS.items() if split in words), split)
    split = meant if meant in splits else split
    if split not in splits:
        raise DataError(
            f"{root} has no split {split}; it has {', '.join(splits)}\n"
            f"    fix: dataset.split={splits[0]}"
        )
    return split


def files_of_split(root: str, files: list[str], split: str | None) -> list[str]:
    """Return the files of one split if their names tell several splits apart, else all files.

    A downloaded dataset has ``data/train-00000-of-00001.parquet`` beside
    ``data/test-00000-of-00001.parquet``: to train on both would be to train on the test.

    Args:
        root: The folder.
        files: Its files of rows.
        split: The split; None: the first.

    Raises:
        DataError: The folder lacks the split, or files are of no split beside those of several.
    """
    members: dict[str, list[str]] = {name: [] for name in (*SPLITS, "")}
    for file in files:
        words = _WORD.findall(file.removeprefix(root).lower())
        found = (name for word in words for name, known in SPLITS.items() if word in known)
        members[next(found, "")].append(file)
    rest = members.pop("")
    splits = [name for name, found in members.items() if found]
    if len(splits) < 2:
        return files
    if rest:
        raise SourceError(
            f"{root} holds files of the splits {', '.join(splits)}, and {len(rest)} of none, such "
            f"as {rest[0]}",
            f"{members[splits[0]][0]}, or a folder without it",
        )
    return members[choose(root, split, splits)]
