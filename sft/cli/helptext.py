"""The text of ``--help``: a command's examples, groups and settings, or one section of them."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from sft.config.groups import groups
from sft.config.paths import CONF_DIR
from sft.config.rules import Dataclass, fields_of, written
from sft.config.settings import Config
from sft.config.upstream import did_you_mean
from sft.errors import ConfigError, Problem

C = TypeVar("C", bound=Dataclass)
WIDEST = 110  # maximum columns of a line; longer lines are hard to read
OPTIONS = {
    "--help [SECTION]": "print this help, or only one group or section, such as --help dataset",
    "--cfg job": "print the composed settings as YAML and exit",
    "--json": "print the result as one JSON object on stdout; everything else goes to stderr",
    "-m": "run a sweep: one trial for each combination of values, such as lora.r=4,8,16",
    "--config-dir DIR": "add a folder with your own options, such as DIR/model/mine.yaml",
    "--completion SHELL": "print the tab completion script for bash, zsh or fish",
    "--version": "print the version of sft",
}


@dataclass(frozen=True, kw_only=True)
class Described(Generic[C]):
    """What the help tells about a command.

    Attributes:
        name: The command's name, such as ``train``.
        schema: The dataclass with every setting.
        summary: A line for the list of commands and ``--help``.
        examples: Commands that ``--help`` shows.
        config_name: The primary YAML in conf/, for commands that compose the groups.
    """

    name: str
    schema: type[C]
    summary: str
    examples: tuple[str, ...]
    config_name: str | None = None


def overview(summaries: dict[str, str]) -> str:
    """List the commands, one line each."""
    lines = ["usage: sft COMMAND [SETTINGS.yaml] [group=option ...] [setting=value ...]", ""]
    lines += [f"    {name:<10} {summary}" for name, summary in summaries.items()]
    lines += [
        "",
        "sft COMMAND --help lists a command's settings, sft --version prints the version.",
    ]
    lines += ["sft --completion SHELL prints the tab completion script for bash, zsh or fish."]
    lines += ["Each command also runs as python -m sft.COMMAND (import as sft.convert), and"]
    lines += ["training on several GPUs as torchrun --nproc_per_node 4 -m sft.train."]
    return "\n".join(lines) + "\n"


def help_text(command: Described[Any], argv: list[str]) -> str:
    """Return the help of a command, or only of the sections that ``argv`` names.

    Raises:
        ConfigError: There is no such section.
    """
    config_dir = None
    words = list(argv)
    for option in ("--config-dir", "-cd"):
        if option in words[:-1]:
            index = words.index(option)
            config_dir = words[index + 1]
            del words[index : index + 2]
    asked = [word for word in words if not word.startswith("-") and "=" not in word]
    found = groups(config_dir) if command.config_name else {}
    config = command.schema()
    if asked:
        return "\n".join(_asked(asked, found, config, config_dir))
    lines = _wrapped(f"sft {command.name}: {command.summary}", 0)
    lines += ["", *(line for example in command.examples for line in _example(example))]
    if own := _own(command):
        lines += ["", "Settings of this command, with their defaults:", "", *own]
    if found:
        lines += ["", "Options of each group (--config-dir DIR adds your own):"]
        for name in sorted(found):
            lines += ["", *_group(name, found[name], config_dir)]
    lines += ["", "Command-line options:", ""]
    for option, meaning in OPTIONS.items():
        if option == "-m" and command.name != "train":
            continue
        if found or option not in ("--help [SECTION]", "--config-dir DIR"):
            lines += _entry(option, meaning, 20)
    if found:
        lines += [
            "",
            "Settings, with their defaults. You can also give a file of settings, FILE.yaml;",
        ]
        lines += ["options and settings on the command line replace those of the file."]
        for name, field, value in fields_of(config):
            if dataclasses.is_dataclass(value):
                lines += ["", *_settings(value, f"{name}.")]
            elif field.name in {item.name for item in dataclasses.fields(Config)}:
                lines += [*([""] * (name == "run_name")), *_setting(name, field, value)]
    return "\n".join(lines) + "\n"


def _asked(
    names: list[str], found: dict[str, set[str]], config: Any, config_dir: str | None
) -> Iterator[str]:
    """Yield the help of the groups and sections with these names."""
    sections = [name for name, _, value in fields_of(config) if dataclasses.is_dataclass(value)]
    known = sorted({*found, *sections})
    for name in names:
        if name not in known:
            rule = (
                f"the sections of the help are {', '.join(known)}"
                if known
                else "the help of this command has no sections"
            )
            fix = did_you_mean(name, known)
            if not fix.startswith("did"):
                fix = "name one of them" if known else "leave it out"
            raise ConfigError([Problem(f"--help {name}", rule, fix)])
        if name in found:
            yield from [*_group(name, found[name], config_dir), ""]
        if name in sections:
            yield from [f"Settings of {name}, with their defaults:", ""]
            yield from [*_settings(getattr(config, name), f"{name}."), ""]


def _example(command: str) -> list[str]:
    """Wrap a command over lines that end in a backslash, so that it can be pasted into a shell."""
    first, *rest = _wrapped(command.replace("python -m sft.", "sft "), 4, reserve=2)
    lines = [first, *(f"    {line}" for line in rest)]
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _own(command: Described[Any]) -> list[str]:
    """Return the help of the settings that are not settings of training."""
    shared = {item.name for item in dataclasses.fields(Config)} if command.config_name else set()
    return [
        line
        for name, field, value in fields_of(command.schema())
        if name not in shared
        for line in _setting(name, field, value)
    ]


def _group(name: str, options: set[str], config_dir: str | None) -> list[str]:
    lines = [f"{name}=OPTION"]
    width = min(28, max(map(len, options)) + 2)
    for option in sorted(options):
        lines += _entry(option, described(name, option, config_dir), width)
    return lines


def described(group: str, option: str, config_dir: str | None = None) -> str:
    """Return the description of an option: the first comment line of its YAML."""
    for root in (CONF_DIR, *([Path(config_dir)] if config_dir else [])):
        file = root / group / f"{option}.yaml"
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                if not line.startswith("#"):
                    break
                if not line.startswith("# @"):
                    return line.removeprefix("#").strip()
    return ""


def _settings(node: Any, prefix: str = "") -> Iterator[str]:
    for name, field, value in fields_of(node):
        if dataclasses.is_dataclass(value):
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield from _setting(prefix + name, field, value)


def _setting(key: str, field: dataclasses.Field[Any], value: Any) -> list[str]:
    rule = field.metadata.get("rule")
    text = field.metadata["help"] + (f" ({rule.text})" if rule else "")
    shown = written(key, repr(value) if value == "\n" else value)
    return [*_wrapped(shown, 4), *_wrapped(text, 8)]


def _entry(name: str, text: str, width: int) -> list[str]:
    """Return the lines of a name and its meaning, in two columns."""
    first, *rest = _wrapped(text, 4 + width) or [""]
    start = f"    {name:<{width}}"
    if len(start.rstrip()) + 2 > 4 + width:
        return [start.rstrip(), *([first, *rest] if text else [])]
    return [(start + first.strip()).rstrip(), *rest]


def _wrapped(text: str, indent: int, reserve: int = 0) -> list[str]:
    width = max(40, min(WIDEST, shutil.get_terminal_size().columns - 1)) - 3 * reserve
    space = " " * indent
    return textwrap.wrap(
        text,
        width,
        initial_indent=space,
        subsequent_indent=space,
        break_long_words=False,
        break_on_hyphens=False,
    )
