"""Read a YAML file of settings (``sft train my.yaml``) with the line number of each setting."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft.config.paths import CONF_DIR
from sft.config.yaml_files import loaded
from sft.errors import ConfigError, Problem

Entry = tuple[str, Any, str]  # dotted key, value, FILE:LINE
ENDINGS = (".yaml", ".yml")
FOREIGN = 6  # so many unknown keys, and most of all keys, make a file another tool's


def is_one(word: str) -> bool:
    """Check whether a word is the path of a settings file and not a setting."""
    if not word.endswith(ENDINGS) or re.match("-|~(?!/)", word):
        return False
    # The folder of a sweep's trial has a name such as lora.r=4. pathlib raises an error for a name
    # that is too long, such as a prompt; os.path returns False.
    return "=" not in word or os.path.isfile(word)


def field_of(schema: Any, key: str) -> dataclasses.Field[Any] | type | None:
    """Find the section or setting of a dotted key.

    Returns:
        The dataclass of a section; the field of a setting, also for a key inside a setting that is
        a mapping (``train.extra.adam_beta2``); None if there is no such setting.
    """
    node: Any = schema
    for name in key.split("."):
        if not dataclasses.is_dataclass(node):
            return node if isinstance(node, dataclasses.Field) and _is_mapping(node) else None
        fields = {field.name: field for field in dataclasses.fields(node)}
        if name not in fields:
            return None
        section = fields[name].default_factory
        node = section if dataclasses.is_dataclass(section) else fields[name]
    result: dataclasses.Field[Any] | type = node
    return result


def holds_text(field: dataclasses.Field[Any], key: str) -> bool:
    """Check whether a key's value is text: a text setting, or an entry of a mapping to texts."""
    kind = str(field.type)
    inside = key.rpartition(".")[2] != field.name
    return kind == "dict[str, str]" if inside else kind in ("str", "str | None")


def _is_mapping(field: dataclasses.Field[Any]) -> bool:
    return str(field.type).startswith("dict")


def entries(path: str, schema: Any, groups: set[str], problems: list[Problem]) -> Iterator[Entry]:
    """Yield the file's options and settings.

    ``model: opt-125m`` chooses an option; ``lora: {r: 8}`` and ``lora.r: 8`` are settings.

    Raises:
        ConfigError: The file is missing, is not a YAML mapping, or is an option of a group.
    """
    root, values = _loaded(path)
    unknown = [key for key in map(str, values) if key not in groups and not field_of(schema, key)]
    if len(unknown) >= FOREIGN and 2 * len(unknown) > len(values):
        rule = f"{len(unknown)} of its {len(values)} keys are no settings of sft"
        fix = f"sft import {path}, if Axolotl, LLaMA-Factory or TRL takes this file"
        raise ConfigError([Problem(path, rule, fix)])
    seen: dict[str, str] = {}

    def walk(node: yaml.MappingNode, values: dict[Any, Any], prefix: str) -> Iterator[Entry]:
        lines = {key.value: key.start_mark.line + 1 for key, _ in node.value}
        nodes = {key.value: value for key, value in node.value}
        for name, value in values.items():
            key = f"{prefix}{name}"
            place = f"{path}:{lines.get(str(name), node.start_mark.line + 1)}"
            section = isinstance(field_of(schema, key), type)
            if section and isinstance(value, dict):
                inner = nodes.get(str(name))
                yield from walk(
                    inner if isinstance(inner, yaml.MappingNode) else node, value, f"{key}."
                )
            elif key in seen:
                rule = f"{key} is given in {seen[key]} already"
                problems.append(Problem(f"{place}: {key}", rule, "keep one of them"))
            elif key == "defaults" or key == "hydra" or key.startswith(("hydra.", "hydra/")):
                fix = "model: tiny" if key == "defaults" else "write it on the command line"
                rule = "is a key of Hydra; a settings file has options and settings only"
                problems.append(Problem(f"{place}: {key}", rule, fix))
            else:
                seen[key] = place
                yield key, _as_written(schema, key, value, nodes.get(str(name))), place

    yield from walk(root, values, "")


def _as_written(schema: Any, key: str, value: Any, node: yaml.Node | None) -> Any:
    """Return a text setting as it is written in the file: YAML would read 010 as the number 8."""
    field = field_of(schema, key)
    is_text = isinstance(field, dataclasses.Field) and holds_text(field, key)
    if is_text and isinstance(node, yaml.ScalarNode) and not isinstance(value, str | None):
        return node.value
    return value


def _loaded(path: str) -> tuple[yaml.MappingNode, dict[Any, Any]]:
    """Read the file as YAML nodes, which have line numbers, and as values."""
    file = Path(path).expanduser()
    if not file.is_file():
        fix = f"give a path that exists, from {Path.cwd()}"
        raise ConfigError([Problem(path, "there is no such settings file", fix)])
    if file.resolve().parent.parent == CONF_DIR.resolve():
        group, name = file.resolve().parent.name, file.stem
        rule = f"is an option of the group {group}, not a settings file"
        raise ConfigError([Problem(path, rule, f"{group}={name}")])
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        if not isinstance(root, yaml.MappingNode):
            rule = "has no settings: it must be a mapping, such as model: opt-125m"
            raise ConfigError([Problem(path, rule, "write one setting per line, as key: value")])
        values: Any = OmegaConf.to_container(loaded(file), resolve=False)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(
            [Problem(place, f"is not valid YAML: {error.problem}", "correct this line")]
        ) from error
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            [Problem(path, f"cannot be read: {reason}", "correct the file")]
        ) from error
    return root, values


def set_by_option(group: str, option: str, config_dir: str | None) -> set[str]:
    """Return the dotted keys of the settings in an option's YAML file."""
    for root in (CONF_DIR, *([Path(config_dir)] if config_dir else [])):
        file = root / group / f"{option}.yaml"
        if file.is_file():
            values: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
            is_global = "@package _global_" in file.read_text(encoding="utf-8")
            return set(_leaves(values, "" if is_global else f"{group}."))
    return set()


def _leaves(values: dict[Any, Any], prefix: str) -> Iterator[str]:
    for key, value in values.items():
        if key != "defaults" or prefix:
            yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
