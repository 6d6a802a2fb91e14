"""Read what a folder of prepared data says about itself; the checks of a config need it, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.config.data_settings import DatasetConfig
from sft.config.plain import read_json
from sft.config.rules import written
from sft.errors import Problem
from sft.files import without_protocol

META = "meta.json"
# Settings that are used when data is prepared, and never again.
READING = (
    *("columns", "roles", "ignore_columns", "max_rows", "max_eval_rows", "max_length", "overlong"),
    *("packing", "boundary", "boundary_overlap", "sanitize", "order", "sample"),
)


def meta_of(path: str | None) -> dict[str, Any] | None:
    """Read an artefact's ``meta.json``; None if the path is not an artefact."""
    folder = Path(without_protocol(path or "")).expanduser()
    # os.path.isfile, because Path.is_file raises for a name that is too long to be a file's.
    if not path or not all(map(os.path.isfile, (folder / META, folder / "dataset_dict.json"))):
        return None
    try:
        meta = read_json(folder / META, finite=False)
    except ValueError:
        return None
    ours = isinstance(meta, dict) and "parts" in meta and "tokenizer" in meta
    return meta if ours else None


def unread(data: DatasetConfig) -> Iterator[Problem]:
    """Find settings that prepared data was made without, and that would have no effect on it."""
    meta, default = meta_of(data.path), DatasetConfig()
    if meta is None:
        return
    made = meta.get("settings", {})
    for name in READING:
        value, own = getattr(data, name), getattr(default, name)
        if value not in (own, made.get(name, own)):
            rule = "has no effect on prepared data, which was made without it"
            fix = f"{written(f'dataset.{name}', own)}, or prepare the data again with it"
            yield Problem(written(f"dataset.{name}", value), rule, fix)
