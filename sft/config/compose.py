"""Compose YAML groups and overrides into a typed config, and collect every problem.

Hydra composes; the dataclasses in ``settings`` declare what is legal. Hydra alone stops at the
first unknown key, and accepts ``+lora.drop_out=0.3``.
"""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf, open_dict
from omegaconf.errors import (
    GrammarParseError,
    InterpolationResolutionError,
    OmegaConfBaseException,
)

from sft.config.grammar import number_of, parse
from sft.config.groups import groups, missing_plugin, plugin_problems
from sft.config.names import suggest
from sft.config.no_effect import value_of
from sft.config.overrides import Override
from sft.config.paths import CONF_DIR
from sft.config.rules import Dataclass, written
from sft.config.settings_file import field_of, holds_text
from sft.config.typed import UNKNOWN_SETTING, merge, wrong_type
from sft.errors import ConfigError, Problem

C = TypeVar("C", bound=Dataclass)
# Settings that run code, which are therefore taken from the command line only: what they run, and
# what to do before one is given.
CONSENT = {
    "model.trust_remote_code": ("the model's Python code", "read that code"),
    "on_alert": ("a command on this machine", "read that command"),
}
MOST_TRIALS = 10_000
CORRECT = "correct the YAML file or the command line"
LITERAL = r"name a setting, as in ${seed}, or write \${...} for text"


def typed_config(
    schema: type[C], name: str, given: list[Override], config_dir: str | None
) -> tuple[C, list[Problem]]:
    """Compose one config.

    Args:
        schema: The dataclass of all settings.
        name: The primary YAML in conf/.
        given: The overrides of the command line and of a settings file.
        config_dir: A folder with the user's own groups.

    Returns:
        The config and the problems. A setting whose value cannot be used has its default.

    Raises:
        ConfigError: The YAML files themselves cannot be composed.
    """
    composed, grid, problems = _compose(schema, name, given, config_dir)
    problems += _grid_problems(grid, {item.key for item in given})
    typed = OmegaConf.structured(schema)
    problems += merge(typed, composed, schema)
    config: Any = OmegaConf.to_object(typed)
    problems += _consent_problems(config, given, grid)
    return config, problems


def _consent_problems(
    config: Any, given: list[Override], grid: dict[str, str]
) -> Iterator[Problem]:
    """Refuse a setting that runs code and that a file gives: it may be a stranger's file.

    Args:
        config: The typed config.
        given: The overrides of the command line and of a settings file.
        grid: The values that the config itself sweeps over.
    """
    asked = {item.key for item in given if not item.source}
    swept = {key.lstrip("+"): values for key, values in grid.items()}
    for key, (what, first) in CONSENT.items():
        value = swept.get(key) or value_of(config, key)
        if value and key not in asked:
            rule = f"is taken from the command line only, because it runs {what}"
            shown = written(key, value)
            yield Problem(shown, rule, f"{first}, then add {shlex.quote(shown)}")


def plain_config(schema: type[C], given: list[Override]) -> tuple[C, list[Problem]]:
    """Make the config of a command without groups.

    Text does not go through OmegaConf, which would interpolate ``${...}`` in a prompt.
    """
    fields = {field.name: field for field in dataclasses.fields(schema)}
    texts = {
        item.key: item.value
        for item in given
        if isinstance(item.value, str)
        and item.key in fields
        and holds_text(fields[item.key], item.key)
    }
    typed = OmegaConf.structured(schema)
    others = {item.key: item.value for item in given if item.key not in texts}
    problems = merge(typed, others, schema)
    config: Any = OmegaConf.to_object(typed)
    for key, text in texts.items():
        setattr(config, key, text)
    return config, problems


def sweep_overrides(
    schema: type[C], name: str, given: list[Override], config_dir: str | None
) -> list[str]:
    """Return the overrides of a sweep in the form that Hydra's sweeper accepts and expands.

    Only unknown keys, unknown group options and problems of values that are not swept are found
    here; ``sft.sweep.beforehand`` checks each trial's config after Hydra has composed it.

    Raises:
        ConfigError: With every such problem.
    """
    fixed = [item for item in given if item.kind != "sweep"]
    options = groups(config_dir)
    swept = [
        Override(item.key, None)
        for item in given
        if item.kind == "sweep" and item.key not in options
    ]
    composed, grid, problems = _compose(schema, name, fixed + swept, config_dir)
    alike = {item.key for item in fixed}  # in every trial
    typed = OmegaConf.structured(schema)
    problems += [
        problem
        for problem in merge(typed, composed, schema)
        if problem.rule == UNKNOWN_SETTING or problem.setting.partition("=")[0] in alike
    ]
    problems += _consent_problems(OmegaConf.to_object(typed), given, grid)
    values = {str(key).lstrip("+"): f"{key}={values}" for key, values in grid.items()}
    values |= {item.key: item.hydra() for item in given if item.kind == "sweep"}
    problems += _number_problems(values)
    if problems:
        raise ConfigError(problems)
    # The command line replaces a grid's values only if it spells the key, with its plus signs, as
    # the grid does.
    spelled = {str(key).lstrip("+"): str(key) for key in grid}
    return [
        f"{spelled[item.key]}={item.hydra().partition('=')[2]}"
        if item.key in spelled
        else item.hydra()
        for item in given
    ]


