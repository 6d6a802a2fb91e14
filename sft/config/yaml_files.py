"""Load a YAML file whose aliases do not multiply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

MOST_VALUES = 100_000  # a config has some hundreds
NESTED = "it is nested too deeply, or an alias holds itself"


def loaded(path: Path) -> Any:
    """Load a YAML file as OmegaConf does.

    Raises:
        yaml.YAMLError: It is not YAML, is nested too deeply, or has more than ``MOST_VALUES``
            values once each alias is replaced by what it stands for.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except RecursionError:
        raise yaml.YAMLError(NESTED) from None
    require_small(root)
    return OmegaConf.load(path)


def require_small(root: yaml.Node | None) -> None:
    """Refuse YAML whose aliases multiply.

    Raises:
        yaml.YAMLError: It is nested too deeply, or has more than ``MOST_VALUES`` values once each
            alias is replaced by what it stands for.
    """
    try:
        values = 0 if root is None else _values(root, {})
    except RecursionError:
        raise yaml.YAMLError(NESTED) from None
    if values > MOST_VALUES:
        raise yaml.YAMLError(f"its aliases make more than {MOST_VALUES:,} values")


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a node; an alias is the node itself, which is counted once and added."""
    if id(node) not in known:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = isinstance(node, yaml.MappingNode)
        inner = (part for item in parts for part in (item if pairs else [item]))
        known[id(node)] = 1 + sum(_values(part, known) for part in inner)
    return known[id(node)]
