"""Read plain JSON from a file, and into a dataclass of settings: types and rules are checked.

Nothing runs. Unlike a config, such a file comes with an adapter, a model or a run, maybe from a
stranger: it is no YAML, and OmegaConf, which would resolve ``${oc.env:NAME}``, does not read it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from sft.config.rules import rule_problems

T = TypeVar("T")
LARGEST_JSON = 1 << 26  # bytes; a run.json, card or manifest has a few thousand


def read_json(path: Path, finite: bool = True) -> Any:
    """Read a JSON file that may come from anywhere.

    Args:
        path: The file.
        finite: Refuse NaN and infinity, which are no JSON but which Python writes.

    Raises:
        ValueError: It cannot be read, is larger than ``LARGEST_JSON``, or is no JSON; the message
            gives the reason.
    """
    return parse_json(_text(path), finite)


def read_lines(path: Path, errors: str = "strict") -> list[str]:
    """Read a file of JSON lines that may come from anywhere.

    Args:
        path: The file.
        errors: What is done about bytes that are no UTF-8, as of ``open``.

    Raises:
        ValueError: It cannot be read, or is larger than ``LARGEST_JSON``.
    """
    return _text(path, errors).splitlines()


def _text(path: Path, errors: str = "strict") -> str:
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(f"it has {path.stat().st_size:,} bytes, more than {LARGEST_JSON:,}")
        return path.read_text(encoding="utf-8", errors=errors)
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error


def parse_json(text: str, finite: bool = True) -> Any:
    """Parse JSON that may come from anywhere.

    Raises:
        ValueError: It is no JSON, or is nested too deeply.
    """
    try:
        return json.loads(text, parse_constant=_not_finite if finite else None)
    except RecursionError as error:
        raise ValueError("its lists and mappings are nested too deeply") from error


def _not_finite(name: str) -> None:
    raise ValueError(f"it holds {name}, which is no number")


def from_json(schema: type[T], values: Any, prefix: str = "") -> T:
    """Make an instance of a dataclass; entries that are absent have their defaults.

    Args:
        schema: The dataclass; its fields are plain values, lists, mappings or dataclasses.
        values: What JSON was read to.
        prefix: The name of the entry that holds the values, with a dot, for messages.

    Raises:
        ValueError: An entry is unknown, missing or of another type, or breaks its rule.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{prefix[:-1] or 'it'} must be a mapping")
    hints, given = get_type_hints(schema), {}
    fields: Any = schema
    known = {field.name: field for field in dataclasses.fields(fields)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"there is no entry {prefix}{name}")
        kind = hints[name]
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            given[name] = from_json(kind, value, f"{prefix}{name}.")
        elif is_of(value, kind):
            given[name] = value
        else:
            raise ValueError(f"{prefix}{name} must be of type {known[name].type}")
    for name, field in known.items():
        defaults = (field.default, field.default_factory)
        if name not in given and defaults == (dataclasses.MISSING, dataclasses.MISSING):
            raise ValueError(f"the entry {prefix}{name} is missing")
    made = schema(**given)
    if problem := next(rule_problems(made), None) if not prefix else None:
        raise ValueError(f"{problem.setting} {problem.rule}")
    return made


def is_of(value: Any, kind: Any) -> bool:
    """Check the type of a JSON value: a whole number is a float too, but true is no number."""
    if kind is Any:
        return True
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (bool, str, type(None)) or kind is int:
        return type(value) is kind
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is list:
        return isinstance(value, list) and all(is_of(item, arguments[0]) for item in value)
    if origin is dict:
        items = value.items() if isinstance(value, dict) else [(None, None)]
        return all(is_of(key, arguments[0]) and is_of(item, arguments[1]) for key, item in items)
    return any(is_of(value, one) for one in arguments)  # a union, such as str | None
