"""Replaces values of a model's config by those of ``model.config``."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

from sft.config.model_keys import ROPE, SETTING, refused
from sft.config.rules import typed
from sft.config.settings import ModelConfig
from sft.config.upstream import did_you_mean
from sft.errors import ConfigError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def replaced(model: ModelConfig, config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config with the values that are set.

    Raises:
        ConfigError: It has no such entries, or they cannot have such values.
    """
    if not model.config:
        return config
    found = list(refused(model, model.config, f"{SETTING}."))
    values = config.to_dict()
    found += _merge(values, copy.deepcopy(model.config), f"{SETTING}.", config.attribute_map)
    if found:
        raise ConfigError(found)
    try:
        made = type(config).from_dict(values)
    except Exception as error:  # of each config's own rules
        reason = (str(error).strip() or repr(error)).splitlines()
        rule = f"Transformers refuses these values: {' '.join(reason[:2])}"
        raise ConfigError([Problem(f"{SETTING}={model.config}", rule, "correct them")]) from error
    made._name_or_path = config._name_or_path
    return made


def _merge(
    values: dict[str, Any], given: dict[str, Any], prefix: str, names: dict[str, str]
) -> Iterator[Problem]:
    """Write entries into the values of a config, and yield the problems of those that do not fit.

    Args:
        values: The config's values, which are changed.
        given: The entries.
        prefix: The name of the setting that holds them.
        names: Other names of entries, such as GPT-2's ``max_position_embeddings``.
    """
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        yield from _merge_rope(values, rope, given, prefix)
    for key, value in given.items():
        own = names.get(key, key)
        before = values.get(own)
        if key in ROPE and isinstance(rope, dict):
            continue
        if own not in values:
            rule = "is no entry of the model's config"
            known = [*values, *(ROPE if isinstance(rope, dict) else ())]
            yield Problem(f"{prefix}{key}={typed(value)}", rule, did_you_mean(key, known))
        elif isinstance(before, dict) and before and isinstance(value, dict):
            yield from _merge(before, value, f"{prefix}{key}.", {})
        elif kind := _misfit(before, value):
            rule = f"must be {kind}, as {typed(before)} in the model's config is"
            yield Problem(f"{prefix}{key}={typed(value)}", rule, f"{prefix}{key}={typed(before)}")
        else:
            values[own] = value


def _merge_rope(
    values: dict[str, Any], rope: dict[str, Any], given: dict[str, Any], prefix: str
) -> Iterator[Problem]:
    """Write entries of rotary embeddings, under their old names or the new one.

    Transformers holds all of them in ``rope_parameters``; some models have one such mapping for
    each kind of layer.
    """
    from transformers.modeling_rope_utils import RopeParameters

    nested = any(isinstance(value, dict) for value in rope.values())
    legal = {*RopeParameters.__annotations__, "type"}
    for key in [key for key in ROPE if key in given]:
        value, name = given[key], f"{prefix}{key}"
        if nested and key != "rope_parameters":
            rule = "the model has one for each kind of layer"
            fix = f"{prefix}rope_parameters.{next(iter(rope))}={{...}}"
            yield Problem(f"{name}={typed(value)}", rule, fix)
        elif key == "rope_theta":
            if misfit := _misfit(1.0, value):
                fix = f"{name}={rope['rope_theta']}"
                yield Problem(f"{name}={typed(value)}", f"must be {misfit}", fix)
            rope["rope_theta"] = value
        elif not nested:
            yield from _rotary(rope, value, name, legal)
        elif not isinstance(value, dict):
            fix = f"{name}.{next(iter(rope))}={{...}}"
            yield Problem(f"{name}={typed(value)}", "must be a mapping by kind of layer", fix)
        else:
            for layer, entries in value.items():
                if isinstance(rope.get(layer), dict):
                    yield from _rotary(rope[layer], entries, f"{name}.{layer}", legal)
                else:
                    rule = "is no kind of layer that has rotary embeddings"
                    written = f"{name}.{layer}={typed(entries)}"
                    yield Problem(written, rule, did_you_mean(layer, rope))


def _rotary(
    rope: dict[str, Any], value: Any, name: str, legal: Collection[str]
) -> Iterator[Problem]:
    """Write entries of rotary embeddings into those of the model, or of one kind of layer.

    Args:
        rope: The entries, which are changed.
        value: The new ones.
        name: The setting that holds them.
        legal: The names of entries.
    """
    if not isinstance(value, dict):
        fix = f"{name}={{rope_type: linear, factor: 2.0}}"
        yield Problem(f"{name}={typed(value)}", "must be a mapping", f"'{fix}'")
    elif unknown := [entry for entry in value if entry not in legal]:
        for entry in unknown:
            rule = "is no entry of rotary embeddings"
            written = f"{name}.{entry}={typed(value[entry])}"
            yield Problem(written, rule, did_you_mean(entry, legal))
    else:
        # A new kind of scaling must not keep the numbers of the old one.
        kind = value.get("rope_type", value.get("type"))
        kept = dict(rope) if kind in (None, rope.get("rope_type")) else {}
        theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        rope.clear()
        rope |= {**theta, **kept, **value}
        if kind is not None:
            rope["rope_type"] = kind
            rope.pop("type", None)


def _misfit(before: Any, value: Any) -> str:
    """Return what a value must be, if it is of another kind than the one it replaces; else ""."""
    kinds: dict[type, tuple[str, tuple[type, ...]]] = {
        bool: ("true or false", (bool,)),
        int: ("a whole number", (int,)),
        float: ("a number", (int, float)),
        str: ("a text", (str,)),
        list: ("a list", (list,)),
        dict: ("a mapping", (dict,)),
    }
    if type(before) not in kinds:  # None may stand for anything
        return ""
    said, legal = kinds[type(before)]
    fits = isinstance(value, legal) and (type(before) is bool or not isinstance(value, bool))
    return "" if fits else said


def written_into(
    settings: dict[str, Any],
    given: dict[str, Any],
    config: dict[str, Any],
    names: dict[str, str] | None = None,
) -> None:
    """Write the entries into the contents of the model's config.json, which may hold more of them.

    Args:
        settings: The contents, which are changed.
        given: ``model.config``.
        config: The values of the config that ``replaced`` returned.
        names: Other names of entries.
    """
    for key, value in given.items():
        if key in ROPE and "rope_parameters" in config:
            for name in ROPE:
                settings.pop(name, None)
            settings["rope_parameters"] = config["rope_parameters"]
        elif isinstance(value, dict) and isinstance(settings.get(key), dict):
            written_into(settings[key], value, config[key])
        else:
            settings[(names or {}).get(key, key)] = value


def require_same_shapes(
    model: ModelConfig, plain: PreTrainedModel, changed: PreTrainedModel
) -> None:
    """Require that the files' weights fit the model.

    Args:
        model: The model's settings.
        plain: The model without the values that are set, on the meta device.
        changed: The model with them.

    Raises:
        ConfigError: A weight has another name or shape.
    """
    before, after = (
        {name: tuple(weight.shape) for name, weight in one.state_dict().items()}
        for one in (plain, changed)
    )
    if different := sorted(before.items() ^ after.items()):
        name = different[0][0]
        shapes = f"{before.get(name)} in the files, {after.get(name)} now"
        rule = f"changes the shape of {name}: {shapes}"
        fix = "leave it out, or model.pretrained=false lora=none"
        raise ConfigError([Problem(f"{SETTING}={model.config}", rule, fix)])