def _number_problems(swept: dict[str, str]) -> Iterator[Problem]:
    """Refuse values that cannot be listed, and a sweep of more trials than ``MOST_TRIALS``."""
    trials = 1.0
    for key, text in swept.items():
        parsed = parse(text)
        count = None if parsed is None else number_of(parsed)
        if count is None:
            yield Problem(text.lstrip("+"), "does not list the values to try", f"{key}=ONE,OTHER")
        trials *= count or 1
    if trials > MOST_TRIALS:
        rule = f"the sweep would have {trials:,.0f} trials; it may have {MOST_TRIALS:,}"
        yield Problem(" ".join(swept.values()).replace("++", ""), rule, "sweep over fewer values")


def register_schema(schema: Any, name: str) -> None:
    """Register the defaults with Hydra, untyped: ``typed.merge`` checks all types later."""
    from hydra.core.config_store import ConfigStore

    node = dataclasses.asdict(schema())
    ConfigStore.instance().store(name=f"{name}_defaults", node=node)


def _compose(
    schema: Any, name: str, given: list[Override], config_dir: str | None
) -> tuple[dict[str, Any], dict[str, str], list[Problem]]:
    """Compose the groups and settings, unchecked, and return the config's own sweep parameters.

    Hydra composes the groups. Settings are put into the result as values, so that no value has to
    be written in Hydra's grammar.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    register_schema(schema, name)
    overrides = [item.hydra() for item in given if item.kind in ("option", "hydra")]
    if config_dir is not None:
        overrides = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']", *overrides]
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = compose(name, overrides, return_hydra_config=True)
        grid = OmegaConf.select(composed, "hydra.sweeper.params") or {}
        problems = list(plugin_problems(composed.hydra))
        with open_dict(composed):
            del composed["hydra"]
        problems += _set(composed, [item for item in given if item.kind == "setting"], schema)
        container = OmegaConf.to_container(composed, resolve=True)
    # OmegaConf raises the last two for an entry that is added to a mapping that is None.
    except (HydraException, OmegaConfBaseException, AttributeError, AssertionError) as error:
        rule = ": ".join(reasons(error))
        if plugin := missing_plugin(rule):
            raise ConfigError([plugin]) from error
        setting = str(getattr(error, "full_key", None) or "the composed config")
        is_name = isinstance(error, InterpolationResolutionError)
        raise ConfigError([Problem(setting, rule, LITERAL if is_name else CORRECT)]) from error
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}, dict(grid), problems


def _set(composed: Any, given: list[Override], schema: Any) -> Iterator[Problem]:
    """Put settings into the composed config, and yield a problem for each that cannot be set."""
    for item in given:
        below = OmegaConf.select(composed, item.key) if item.value == {} else None
        if below:
            yield Problem(
                f"{item.key}={{}}",
                f"is merged with {below} and does not remove any of it",
                f"choose a different option of the group {item.key.split('.')[0]}",
            )
        try:
            OmegaConf.update(composed, item.key, item.value, merge=True, force_add=True)
        except GrammarParseError as error:
            yield Problem(written(item.key, item.value), str(error).splitlines()[0], LITERAL)
        except (OmegaConfBaseException, ValueError, TypeError, AssertionError) as error:
            field = field_of(schema, item.key)
            yield (
                wrong_type(item.key, item.value, field)
                if isinstance(field, dataclasses.Field)
                else Problem(
                    written(item.key, item.value),
                    str(error).splitlines()[0],
                    suggest(item.key, schema, item.value),
                )
            )


def reasons(error: BaseException) -> Iterator[str]:
    """Yield the first line of an error and of its cause."""
    for item in (error, error.__cause__):
        if item is not None and str(item):
            yield str(item).splitlines()[0]


def _grid_problems(grid: dict[str, str], given: set[str]) -> Iterator[Problem]:
    """Refuse a single run of a config that defines a sweep, unless the swept settings are given."""
    for key, values in grid.items():
        if key not in given:
            one = str(values).partition(",")[0]
            yield Problem(
                f"{key}={values}", "this config defines a sweep", f"add -m, or {key}={one}"
            )
