"""Read what a folder of prepared data says about itself; the checks of a config need it, too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sft.config.plain import read_json
from sft.files import without_protocol

META = "meta.json"


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
