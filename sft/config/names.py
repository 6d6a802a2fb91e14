"""Answer an unknown setting: a name of another tool, a field upstream, or a mistyped name."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft.config import (
    foreign_axolotl,
    foreign_llamafactory,
    foreign_others,
    foreign_trl,
    upstream,
    verdicts,
)
from sft.config.foreign import DEFAULT, DIFFERS, NOT_OURS, Key, Outcome
from sft.config.foreign_common import LORA
from sft.config.grammar import is_list, parse, shell_word
from sft.config.rules import declared
from sft.config.saved import escaped
from sft.config.settings import Config
from sft.config.settings_file import field_of, holds_text
from sft.errors import Problem

GROUPS = ("dataset", "lora", "model", "quantization", "sample", "template", "train", "zero")
CLOSE = 0.75  # similarity from which a mistyped name is taken for a setting; 1: the same text


TABLES: dict[str, dict[str, Key]] = {
    "axolotl": foreign_axolotl.KEYS,
    "llamafactory": foreign_llamafactory.KEYS,
    "trl": foreign_trl.KEYS,
    "peft": LORA,
    "unsloth": foreign_trl.UNSLOTH,
    "ms-swift": foreign_others.SWIFT,
    "torchtune": foreign_others.TORCHTUNE,
    "others": foreign_others.SHORT,
}


def _decided(section: str) -> frozenset[str]:
    """Return the upstream fields of a section that settings declare as ``decides``."""
    names = (name for _, item in declared(Config) for name in item.metadata["decides"])
    return frozenset(name.removeprefix(section) for name in names if name.startswith(section))


# Fields of upstream classes that ``extra`` refuses.
TRAIN_OWNED = _decided("train.") | verdicts.TRAIN_OWNED
LORA_OWNED = _decided("lora.") | verdicts.LORA_OWNED

# Of each section with ``extra``: fields that it refuses because sft sets them, or because they have
# no effect, and all fields.
SECTIONS: dict[str, tuple[frozenset[str], dict[str, str], Callable[[], frozenset[str]]]] = {
    "train": (TRAIN_OWNED, verdicts.TRAIN_REFUSED, upstream.sft_config_names),
    "lora": (LORA_OWNED, verdicts.LORA_REFUSED, upstream.lora_config_names),
    "quantization": (frozenset(), {}, upstream.bnb_config_names),
}


def extra_problems(config: Config) -> Iterator[Problem]:
    """Check the sections' ``extra``: refuse unknown names and names that our settings decide."""
    for name, (owned, refused, legal) in SECTIONS.items():
        section = getattr(config, name)
        own_fields = set(section.__dataclass_fields__)
        for key, value in section.extra.items():
            given = f"{name}.extra.{key}={value}"
            if key in own_fields:
                yield Problem(given, "has a setting of its own", f"{name}.{key}={value}")
            elif key in owned:
                fix = foreign_hint(f"{name}.{key}", Config, value) or "remove it"
                yield Problem(given, "is set by sft itself", fix)
            elif key in refused:
                yield Problem(given, f"has no effect: {refused[key]}", "remove it")
            elif key not in legal():
                hint = foreign_hint(f"{name}.{key}", Config, value)
                hint = hint or upstream.did_you_mean(key, legal() - owned - refused.keys())
                yield Problem(given, f"the installed version has no setting {key}", hint)


@functools.cache
def _structured(schema: Any) -> Any:
    """Return a typed config on which values are tried; what it holds does not matter."""
    return OmegaConf.structured(schema)


def _takes(schema: Any, key: str, value: Any) -> bool:
    """Check that a schema has a setting, or a group, and that the value is of its type."""
    if issubclass(schema, Config) and key in GROUPS:
        return True
    field = field_of(schema, key)
    if not isinstance(field, dataclasses.Field):
        return False
    typed = _structured(schema)
    try:
        OmegaConf.update(typed, key, escaped(value), force_add=True)
        held = OmegaConf.select(typed, key)
        rule = field.metadata["rule"]
        inside = key.rpartition(".")[2] != field.name
        return inside or rule is None or value is None or rule.holds(held)
    except (OmegaConfBaseException, AssertionError, ArithmeticError, TypeError, AttributeError):
        _structured.cache_clear()  # the value may stay in it
        return False


