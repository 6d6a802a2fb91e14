"""From a command line to a checked config, or to one message that names everything wrong with it.

Hydra composes the YAML groups and the overrides; the typed tree in ``sft.config`` then says what is
legal. Hydra alone stops at the first unknown key and lets ``+lora.drop_out=0.3`` pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from sft import upstream
from sft.checks import LORA_OWNED, RENAMED, TRAIN_OWNED, default_of, written
from sft.config import CONF_DIR, fields_of
from sft.errors import ConfigError, Problem, SftError

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
        except SftError as error:
            report_error(str(error))
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            report_error("interrupted")
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
        problems: list[Problem] = []
        forced = list(_forced_overrides(overrides, config_dir, problems))
        composed, grid = _compose(self, forced, config_dir, problems)
        if not composed:
            raise ConfigError(problems)
        problems += _grid_problems(grid, overrides)
        typed = OmegaConf.structured(self.schema)
        problems += _merge(typed, composed, self.schema)
        config: Any = OmegaConf.to_object(typed)
        problems += self.check(config)
        if problems:
            raise ConfigError(problems)
        return config  # type: ignore[no-any-return]

    def _sweep(self, args: argparse.Namespace) -> None:
        """Let Hydra expand the sweep; its launcher starts one torchrun per trial.

        Under torchrun every rank comes here; the first sweeps, the others have nothing to do.
        A trial checks its own config, so that a refused trial stops no other. Only what no trial
        can have right is refused here: unknown keys and unknown group options.
        """
        if os.environ.get("RANK", "0") != "0":
            return
        problems: list[Problem] = []
        forced = list(_forced_overrides(args.overrides, args.config_dir, problems, sweep=True))
        fixed = [item for item in forced if not _is_sweep(item)]
        swept = [f"{item.split('=', 1)[0]}=null" for item in forced if _is_sweep(item)]
        groups = _groups(args.config_dir)
        plain = fixed + [item for item in swept if item.split("=")[0].lstrip("+") not in groups]
        composed, _ = _compose(self, plain, args.config_dir, problems)
        typed = OmegaConf.structured(self.schema)
        problems += [
            problem
            for problem in _merge(typed, composed, self.schema)
            if problem.rule == UNKNOWN_SETTING
        ]
        if problems:
            raise ConfigError(problems)
        options = ["-m"] + (["--config-dir", args.config_dir] if args.config_dir else [])
        _hand_to_hydra(self, options + forced)


UNKNOWN_SETTING = "there is no such setting"


def report_error(message: str, details: str = "") -> None:
    """Say an error once: rank 0 on stderr, and to the sweep that started this trial."""
    if os.environ.get("RANK", "0") != "0" and not details:
        return
    sys.stderr.write(f"{details}error: {message}\n")
    sys.stderr.flush()
    error_file = os.environ.get("SFT_ERROR_FILE")
    if error_file and os.environ.get("RANK", "0") == "0":
        Path(error_file).write_text(message, encoding="utf-8")


def _print_once(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(text)


def start_logging() -> None:
    """Send the project's log to stdout on rank 0; other ranks keep theirs to their files."""
    logger = logging.getLogger("sft")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if os.environ.get("RANK", "0") == "0":
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    from hydra._internal.utils import get_args_parser

    args: argparse.Namespace = get_args_parser().parse_args(argv)
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
    register_schema(command)
    hydra.main(config_path=str(CONF_DIR), config_name=command.config_name, version_base="1.3")(
        lambda _: None
    )()


def register_schema(command: Command[Any]) -> None:
    """Give Hydra the defaults, untyped: types are checked later, all at once."""
    from hydra.core.config_store import ConfigStore

    node = OmegaConf.to_container(OmegaConf.structured(command.schema))
    ConfigStore.instance().store(name=f"{command.name}_defaults", node=node)


