"""Files that are whole or absent, JSON that every reader accepts, and where the cache is."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def cache_dir() -> Path:
    """Give the folder for what can be made again: $SFT_CACHE_DIR, or ~/.cache/sft."""
    return Path(os.environ.get("SFT_CACHE_DIR") or Path.home() / ".cache" / "sft")


def write_text(path: Path, text: str) -> None:
    """Write a file so that its name never holds half of it."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def to_json(record: dict[str, Any], indent: int | None = None) -> str:
    """Write JSON proper: a NaN or infinite figure, which has no number there, is null."""

    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(record), indent=indent)