def _word(schema: Any, key: str, value: Any) -> str:
    """Return a setting or an option as it is typed in a shell."""
    field = field_of(schema, key)
    return shell_word(key, value, isinstance(field, dataclasses.Field) and holds_text(field, key))


def found(path: str, value: Any) -> dict[str, Outcome]:
    """Look a name of other tools up.

    Args:
        path: The name as it was given, with the section, if any.
        value: Its value.

    Returns:
        What becomes of it, by the tools that have the name.
    """
    if path in foreign_others.NESTED:
        return {"others": foreign_others.NESTED[path].of(value)}
    leaf = path.rpartition(".")[2].replace("-", "_")
    return {tool: keys[leaf].of(value) for tool, keys in TABLES.items() if leaf in keys}


def foreign_hint(path: str, schema: Any, value: Any) -> str:
    """Answer a name of other tools by our setting with the value; "": no tool has the name."""
    by_tool = found(path, value)
    meant: dict[str, list[str]] = {}  # the tools by our words
    for tool, item in by_tool.items():
        if item.settings and all(_takes(schema, *pair) for pair in item.settings.items()):
            words = " ".join(_word(schema, *pair) for pair in item.settings.items())
            meant.setdefault(words, []).append(tool)
    if len(meant) == 1:
        note = next((item.note for item in by_tool.values() if item.settings and item.note), "")
        return next(iter(meant)) + (f" ({note})" if note else "")
    if meant:
        return ", or ".join(f"{words} (as in {tools[0]})" for words, tools in meant.items())
    if not issubclass(schema, Config):
        return ""
    refused = sorted({key for item in by_tool.values() for key in item.settings})
    if refused:
        return f"did you mean {' or '.join(refused)}?"
    for kind, start in ((DIFFERS, ""), (NOT_OURS, "remove it: "), (DEFAULT, "remove it: ")):
        for item in by_tool.values():
            if item.kind == kind:
                return start + item.note
    return ""


def suggest(path: str, schema: Any, value: Any = None) -> str:
    """Suggest the setting that was probably meant, in any section.

    Args:
        path: The unknown setting.
        schema: The settings of the command.
        value: The value that it was given; the suggestion keeps it.
    """
    section, _, leaf = path.rpartition(".")
    owned, refused, legal = SECTIONS.get(section, (frozenset(), {}, frozenset))
    if leaf in legal() - owned - refused.keys():
        return _word(schema, f"{section}.extra.{leaf}", value)
    if hint := foreign_hint(path, schema, value):
        return hint
    paths = list(dict(declared(schema)))
    same_leaf = [known for known in paths if known.rpartition(".")[2] == leaf]
    if len(same_leaf) == 1 and _takes(schema, same_leaf[0], value):
        return _word(schema, same_leaf[0], value)
    if same_leaf:
        return f"did you mean {' or '.join(same_leaf)}?"
    paths += sorted({path.rpartition(".")[0] for path in paths} - {""})  # the sections
    siblings = [known.rpartition(".")[2] for known in paths if known.startswith(f"{section}.")]
    if close := upstream.closest(leaf, siblings, CLOSE):
        return f"did you mean {section}.{close}?" if section else f"did you mean {close}?"
    close = upstream.closest(path, paths, CLOSE)
    return f"did you mean {close}?" if close else "remove it"


def suggest_sweep(path: str, schema: Any, text: str) -> str:
    """Suggest a sweep of the setting that was meant, if each of its values becomes one.

    Args:
        path: The unknown setting.
        schema: The settings of the command.
        text: The values, as they were given.
    """
    hints = []
    for item in text.split(",") if is_list(text) else ():
        parsed = parse(f"{path}={item.strip()}")
        value = item.strip() if parsed is None else parsed.value()
        hints.append(suggest(path, schema, value).partition(" (")[0].partition("="))
    if not hints or len({setting for setting, _, _ in hints}) > 1 or not hints[0][1]:
        return ""
    return f"{hints[0][0]}={','.join(value for _, _, value in hints)}"
