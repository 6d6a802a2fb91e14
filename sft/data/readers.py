"""TEMP."""

from __future__ import annotations
import json, os, hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    values: dict[str, Any]
    file: str
    line: int


class BadRow(NamedTuple):
    file: str
    line: int
    reason: str
    text: str


def cache_dir() -> Path:
    return Path(os.environ.get("SFT_CACHE_DIR", Path.home() / ".cache" / "sft"))


def read(path, subset=None, split="train", streaming=False):
    if path.endswith(".txt"):
        yield Row({"text": Path(path).read_text()}, path, 1)
        return
    if path.endswith(".json"):
        for i, r in enumerate(json.load(open(path))):
            yield Row(r, path, i + 1)
        return
    for i, l in enumerate(open(path, "rb")):
        yield Row(json.loads(l), path, i + 1)


def fingerprint(path, subset=None, split="train"):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()
