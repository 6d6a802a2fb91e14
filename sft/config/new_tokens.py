"""Read ``model.new_tokens``: a list or a mapping of tokens, or a file of either."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from sft.config.plain import read_json, read_lines
from sft.config.rules import written
from sft.errors import ConfigError, Problem

NAME = "model.new_tokens"
LARGEST = 1 << 16  # new tokens; more than any model gets beside its vocabulary
EXAMPLE = '["<think>","</think>"]'


def read_new_tokens(given: Any) -> list[str] | dict[str, str] | None:
    """Read the value of ``model.new_tokens``: a list, a mapping, or the name of a file of either.

    Args:
        given: The value; a text is the name of a file. A .json or .yaml file holds a list or a
            mapping, any other file a token on each line.

    Returns:
        The tokens, or their descriptions by token; None if none is added.

    Raises:
        ConfigError: The file cannot be read, or a token or a description is not a text.
    """
    values = _content(given) if isinstance(given, str) else given
    if not values:
        return None
    if not isinstance(values, list | dict):
        rule = "must be a list of tokens, {TOKEN: DESCRIPTION}, or a file of either"
        raise ConfigError([Problem(written(NAME, given), rule, f"{NAME}={EXAMPLE}")])
    if found := list(_faults(values)):
        raise ConfigError(found)
    return values


def _content(name: str) -> Any:
    path = Path(name)
    if not name:
        raise ConfigError([Problem(f"{NAME}=", "has no value", f"{NAME}={EXAMPLE}")])
    if not path.is_file():
        fix = f"'{NAME}=[\"{name}\"]' for this token, or {NAME}=FILE"
        raise ConfigError([Problem(f"{NAME}={name}", "there is no such file", fix)])
    try:
        if path.suffix == ".json":
            return read_json(path)
        lines = read_lines(path)
        if path.suffix in (".yaml", ".yml"):
            return yaml.safe_load("\n".join(lines))
        return [line.strip() for line in lines if line.strip()]
    except (ValueError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        fix = f"{NAME}=FILE, of UTF-8 text"
        raise ConfigError([Problem(f"{NAME}={name}", f"cannot be read: {reason}", fix)]) from error


def _faults(values: list[Any] | dict[Any, Any]) -> Iterator[Problem]:
    """Yield the tokens that no tokenizer can hold, and the descriptions that say nothing."""
    if len(values) > LARGEST:
        yield Problem(f"{NAME} has {len(values):,} tokens", f"at most {LARGEST:,}", "fewer tokens")
        return
    seen: set[str] = set()
    for token in values:
        shown = f"{NAME}: {token!r}"
        if not isinstance(token, str):
            yield Problem(shown, "a token must be a text", f'"{token}", in quotes')
        elif token != token.strip() or not token:
            rule = "a token must be a text without white space at its beginning or end"
            yield Problem(shown, rule, repr(token.strip()) if token.strip() else "leave it out")
        elif token in seen:
            yield Problem(shown, "is named twice", "name it once")
        else:
            seen.add(token)
    for token, text in values.items() if isinstance(values, dict) else ():
        if text is not None and not (isinstance(text, str) and text.strip()):
            rule = f"its description {text!r} must be a text, or null for the mean of all rows"
            yield Problem(f"{NAME}: {token!r}", rule, f"{NAME}={EXAMPLE}, without descriptions")