def _is_sweep(override: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed: bool = OverridesParser.create().parse_override(override).is_sweep_override()
    return parsed


def _groups(config_dir: str | None) -> dict[str, set[str]]:
    """List the config groups and their options, ours and the user's."""
    groups: dict[str, set[str]] = {}
    for root in (CONF_DIR, *([Path(config_dir)] if config_dir else [])):
        for file in root.rglob("*.yaml"):
            group = file.parent.relative_to(root).as_posix()
            if group != ".":
                groups.setdefault(group, set()).add(file.stem)
    return groups


def _forced_overrides(
    overrides: list[str], config_dir: str | None, problems: list[Problem], sweep: bool = False
) -> Iterator[str]:
    """Make each override one that Hydra accepts, and collect what is wrong with it.

    A value is forced in (``++key=value``), so that an unknown key is found by our check, along
    with every other, and not by the first exception.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if unusable := list(_config_dir_problems(config_dir)):
        raise ConfigError(unusable)
    ours, groups = _groups(None), _groups(config_dir)
    parser = OverridesParser.create()
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            rule = str(error).splitlines()[0] if str(error) else "cannot be parsed"
            problems.append(Problem(text, rule, "write it as key=value, with quotes around spaces"))
            continue
        key = parsed.key_or_group
        if key == "hydra" or key.startswith(("hydra.", "hydra/")):
            yield text
        elif parsed.is_delete():
            problems.append(
                Problem(text, "a setting cannot be deleted", "remove it from the command")
            )
        elif parsed.is_sweep_override() and not sweep:
            values = text.split("=", 1)[1]
            problems.append(
                Problem(text, "several values are a sweep", f"add -m, or {key}=[{values}]")
            )
        elif key not in groups:
            yield f"++{text.lstrip('+')}"
        else:
            unknown = [option for option in _options(parsed) if option not in groups[key]]
            problems += [_no_option(key, option, groups[key]) for option in unknown]
            if not unknown:
                yield text.lstrip("+") if key in ours else f"+{text.lstrip('+')}"


def _config_dir_problems(config_dir: str | None) -> Iterator[Problem]:
    if config_dir is None:
        return
    root = Path(config_dir)
    if not root.is_dir():
        yield Problem(f"--config-dir {config_dir}", "there is no such folder", "--config-dir DIR")
    for file in sorted(root.rglob("*.yaml")):
        name = file.relative_to(root)
        if (CONF_DIR / name).is_file():
            yield Problem(
                f"--config-dir {config_dir}",
                f"{CONF_DIR / name} would be used instead of your {file}",
                f"rename it, such as {name.with_stem(f'my-{name.stem}')}",
            )
        try:
            OmegaConf.load(file)
        except Exception as error:  # a YAML error, or bytes that are not text
            reason = " ".join(str(error).split())
            yield Problem(f"--config-dir {config_dir}", f"{file}: {reason}", "mend the YAML file")


def _options(parsed: Any) -> list[str]:
    """List the options that an override chooses for its group, several in a sweep."""
    from hydra.core.override_parser.types import ChoiceSweep

    value = parsed.value()
    chosen = value.list if isinstance(value, ChoiceSweep) else [value]
    return ["null" if item is None else str(item) for item in chosen]


def _no_option(group: str, option: str, known: set[str]) -> Problem:
    hint = upstream.did_you_mean(option, known)
    if not hint.startswith("did"):
        hint = f"{group}={'none' if 'none' in known else min(known)}"
    rule = f"{group} has no option {option}; it has {', '.join(sorted(known))}"
    return Problem(f"{group}={option}", rule, hint)


def _compose(
    command: Command[Any], overrides: list[str], config_dir: str | None, problems: list[Problem]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Compose the groups and overrides, unchecked, and list what the config itself sweeps over."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    register_schema(command)
    if config_dir is not None:
        overrides = [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']", *overrides]
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            composed = compose(command.config_name, overrides, return_hydra_config=True)
        grid = OmegaConf.select(composed, "hydra.sweeper.params") or {}
        with open_dict(composed):
            del composed["hydra"]
        container = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        rule = ": ".join(_reasons(error))
        problems.append(Problem("the composed config", rule, "mend the YAML file or override"))
        return {}, {}
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
            problems.append(Problem(written(path, value), UNKNOWN_SETTING, _suggest(path, typed)))
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


def _suggest(path: str, typed: Any) -> str:
    """Name the setting that was probably meant, wherever it lives."""
    section, _, leaf = path.rpartition(".")
    if leaf in RENAMED:
        return RENAMED[leaf]
    schema = OmegaConf.get_type(typed)
    paths = list(_paths(schema))
    same_leaf = [known for known in paths if known.rpartition(".")[2] == leaf]
    if same_leaf:
        return f"did you mean {same_leaf[0]}?"
    owned = {"train": TRAIN_OWNED, "lora": LORA_OWNED}.get(section, {})
    if leaf in owned:
        return owned[leaf]
    legal = {
        "train": upstream.sft_config_names,
        "lora": upstream.lora_config_names,
        "quantization": upstream.bnb_config_names,
    }.get(section)
    if legal and leaf in legal():
        return f"{section}.extra.{leaf}=..."
    siblings = [known.rpartition(".")[2] for known in paths if known.startswith(f"{section}.")]
    hint = upstream.did_you_mean(leaf, siblings)
    if hint.startswith("did"):
        return hint.replace("mean ", f"mean {section}." if section else "mean ")
    return upstream.did_you_mean(path, paths)


def _paths(schema: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(schema):
        yield f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.default_factory):
            yield from _paths(field.default_factory, f"{prefix}{field.name}.")


def help_text(command: Command[Any]) -> str:
    """List the examples, the groups with their options, and every setting with its default."""
    lines = [f"python -m sft.{command.name}: {command.summary}", ""]
    lines += [f"    {example}" for example in command.examples]
    if command.config_name:
        lines += ["", "Groups, chosen as group=option (your own: --config-dir DIR):", ""]
        for group, options in sorted(_groups(None).items()):
            lines.append(f"    {group:<16} {', '.join(sorted(options))}")
        lines += ["", "Options: --cfg job prints the composed config; -m sweeps over a=1,2,3."]
    lines += ["", "Settings, given as key=value (default in brackets):", ""]
    lines += _setting_lines(command.schema())
    return "\n".join(lines) + "\n"


def _setting_lines(node: Any, prefix: str = "") -> Iterator[str]:
    for name, field, value in fields_of(node):
        if dataclasses.is_dataclass(value):
            yield ""
            yield from _setting_lines(value, f"{prefix}{name}.")
        else:
            shown = (
                "null" if value is None else str(value).lower() if value in (True, False) else value
            )
            rule = field.metadata.get("rule")
            suffix = f"; {rule.text}" if rule else ""
            yield f"    {prefix + name} [{shown}]\n        {field.metadata['help']}{suffix}"
