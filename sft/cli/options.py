"""The command-line options of every command, such as ``--json``."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from sft.config import upstream
from sft.config.grammar import hydra_text
from sft.config.grammar import parse as parse_override
from sft.config.groups import groups
from sft.config.names import suggest
from sft.config.settings import Config
from sft.config.settings_file import field_of
from sft.errors import ConfigError, Problem

SHELLS = ("bash", "zsh", "fish")
# Options of Hydra that are refused, because sft would ignore them.
REFUSED = ("config_path", "config_name", "experimental_rerun", "package")
ARGUMENTS: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("--cfg", "-c"), {"choices": ["job", "hydra", "all"]}),
    (("--json",), {"action": "store_true"}),
    (("--version",), {"action": "store_true"}),
    (("--completion",), {"choices": SHELLS}),
    (("--config-dir", "-cd"), {}),
    (("--multirun", "-m"), {"action": "store_true"}),
    # Hydra's own options, which --help does not list.
    (("--run", "-r"), {"action": "store_true"}),
    (("--resolve",), {"action": "store_true"}),
    (("--hydra-help",), {"action": "store_true"}),
    (("--shell-completion", "-sc"), {"action": "store_true"}),
    (("--info", "-i"), {"nargs": "?", "const": "all"}),
    (("--config-path", "-cp"), {}),
    (("--config-name", "-cn"), {}),
    (("--experimental-rerun",), {}),
    (("--package", "-p"), {}),
)
OPTIONS = ("--help", "-h", *(name for names, _ in ARGUMENTS for name in names))


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError for an unknown option, where argparse would exit."""

    def error(self, message: str) -> NoReturn:
        what, _, rest = message.partition(": ")
        option = what.removeprefix("argument ").partition("/")[0]
        raise ConfigError(
            [Problem(option, rest or message, "sft COMMAND --help lists the options")]
        )


def _no_option(option: str, value: str | None) -> Problem:
    """Return the problem of an option that is not ours, such as ``--learning_rate 1e-4``.

    Args:
        option: The option, with its value if they are one word.
        value: The word after it, if that may be its value.
    """
    name, equals, text = option.lstrip("-").partition("=")
    text = text if equals else value or "true"
    parsed = parse_override(f"key={text}")
    known = [name for name in OPTIONS if name.startswith("--")]
    fix = "remove it; a setting is written as NAME=VALUE"
    if name in groups(None) or field_of(Config, name) is not None:
        fix = f"{name}={text}" if equals or value else f"{name}=VALUE"
    elif closest := upstream.closest(option, known, 0.75):
        fix = f"did you mean {closest}?"
    else:
        hint = suggest(name, Config, text if parsed is None else parsed.value())
        fix = fix if hint == "remove it" else hint
    return Problem(option, "there is no such option", fix)


def _no_options(argv: list[str], unknown: list[str]) -> Iterator[Problem]:
    """Yield the problem of each unknown option, with the word after it as its value."""
    for option in unknown:
        following = argv[argv.index(option) + 1 :][:1]
        is_value = following and (re.match(r"-\.?\d", following[0]) or following[0][:1] != "-")
        value = following[0] if is_value and "=" not in following[0] else None
        if not re.match(r"-\.?\d", option):  # a number is the value of an option
            yield _no_option(option, value)


def named(words: list[str], setting: str | None, schema: type) -> list[str]:
    """Name the setting of the words without ``=``, such as a file; a path may have one.

    Args:
        words: The words of a command line.
        setting: The setting; None: no setting is given so. A list takes all of these words.
        schema: The settings of the command.
    """
    if setting is None:
        return words
    plain = [word for word in words if "=" not in word or os.path.exists(word)]
    if plain and str(getattr(field_of(schema, setting), "type", "")).startswith("list"):
        given = f"{setting}=[{','.join(map(hydra_text, plain))}]"
        return [given, *(word for word in words if word not in plain)]
    return [f"{setting}={word}" if word in plain else word for word in words]


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse a command line.

    Raises:
        ConfigError: An option is unknown or cannot be used.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for names, options in ARGUMENTS:
        parser.add_argument(*names, **options)
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown := [word for word in unknown if word.startswith("-")]:
        raise ConfigError(list(_no_options(argv, unknown)))
    if args.shell_completion:  # Hydra's spelling: -sc install=bash
        args.completion = next(iter(args.overrides), "install=").partition("=")[2]
        if args.completion not in SHELLS:
            fix = "--completion bash, zsh or fish"
            raise ConfigError([Problem("--shell-completion", "needs the name of a shell", fix)])
    if found := list(_problems(args)):
        raise ConfigError(found)
    return args


def _problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Refuse options of Hydra that sft would ignore."""
    if args.multirun and args.cfg:
        yield Problem(
            "--cfg", "cannot print a sweep: each trial has its own config", "leave out -m or --cfg"
        )
    asks_hydra = args.info or args.hydra_help or args.cfg in ("hydra", "all")
    if args.json and asks_hydra:
        yield Problem("--json", "Hydra prints this as text", "leave out --json")
    for word in args.overrides:
        if word.lstrip("+").startswith(("hydra.", "hydra/")) and not (args.multirun or asks_hydra):
            rule = "Hydra's own settings have an effect on a sweep only"
            yield Problem(word, rule, "add -m, or leave it out")
    for option in REFUSED:
        value = getattr(args, option)
        if value is not None:
            written = f"--{option.replace('_', '-')} {value}"
            yield Problem(
                written,
                "this option of Hydra is not supported",
                "--config-dir DIR adds your options",
            )
