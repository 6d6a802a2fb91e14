"""Compare two runs by the settings that change what is trained."""

from __future__ import annotations

from typing import Any

from sft.config.rules import named
from sft.config.settings import Config

# Values of resume.allow besides names of settings.
CONTENTS = ("base", "data", "adapter")


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a nested mapping by dotted key."""
    if not isinstance(node, dict) or not node:
        return {prefix.rstrip("."): node}
    leaves: dict[str, Any] = {}
    for key, value in node.items():
        leaves |= flatten(value, f"{prefix}{key}.")
    return leaves


def training_settings(settings: Any) -> dict[str, Any]:
    """Select the settings that the trained weights depend on, by dotted key."""
    may_differ = named(Config, changes_training=False)

    def decides(key: str) -> bool:
        return not any(key == name or key.startswith(f"{name}.") for name in may_differ)

    return {key: value for key, value in flatten(settings).items() if decides(key)}


def differences(before: Any, now: Any) -> dict[str, str]:
    """Return the settings that differ and change what is trained, with a line for each."""
    old, new = training_settings(before), training_settings(now)
    return {
        key: f"{key}: {old.get(key, 'unset')} there, {new.get(key, 'unset')} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    }
