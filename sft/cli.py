"""What every command shares: its options, its help, and how it ends when something is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from omegaconf import OmegaConf

from sft import compose
from sft.config import CONF_DIR
from sft.errors import ConfigError, Problem, SftError, Stopped
from sft.overrides import groups
from sft.rules import fields_of, written

C = TypeVar("C")


@dataclass(frozen=True)
class Command(Generic[C]):
    """One ``python -m sft.<name>``.

    Attributes:
        name: The module's name, such as ``train``.
        schema: The dataclass that holds every setting.
        run: What the command does with a checked config.
        check: Finds the problems of a config whose keys and types are right.
        config_name: The primary YAML in conf/, for commands that compose the groups.
        summary: One sentence for ``--help``.
        examples: Lines for ``--help``.
    """

    name: str
    schema: type[C]
    run: Callable[[C], None]
    check: Callable[[C], list[Problem]]
    summary: str
    examples: tuple[str, ...]
    config_name: str | None = None

    def __call__(self, argv: list[str] | None = None) -> None:
        """Parse, compose, check and run; exits with the error's code and a message."""
        argv = sys.argv[1:] if argv is None else argv
        try:
            self._dispatch(argv)
        except Stopped as stopped:
            if os.environ.get("RANK", "0") == "0":  # all ranks stop, and mean the same
                report_error(str(stopped))
            sys.exit(stopped.exit_code)
        except SftError as error:
            report_error(str(error))
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            resumes = "; the same command again resumes" if self.name == "train" else ""
            report_error(f"interrupted{resumes}")
            sys.exit(130)
        except Exception as error:
            report_error(f"{type(error).__name__}: {error}", traceback.format_exc())
            sys.exit(1)

    def _dispatch(self, argv: list[str]) -> None:
        if "--help" in argv or "-h" in argv:
            _print_once(help_text(self))
            return
        args = _parse_arguments(argv)
        if problems := list(_option_problems(args)):
            raise ConfigError(problems)
        if args.multirun:
            self._sweep(args)
            return
        if args.info or args.hydra_help or args.shell_completion or args.cfg in ("hydra", "all"):
            _hand_to_hydra(self, argv)
            return
        config = self.compose(args.overrides, args.config_dir)
        if args.cfg:
            _print_once(OmegaConf.to_yaml(OmegaConf.structured(config)))
            return
        start_logging()
        self.run(config)

    def compose(self, overrides: list[str], config_dir: str | None = None) -> C:
        """Compose and check a config.

        Raises:
            ConfigError: With every problem that was found.
        """
        config, problems = (
            compose.plain_config(self.schema, overrides)
            if self.config_name is None
            else compose.typed_config(self.schema, self.config_name, overrides, config_dir)
        )
        problems += self.check(config)
        if problems:
            raise ConfigError(problems)
        return config

    def _sweep(self, args: argparse.Namespace) -> None:
        """Let Hydra expand the sweep; its launcher starts one torchrun per trial.

        Under torchrun every rank comes here; the first sweeps, the others have nothing to do.
        """
        if self.config_name is None:
            raise ConfigError([Problem("-m", "only training is swept", "leave out -m")])
        if os.environ.get("RANK", "0") != "0":
            return
        forced = compose.sweep_overrides(
            self.schema, self.config_name, args.overrides, args.config_dir
        )
        options = ["-m"] + (["--config-dir", args.config_dir] if args.config_dir else [])
        _hand_to_hydra(self, options + forced)


def report_error(message: str, details: str = "") -> None:
    """Say an error once: on stderr, in torchrun's closing table, and to the sweep of this trial.

    Ranks mostly fail alike. The first to exit makes torchrun end the others, so all but rank 0 wait
    until it has spoken; who is alive after that failed alone, and speaks.
    """
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(5)
        message = f"rank {rank}: {message}"
    sys.stderr.write(f"{details}error: {message}\n")
    sys.stderr.flush()
    if torchrun_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"timestamp": str(int(time.time()))}
        report = {"message": {"message": message, "extraInfo": extra}}
        Path(torchrun_file).write_text(json.dumps(report), encoding="utf-8")
    if sweep_file := os.environ.get("SFT_ERROR_FILE"):
        Path(sweep_file).write_text(message, encoding="utf-8")


def _print_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(text)


def start_logging() -> None:
    """Send the project's log to stdout on rank 0; other ranks keep theirs to their files."""
    logger = logging.getLogger("sft")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    if os.environ.get("RANK", "0") == "0":
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser

    args: argparse.Namespace = get_args_parser().parse_intermixed_args(argv)
    return args


def _option_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Refuse the options of Hydra that would be ignored here."""
    if args.multirun and args.cfg:
        yield Problem("--cfg", "a sweep has a config for each trial", "leave out -m, or --cfg")
    for option in ("config_path", "config_name", "experimental_rerun", "package"):
        value = getattr(args, option)
        if value is not None:
            written = f"--{option.replace('_', '-')} {value}"
            yield Problem(written, "is not supported", "--config-dir DIR adds your own options")


def _hand_to_hydra(command: Command[Any], argv: list[str]) -> None:
    import hydra

    sys.argv = [f"sft.{command.name}", *argv]
    if command.config_name is not None:
        compose.register_schema(command.schema, command.config_name)
    hydra.main(config_path=str(CONF_DIR), config_name=command.config_name, version_base="1.3")(
        lambda _: None
    )()


def help_text(command: Command[Any]) -> str:
    """List the examples, the groups with their options, and every setting with its default."""
    lines = [f"python -m sft.{command.name}: {command.summary}", ""]
    lines += [f"    {example}" for example in command.examples]
    if command.config_name:
        lines += ["", "Groups, chosen as group=option (your own: --config-dir DIR):", ""]
        for group, options in sorted(groups(None).items()):
            lines.append(f"    {group:<16} {', '.join(sorted(options))}")
        lines += ["", "Options: --cfg job prints the composed config; -m sweeps over a=1,2,3."]
    lines += ["", "Settings, with their defaults:", ""]
    lines += _setting_lines(command.schema())
    return "\n".join(lines) + "\n"


def _setting_lines(node: Any, prefix: str = "") -> Iterator[str]:
    for name, field, value in fields_of(node):
        if dataclasses.is_dataclass(value):
            yield ""
            yield from _setting_lines(value, f"{prefix}{name}.")
        else:
            rule = field.metadata.get("rule")
            suffix = f"; {rule.text}" if rule else ""
            shown = written(prefix + name, value)
            yield f"    {shown}\n        {field.metadata['help']}{suffix}"
