"""Where the files that belong to sft are: the config groups, DeepSpeed's JSON, the assets."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf

PACKAGE_DIR = Path(__file__).resolve().parents[1]
# A wheel has conf/, ds_config/ and assets/ inside the package; a clone has them next to it.
HOME_DIR = PACKAGE_DIR if (PACKAGE_DIR / "conf").is_dir() else PACKAGE_DIR.parent
CONF_DIR = HOME_DIR / "conf"
DS_CONFIG_DIR = HOME_DIR / "ds_config"

OmegaConf.register_new_resolver("assets", lambda path: str(HOME_DIR / "assets" / path))
