"""Write a config as YAML, and read it back with the same values."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sft.config.yaml_files import loaded


def to_yaml(config: Any) -> str:
    """Return a config's settings as YAML; ``sft train FILE`` and ``settings_of`` read it."""
    return OmegaConf.to_yaml(OmegaConf.structured(escaped(config)))


def settings_of(path: Path) -> Any:
    """Read the settings in a run's ``config.yaml``, as ``dataclasses.asdict`` returns them.

    Raises:
        ValueError: A text holds ``${`` that is not escaped. A run writes none, and resolving it
            could show a secret of the environment.
    """
    return _plain(OmegaConf.to_container(loaded(path), resolve=False))


def _plain(value: Any) -> Any:
    """Undo ``escaped``."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", _unescaped, value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _unescaped(found: re.Match[str]) -> str:
    if len(found[1]) % 2 == 0:
        raise ValueError("an interpolation is not part of saved settings")
    return found[1][: len(found[1]) // 2] + "${"


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
