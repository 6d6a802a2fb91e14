"""The command line's overrides, made such that Hydra takes them; what is wrong is collected."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sft import upstream
from sft.config import CONF_DIR
from sft.errors import ConfigError, Problem

# What other tools call an option.
MEANT = {
    ("quantization", "4bit"): "quantization=nf4",
    ("quantization", "int4"): "quantization=nf4",
    ("quantization", "8bit"): "quantization=int8",
    ("lora", "full"): "lora=none",
}


def is_sweep(override: str) -> bool:
    """Tell whether an override gives several values."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed: bool = OverridesParser.create().parse_override(override).is_sweep_override()
    return parsed


def groups(config_dir: str | None) -> dict[str, set[str]]:
    """List the config groups and their options, ours and the user's."""
    found: dict[str, set[str]] = {}
    for root in (CONF_DIR, *([Path(config_dir)] if config_dir else [])):
        for file in root.rglob("*.yaml"):
            group = file.parent.relative_to(root).as_posix()
            if group != ".":
                found.setdefault(group, set()).add(file.stem)
    return found


def forced(
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
    ours, known = groups(None), groups(config_dir)
    parser = OverridesParser.create()
    given: set[str] = set()
    for text in overrides:
        try:
            parsed = parser.parse_override(text)
        except HydraException as error:
            rule = str(error).splitlines()[0] if str(error) else "cannot be parsed"
            key, equals, value = text.partition("=")
            quoted = f"""quote the value twice: "{key}='{value}'\""""
            problems.append(Problem(text, rule, quoted if equals else "write it as key=value"))
            continue
        key = parsed.key_or_group
        if key in given:
            problems.append(Problem(text, f"{key} is given twice", "keep one of them"))
            continue
        given.add(key)
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
        elif key not in known:
            yield f"++{text.lstrip('+')}"
        else:
            unknown = [option for option in _options(parsed) if option not in known[key]]
            problems += [_no_option(key, option, known[key]) for option in unknown]
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
    if option == "null" and "none" in known:
        hint = f"{group}=none"
    elif f"stage{option}" in known:
        hint = f"{group}=stage{option}"
    elif (group, option) in MEANT:
        hint = MEANT[group, option]
    elif "/" in option and group == "model":
        hint = f"model=hf model.name_or_path={option}"
    elif "/" in option or option.endswith((".jsonl", ".json", ".csv")):
        hint = f"dataset=jsonl dataset.path={option}"
    elif not hint.startswith("did"):
        hint = "choose one of them"
    rule = f"{group} has no option {option}; it has {', '.join(sorted(known))}"
    return Problem(f"{group}={option}", rule, hint)
