"""The class of all commands: options, output, error messages and exit codes."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from sft import __version__, process, progress
from sft.cli.helptext import Described, help_text
from sft.cli.options import named, parse
from sft.config import compose, saved
from sft.config.overrides import Override, Reader, located
from sft.config.paths import CONF_DIR, expand_paths
from sft.config.rules import Dataclass
from sft.data.rows_option import option_of
from sft.errors import ConfigError, Problem, SftError, Stopped
from sft.files import DISK, to_json

C = TypeVar("C", bound=Dataclass)
sweep_result: dict[str, Any] = {}  # Hydra's launcher fills it, for --json


@dataclass(frozen=True, kw_only=True)
class Command(Described[C]):
    """One command: ``sft <name>``, also ``python -m sft.<name>``.

    Attributes:
        run: Runs the command with a checked config; ``--json`` prints what it returns.
        check: Finds the problems of a config whose keys and types are right.
        takes: The setting of a word without ``=``, such as the file to convert; a list has several.
    """

    run: Callable[[C], dict[str, Any] | None]
    check: Callable[[C], list[Problem]]
    takes: str | None = None

    def __call__(self, argv: list[str] | None = None) -> None:
        """Parse, compose, check and run; on an error, print a message and exit with its code."""
        argv = sys.argv[1:] if argv is None else argv
        as_json = "--json" in argv
        result: dict[str, Any] | None = None
        try:
            with _only_stderr() if as_json else contextlib.nullcontext():
                result = self._dispatch(argv)
        except Stopped as stopped:
            # All ranks stop for the same reason, so only rank 0 reports it.
            if process.rank() != 0:
                sys.exit(stopped.exit_code)
            end(stopped.exit_code, str(stopped), as_json)
        except SftError as error:
            end(error.exit_code, str(error), as_json, found=error.result)
        except KeyboardInterrupt as interrupt:
            progress.close_all()
            if progress.on_terminal():
                sys.stderr.write(progress.ERASE)  # the terminal's ^C is on the line
            elif sys.stderr.isatty():
                sys.stderr.write("\n")
            # A run that goes on from a checkpoint has said so itself.
            end(130, "; ".join(["interrupted", *map(str, interrupt.args)]), as_json)
        except SystemExit:  # from a sweep, which has printed its table
            if as_json and sweep_result:
                _print_once(to_json(sweep_result) + "\n")
            raise
        except BrokenPipeError:  # as in: sft train --help | head
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python's own last flush fails too
            sys.exit(1)
        except OSError as error:
            is_disk = error.errno in DISK
            message = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            fix = "\n    fix: free some space, or choose a folder that can be written to"
            message = message + fix if is_disk else f"{type(error).__name__}: {error}"
            end(1, message, as_json, "" if is_disk else traceback.format_exc())
        except Exception as error:
            end(1, f"{type(error).__name__}: {error}", as_json, traceback.format_exc())
        if as_json and (result or sweep_result):
            _print_once(to_json(result or sweep_result) + "\n")

    def _dispatch(self, argv: list[str]) -> dict[str, Any] | None:
        if unusable := process.problems():
            raise ConfigError(unusable)
        if "--help" in argv or "-h" in argv:
            return _answer(argv, "help", help_text(self, argv))
        args = parse(argv)
        if args.version:
            return _answer(argv, "version", f"sft {__version__}\n")
        if args.completion:
            from sft.cli.completion import script

            return _answer(argv, "completion", script(args.completion))
        if args.multirun:
            self._sweep(args)
        elif args.info or args.hydra_help or args.cfg in ("hydra", "all"):
            words = [item.hydra() for item in self.read(args.overrides, args.config_dir)[0]]
            options = [word for word in argv if word not in args.overrides]
            _hand_to_hydra(self, options + words)
        else:
            config = self.compose(args.overrides, args.config_dir)
            if args.cfg and args.json:
                return dataclasses.asdict(config)
            if args.cfg:
                _print_once(saved.to_yaml(config))
                return None
            start_logging()
            return self.run(config)
        return None

    def read(
        self, words: list[str], config_dir: str | None = None, sweep: bool = False
    ) -> tuple[list[Override], list[Problem]]:
        """Parse settings, options and a settings file; also gives what is wrong with them."""
        words = named(words, self.takes, self.schema)
        reader = Reader(self.schema, config_dir, self.config_name is not None, sweep, option_of)
        return reader.read(words), reader.problems

    def expanded(self, words: list[str], config_dir: str | None = None) -> list[str]:
        """Return the words with a settings file replaced by one word for each of its entries."""
        return [item.word() for item in self.read(words, config_dir)[0]]

    def compose(self, overrides: list[str], config_dir: str | None = None) -> C:
        """Compose and check a config.

        Raises:
            ConfigError: With every problem that was found.
        """
        given, problems = self.read(overrides, config_dir)
        try:
            config, found = (
                compose.plain_config(self.schema, given)
                if self.config_name is None
                else compose.typed_config(self.schema, self.config_name, given, config_dir)
            )
        except ConfigError as error:
            raise ConfigError([*problems, *located(error.problems, given)]) from error
        expand_paths(config)
        problems += located([*found, *self.check(config)], given)
        if problems:
            raise ConfigError(problems)
        return config

    def _sweep(self, args: argparse.Namespace) -> None:
        """Run a sweep: Hydra expands it, and its launcher starts one torchrun per trial.

        Under torchrun every rank calls this; rank 0 runs the sweep and the others return.
        """
        if self.name != "train" or self.config_name is None:
            raise ConfigError([Problem("-m", "only sft train can run a sweep", "leave out -m")])
        if process.rank() != 0:
            return
        given, problems = self.read(args.overrides, args.config_dir, sweep=True)
        try:
            forced = compose.sweep_overrides(self.schema, self.config_name, given, args.config_dir)
        except ConfigError as error:
            problems += located(error.problems, given)
        if problems:
            raise ConfigError(problems)
        options = ["-m"] + (["--config-dir", args.config_dir] if args.config_dir else [])
        _hand_to_hydra(self, options + forced)


def _answer(argv: list[str], name: str, text: str) -> dict[str, Any] | None:
    """Print a text; with ``--json``, return it as the result instead."""
    if "--json" in argv:
        return {name: text}
    _print_once(text)
    return None


def end(
    exit_code: int, message: str, as_json: bool, details: str = "", found: Any = ()
) -> NoReturn:
    """Report an error and exit; with --json also print ``{"error": ..., **found}`` on stdout."""
    report_error(message, details)
    if as_json:
        _print_once(to_json({"error": message, **dict(found)}) + "\n")
    sys.exit(exit_code)


def report_error(message: str, details: str = "") -> None:
    """Report an error on stderr, in torchrun's final table, and to the sweep of this trial.

    Ranks often fail with the same error, and torchrun ends all ranks when the first one exits. So
    ranks other than 0 wait until rank 0 has reported the error. A rank that is still alive then has
    failed alone and reports its own error.
    """
    progress.close_all()
    rank = process.rank()
    if rank != 0:
        time.sleep(5)
        message = f"rank {rank}: {message}"
    # The text may hold a name from a stranger's file; a terminal would obey its control characters.
    message = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    sys.stderr.write(f"{details}error: {message}\n")
    sys.stderr.flush()
    process.report_failure(message)


def _print_once(text: str) -> None:
    if process.rank() == 0:
        sys.stdout.write(text)
        sys.stdout.flush()


@contextlib.contextmanager
def _only_stderr() -> Iterator[None]:
    """Redirect stdout to stderr, also for C libraries and child processes."""
    sys.stdout.flush()
    stdout = os.dup(1)
    try:
        os.dup2(2, 1)
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def start_logging() -> None:
    """Send the log of sft to stdout on rank 0; other ranks log to their files only."""
    logger = logging.getLogger("sft")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    if process.rank() == 0:
        handler = progress.LogHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def _hand_to_hydra(command: Command[Any], argv: list[str]) -> None:
    """Run ``hydra.main`` with these words.

    Raises:
        ConfigError: Hydra refuses them. Its own way would be to print a traceback and to exit.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, and those of the disk
    sys.argv = [f"sft.{command.name}", *argv]
    if command.config_name is not None:
        compose.register_schema(command.schema, command.config_name)
    main = hydra.main(
        config_path=str(CONF_DIR), config_name=command.config_name, version_base="1.3"
    )
    try:
        main(lambda _: None)()
    except (HydraException, OmegaConfBaseException) as error:
        problem = Problem(" ".join(argv), ": ".join(compose.reasons(error)), compose.CORRECT)
        raise ConfigError([problem]) from error
    except OSError as error:  # Hydra writes to this folder only
        problem = Problem(str(error.filename), str(error.strerror), "hydra.sweep.dir=FOLDER")
        raise ConfigError([problem]) from error
