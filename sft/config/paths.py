"""Where the files that belong to sft are, and the paths that settings name."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sft.config.rules import fields_of

PACKAGE_DIR = Path(__file__).resolve().parents[1]
# A wheel has conf/, ds_config/ and assets/ inside the package; a clone has them next to it.
HOME_DIR = PACKAGE_DIR if (PACKAGE_DIR / "conf").is_dir() else PACKAGE_DIR.parent
CONF_DIR = HOME_DIR / "conf"
DS_CONFIG_DIR = HOME_DIR / "ds_config"

OmegaConf.register_new_resolver("assets", lambda path: str(HOME_DIR / "assets" / path))


def expand_paths(node: Any) -> None:
    """Replace ``~`` at the beginning of local paths by the home folder; not every shell does."""
    for name, item, value in fields_of(node):
        if dataclasses.is_dataclass(value):
            expand_paths(value)
        elif isinstance(value, str) and item.metadata["path"] and value.startswith("~"):
            setattr(node, name, os.path.expanduser(value))
