"""YAML groups and overrides become a typed config; everything that does not fit is collected.

Hydra composes; the dataclasses in ``sft.config`` say what is legal. Hydra alone stops at the first
unknown key, and lets ``+lora.drop_out=0.3`` pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sft.config import CONF_DIR
from sft.errors import ConfigError, Problem
from sft.names import suggest
from sft.overrides import forced, groups, is_sweep
from sft.rules import default_of, written

C = TypeVar("C")
UNKNOWN_SETTING = "there is no such setting"


def typed_config(
    schema: type[C], name: str, overrides: list[str], config_dir: str | None
) -> tuple[C, list[Problem]]:
    """Compose one config.

    Args:
        schema: The dataclass of all settings.
        name: The primary YAML in conf/.
        overrides: As on the command line.
        config_dir: A folder with the user's own groups.

    Returns:
        The config, with the default wherever a value did not fit, and what did not fit.

    Raises:
        ConfigError: The YAML files themselves cannot be composed.
    """
    problems: list[Problem] = []
    accepted = list(forced(overrides, config_dir, problems))
    composed, grid = _compose(schema, name, accepted, config_dir, problems)
    problems += _grid_problems(grid, overrides)
    typed = OmegaConf.structured(schema)
    problems += _merge(typed, composed, schema)
    config: Any = OmegaConf.to_object(typed)
    return config, problems


def plain_config(schema: type[C], overrides: list[str]) -> tuple[C, list[Problem]]:
    """Make the config of a command without groups: each value is taken as it is typed.

    Hydra's grammar would refuse most prompts that a person writes, for a comma or a question mark.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(schema)}  # type: ignore[arg-type]
    problems: list[Problem] = []
    values: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or key in values:
            rule = "is given twice" if equals else "is no setting"
            problems.append(Problem(text, rule, "write each setting once, as key=value"))
            continue
        is_text = kinds.get(key, "str").startswith("str")
        typed_text = None if value == "null" else value.replace("${", r"\${")
        values[key] = typed_text if is_text else yaml.safe_load(value)
    typed = OmegaConf.structured(schema)
    problems += _merge(typed, values, schema)
    config: Any = OmegaConf.to_object(typed)
    return config, problems


def sweep_overrides(
    schema: type[C], name: str, overrides: list[str], config_dir: str | None
) -> list[str]:
    """Make the overrides of a sweep such as Hydra's sweeper accepts and expands.

    A trial checks its own config, so that a refused trial stops no other. Only what no trial can
    have right is refused here: unknown keys and unknown group options.

    Raises:
        ConfigError: With every such problem.
    """
    problems: list[Problem] = []
    accepted = list(forced(overrides, config_dir, problems, sweep=True))
    fixed = [item for item in accepted if not is_sweep(item)]
    swept = [f"{item.split('=', 1)[0]}=null" for item in accepted if is_sweep(item)]
    options = groups(config_dir)
    plain = fixed + [item for item in swept if item.split("=")[0].lstrip("+") not in options]
    composed, grid = _compose(schema, name, plain, config_dir, problems)
    problems += [
        problem
        for problem in _merge(OmegaConf.structured(schema), composed, schema)
        if problem.rule == UNKNOWN_SETTING
    ]
    if problems:
        raise ConfigError(problems)
    # Hydra lets the command line replace a grid's values only where both write the key alike.
    spelled = {str(key).lstrip("+"): str(key) for key in grid}
    return [
        f"{spelled[key]}={item.partition('=')[2]}"
        if (key := item.partition("=")[0].lstrip("+")) in spelled
        else item
        for item in accepted
    ]


def register_schema(schema: Any, name: str) -> None:
    """Give Hydra the defaults, untyped: types are checked later, all at once."""
    from hydra.core.config_store import ConfigStore

    node = dataclasses.asdict(schema())
    ConfigStore.instance().store(name=f"{name}_defaults", node=node)


def _compose(
    schema: Any,
    name: str,
    overrides: list[str],
    config_dir: str | None,
    problems: list[Problem],
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compose the groups and overrides, unchecked, and list what the config itself sweeps over."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    register_schema(schema, name)
    if config_dir is not None:
        overrides = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']", *overrides]
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = compose(name, overrides, return_hydra_config=True)
        grid = OmegaConf.select(composed, "hydra.sweeper.params") or {}
        with open_dict(composed):
            del composed["hydra"]
        container = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        rule = ": ".join(_reasons(error))
        problems.append(Problem("the composed config", rule, "mend the YAML file or override"))
        raise ConfigError(problems) from error
    assert isinstance(container, dict)
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        below = OmegaConf.select(composed, key) if value == "{}" else None
        if below:
            problems.append(
                Problem(
                    f"{key}={{}}",
                    f"is merged over {below}, and empties nothing",
                    f"choose another option of the group {key.split('.')[0]}",
                )
            )
    return {str(key): value for key, value in container.items()}, dict(grid)


def _reasons(error: BaseException) -> Iterator[str]:
    """Give the first line of an error and of its cause."""
    for item in (error, error.__cause__):
        if item is not None and str(item):
            yield str(item).splitlines()[0]


def _grid_problems(grid: dict[str, str], overrides: list[str]) -> Iterator[Problem]:
    """Refuse one run of a config that is a sweep, unless what it sweeps over is given."""
    given = {override.lstrip("+").partition("=")[0] for override in overrides}
    for key, values in grid.items():
        if key not in given:
            one = str(values).partition(",")[0]
            yield Problem(f"{key}={values}", "this config is a sweep", f"add -m, or {key}={one}")


def _merge(typed: Any, values: dict[str, Any], schema: Any, prefix: str = "") -> list[Problem]:
    """Merge plain values into the typed tree, key by key, collecting what does not fit."""
    problems: list[Problem] = []
    known = {field.name: field for field in dataclasses.fields(schema)}
    for key, value in values.items():
        path = f"{prefix}{key}"
        field = known.get(key)
        if field is None:
            problems.append(
                Problem(
                    written(path, value), UNKNOWN_SETTING, suggest(path, OmegaConf.get_type(typed))
                )
            )
            continue
        section = field.default_factory
        if dataclasses.is_dataclass(section):
            if isinstance(value, dict):
                problems += _merge(typed, value, section, f"{path}.")
            else:
                problems.append(
                    Problem(written(path, value), f"{path} is a group", f"{path}.NAME=VALUE")
                )
            continue
        if value == "???":
            problems.append(Problem(f"{path}=???", "must be given", f"{path}=VALUE"))
            continue
        try:
            OmegaConf.update(typed, path, value, merge=False)
        except OmegaConfBaseException:
            kind = str(field.type).replace(" | None", " or null")
            one_of_many = kind.startswith("list") and isinstance(value, str)
            meant = f"[{value}]" if one_of_many else default_of(field)
            problems.append(
                Problem(written(path, value), f"must be of type {kind}", written(path, meant))
            )
    return problems
