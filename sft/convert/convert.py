"""Recognise the tool of a configuration, convert it, and find what sft refuses of the result."""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft.cli.command import Command
from sft.config import no_effect, packages
from sft.config.foreign import UNKNOWN, Outcome
from sft.config.foreign_common import PREFERENCE
from sft.config.names import GROUPS, TABLES
from sft.config.rules import declared, default_of
from sft.config.saved import escaped
from sft.config.settings import Config
from sft.convert import axolotl, llamafactory, trl
from sft.convert.conversion import Conversion, convert_keys, finished
from sft.convert.read import Source
from sft.errors import ConfigError, Problem

TOOLS = {"axolotl": "Axolotl", "llamafactory": "LLaMA-Factory", "trl": "TRL"}
MODULES = {"axolotl": axolotl, "llamafactory": llamafactory, "trl": trl}
SHARED = ("context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size")
LEAST_KNOWN = 0.6  # share of the keys that a tool must know
# Settings that an option of a group gives.
BY_OPTION = {
    ("lora", "none"): {"lora.enabled": False},
    ("quantization", "nf4"): {"quantization.load_in_4bit": True},
    ("quantization", "int8"): {"quantization.load_in_8bit": True},
    ("profile", "torch"): {"profile.torch": True},
}


@dataclass
class Result:
    """A configuration of sft, and how it came about.

    Attributes:
        tool: The tool of the file.
        conversion: The lines of the report.
        settings: Options and settings, in the order of the file.
        problems: What sft refuses of them.
        missing: Packages that they need and that are not installed here.
    """

    tool: str
    conversion: Conversion
    settings: dict[str, Any]
    problems: list[Problem]
    missing: list[Problem]


def _known(source: Source, tool: str) -> set[str]:
    table = {**TABLES[tool], **(TABLES["unsloth"] | TABLES["peft"] if tool == "trl" else {})}
    return {name for name in source.keys if name.rpartition(".")[2] in table}


def recognise(source: Source, asked: str | None) -> str:
    """Return the tool that a configuration is of: the one that knows the most of its keys.

    Args:
        source: The configuration.
        asked: The tool that the user names; None: any.

    Raises:
        ConfigError: No tool, or not the one that is asked for, knows most of the keys.
    """
    if source.path.suffix == ".py":
        return asked or "trl"
    if any(name.partition(".")[0] in GROUPS and "." in name for name in source.keys):
        rule, fix = "is a settings file of sft", f"sft train {source.path}"
        raise ConfigError([Problem(str(source.path), rule, fix)])
    known = {tool: _known(source, tool) for tool in TOOLS}
    best = max(TOOLS, key=lambda tool: len(known[tool]))
    # Keys that only one tool has tell more than those that all have.
    only = {
        tool: len(known[tool].difference(*(known[other] for other in TOOLS if other != tool)))
        for tool in TOOLS
    }
    if any(only.values()):
        best = max(TOOLS, key=lambda tool: (only[tool], len(known[tool])))
    tool = asked or best
    count = len(source.keys)
    if len(known[tool]) < LEAST_KNOWN * count:
        rule = f"{len(known[tool])} of its {count} keys are keys of {TOOLS[tool]}"
        better = len(known[best]) >= LEAST_KNOWN * count
        fix = f"tool={best}" if better else f"give a configuration of {', '.join(TOOLS.values())}"
        raise ConfigError([Problem(str(source.path), rule, fix)])
    return tool


def convert(source: Source, tool: str, gpus: int, train: Command[Any]) -> Result:
    """Convert a configuration.

    Args:
        source: The configuration.
        tool: Its tool.
        gpus: The number of GPUs that it trains on.
        train: The command that takes the result.

    Raises:
        ConfigError: It is no configuration of supervised fine-tuning, or a file that it needs is
            missing.
    """
    for name in ("rl", "reward_model", "process_reward_model", "rlhf_type"):
        if source.keys.get(name):
            rule = PREFERENCE
            raise ConfigError([Problem(f"{name}={source.keys[name]}", rule, "train it elsewhere")])
    module = MODULES[tool]
    added = {
        name: value
        for name, value in module.defaults({**source.keys, **dict.fromkeys(source.calls)}).items()
        if source.keys.get(name) is None and name not in source.unread
    }
    table = TABLES[tool]
    if tool == "trl":
        table = {**TABLES["unsloth"], **TABLES["peft"], **table}
    left_out = {name: value for name, value in added.items() if name not in source.keys}
    # GPUs that share rows, or layers, work on one batch together.
    shared = [source.keys.get(name) for name in SHARED]
    rows_of = max(1, gpus // math.prod(size for size in shared if isinstance(size, int) and size))
    conversion = Conversion(table, {**source.keys, **added}, rows_of, frozenset(source.calls))
    special = (
        llamafactory.special(source.path.resolve().parent)
        if tool == "llamafactory"
        else module.SPECIAL
    )
    given = {name: value for name, value in source.keys.items() if name not in left_out}
    convert_keys(conversion, given, special)
    for name, note in source.unread.items():
        conversion.add(name, "...", Outcome(UNKNOWN, note=note))
    module.finish(conversion)
    _without_effect(conversion)
    settings = finished(conversion)
    problems = _problems(settings, train)
    missing = [problem for problem in problems if packages.is_missing(problem)]
    refused = [problem for problem in problems if problem not in missing]
    return Result(tool, conversion, settings, refused, missing)


def _without_effect(conversion: Conversion) -> None:
    """Drop settings that another setting switches off; they had no effect before either."""
    own = dict(declared(Config))
    for need in no_effect.NEEDS:
        settings = {**conversion.wanted, **conversion.settings}
        for group, option in BY_OPTION:
            if settings.get(group) == option:
                settings |= BY_OPTION[group, option]
        given = [
            name for name in settings if name == need.setting or name.startswith(f"{need.setting}.")
        ]
        item = own.get(need.other)
        other = settings.get(need.other, None if item is None else default_of(item))
        if not given or _holds(need, other):
            continue
        if need.fix in ("train.padding_free=false",):
            conversion.settings["train.padding_free"] = False
        elif need.rule == "has no effect":
            for name in given:
                conversion.wanted.pop(name, None)
                conversion.drop(name, f"has no effect with {need.other}={other}")


def _holds(need: no_effect.Need, value: Any) -> bool:
    try:
        return need.holds(value)
    except TypeError:  # a value of another type, which is refused later
        return True


def text_of(settings: dict[str, Any], head: str) -> str:
    """Return the settings file: one setting per line, by its full name."""
    lines = []
    for key, value in escaped(settings).items():
        text: str = yaml.safe_dump(
            value, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False
        ).removesuffix("..." + chr(10))
        if chr(10) in text.strip():
            text = json.dumps(value, ensure_ascii=False)  # YAML too, with line breaks as \\n
        lines.append(f"{key}: {text.strip()}")
    return head + "\n".join(lines) + "\n"


def _problems(settings: dict[str, Any], train: Command[Any]) -> list[Problem]:
    """Compose the settings as ``sft train FILE`` does, and return what is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "import.yaml"
        path.write_text(text_of(settings, ""), encoding="utf-8")
        try:
            train.compose([str(path)])
        except ConfigError as error:
            return [
                Problem(
                    problem.setting.rpartition(f"{path}:")[2].partition(": ")[2]
                    if str(path) in problem.setting
                    else problem.setting,
                    problem.rule,
                    problem.fix,
                )
                for problem in error.problems
            ]
    return []
