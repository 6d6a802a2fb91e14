"""Put plain values into a typed config, and collect every problem."""

from __future__ import annotations

import dataclasses
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft.config.names import suggest
from sft.config.rules import default_of, written
from sft.config.saved import escaped
from sft.errors import Problem

UNKNOWN_SETTING = "there is no such setting"
NUMBER = "int | float"  # the type of a setting that keeps whole numbers as they are written
BOOLEANS = {"true", "yes", "on", "false", "no", "off"}  # as YAML 1.1 writes them, in any case


def merge(typed: Any, values: dict[str, Any], schema: Any, prefix: str = "") -> list[Problem]:
    """Merge plain values into the typed config, key by key, and return the problems."""
    problems: list[Problem] = []
    known = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in values.items():
        path = f"{prefix}{key}"
        field = known.get(key)
        if field is None:
            problems.append(
                Problem(
                    written(path, value),
                    UNKNOWN_SETTING,
                    suggest(path, OmegaConf.get_type(typed), value),
                )
            )
            continue
        section = field.default_factory
        if dataclasses.is_dataclass(section):
            if isinstance(value, dict):
                problems += merge(typed, value, section, f"{path}.")
            else:
                problems.append(
                    Problem(
                        written(path, value),
                        f"{path} is a section of settings",
                        f"{path}.NAME=VALUE",
                    )
                )
            continue
        if value is None and "None" not in str(field.type):
            value = _off(field)
        if value == "???":
            problems.append(Problem(f"{path}=???", "a value must be given", f"{path}=VALUE"))
            continue
        if field.type == "bool" and not _is_boolean(value):  # OmegaConf takes any number for one
            problems.append(wrong_type(path, value, field))
            continue
        if str(field.type).startswith(NUMBER) and isinstance(value, str):
            value = _number(value)
        try:
            # The value is resolved already, and OmegaConf must not resolve it again.
            OmegaConf.update(typed, path, escaped(value), merge=False)
            OmegaConf.select(typed, path)  # text with ${ is not checked before it is read
        except OmegaConfBaseException:
            OmegaConf.update(typed, path, default_of(field), merge=False)
            problems.append(wrong_type(path, value, field))
    return problems


def _off(field: dataclasses.Field[Any]) -> Any:
    """Return what null stands for in a setting that is not null itself; None: nothing."""
    default = default_of(field)
    is_off = default is False or default in ([], {})
    return default if is_off else field.metadata["null"]


def _is_boolean(value: Any) -> bool:
    return value.lower() in BOOLEANS if isinstance(value, str) else isinstance(value, bool)


def _number(text: str) -> int | float | str:
    """Return the number that a text writes, as OmegaConf reads it for a setting of one type."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def wrong_type(path: str, value: Any, field: dataclasses.Field[Any]) -> Problem:
    """Return the problem of a value of another type than its setting's."""
    kind = str(field.type).replace(NUMBER, "int or float").replace(" | None", " or null")
    if value == "":
        rule = f"has no value; it must be of type {kind}"
        return Problem(f"{path}=", rule, written(path, default_of(field)))
    if field.type == "bool":
        meant = bool(value) if value in (0, 1) else default_of(field)
        return Problem(
            written(path, value), "must be of type bool: true or false", written(path, meant)
        )
    one_of_many = kind.startswith("list") and not isinstance(value, list | dict | None)
    if not one_of_many or kind.startswith("list[str]") != isinstance(value, str):
        return Problem(
            written(path, value), f"must be of type {kind}", written(path, default_of(field))
        )
    return Problem(written(path, value), f"must be of type {kind}", written(path, f"[{value}]"))
