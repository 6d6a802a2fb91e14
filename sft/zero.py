"""A DeepSpeed JSON, with the overrides merged in. What it may hold is in ``sft.zero_checks``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft.config import DS_CONFIG_DIR, ZeroConfig


def json_path(zero: ZeroConfig) -> Path:
    """Find the JSON: a path, or a file name in ds_config/."""
    assert zero.config is not None
    path = Path(zero.config)
    return path if path.is_absolute() or path.is_file() else DS_CONFIG_DIR / zero.config


def read(zero: ZeroConfig) -> dict[str, Any] | None:
    """Give the DeepSpeed configuration with the overrides merged in; None without ZeRO.

    Raises:
        OSError: The JSON is not there.
        ValueError: It is not JSON.
    """
    if zero.config is None:
        return None
    ds_config = json.loads(json_path(zero).read_text(encoding="utf-8"))
    if not isinstance(ds_config, dict):
        raise ValueError("its top level must be an object")
    return _merged(ds_config, zero.overrides)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        result[key] = _merged(below, value) if both and below is not None else value
    return result


def stage(ds_config: dict[str, Any] | None) -> int:
    """Give the ZeRO stage, 0 without DeepSpeed."""
    section = (ds_config or {}).get("zero_optimization")
    value = section.get("stage") if isinstance(section, dict) else 0
    return value if isinstance(value, int) else 0  # zero_checks reports any other
