"""Write a config as YAML, and read it back with the same values."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def to_yaml(config: Any) -> str:
    """Return a config's settings as YAML; ``sft train FILE`` and ``settings_of`` read it."""
    return OmegaConf.to_yaml(OmegaConf.structured(escaped(config)))


def settings_of(path: Path) -> Any:
    """Read the settings in a run's ``config.yaml``, as ``dataclasses.asdict`` returns them."""
    return OmegaConf.to_container(OmegaConf.load(path), resolve=True)


def escaped(value: Any) -> Any:
    """Escape ``${`` in every text of a value, which OmegaConf would take for an interpolation.

    Args:
        value: A text, a list or mapping, or a config; other values are returned unchanged.
    """
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    if isinstance(value, list):
        return [escaped(item) for item in value]
    if isinstance(value, dict):
        return {key: escaped(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return dataclasses.replace(
            value, **{f.name: escaped(getattr(value, f.name)) for f in fields}
        )
    return value
