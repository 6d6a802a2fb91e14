"""Write and read values in the grammar of Hydra's overrides."""

from __future__ import annotations

import json
import math
import re
import shlex
from typing import Any

PLAIN_WORD = re.compile(r"[A-Za-z_][\w./-]*", re.ASCII)  # Hydra and YAML read it as the same text
KEYWORDS = {"null", "true", "false", "nan", "inf"}
# What a shell does not leave as it is outside quotes; braces with a comma make several words.
EXPANDED = re.compile(r"[\s;&|<>`$*?!()#~\"\\]|\{[^{}]*,")


def hydra_text(value: Any) -> str:
    """Return a value in Hydra's grammar, or JSON for a mapping whose keys the grammar excludes."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if isinstance(value, str):
        if PLAIN_WORD.fullmatch(value) and value.lower() not in KEYWORDS:
            return value
        return str(QuotedString(value, Quote.single).with_quotes())
    if isinstance(value, list):
        return f"[{','.join(map(hydra_text, value))}]"
    if isinstance(value, dict):
        if not all(isinstance(key, str) and PLAIN_WORD.fullmatch(key) for key in value):
            return json.dumps(value, ensure_ascii=False)
        return "{" + ",".join(f"{key}:{hydra_text(item)}" for key, item in value.items()) + "}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def shell_word(key: str, value: Any, is_text: bool) -> str:
    """Return ``key=value`` as it is typed in a shell, with quotes if the shell needs them.

    Args:
        key: A setting or a group.
        value: Its value.
        is_text: Whether the setting takes its value as it is typed.
    """
    word = f"{key}={hydra_text(value)}"
    if not EXPANDED.search(re.sub(r"'[^'\\]*'", "", word)):
        found = shlex.split(word)[0]
        text = found.removeprefix(f"{key}=")
        if _read(found, text, is_text) == value or (is_text and not isinstance(value, str)):
            return word
    return f'"{word}"' if not set(word) & set('"$`\\!') else shlex.quote(word)


def _read(word: str, text: str, is_text: bool) -> Any:
    """Read a word as a command does; what cannot be read is equal to nothing."""
    import yaml

    if is_text:
        return None if text == "null" else unquoted(text)
    parsed = parse(word)
    try:
        read = from_yaml(text) if parsed is None else parsed.value()
    except yaml.YAMLError:
        return math.nan
    return math.nan if parsed is not None and parsed.is_sweep_override() else read


def parse(text: str) -> Any:
    """Parse ``key=value``; return None if it is not in the grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def unclosed(text: str) -> str:
    """Return the parentheses that ``key=value`` lacks at its end; "" if they do not complete it."""
    missing = ")" * (text.count("(") - text.count(")"))
    return missing if missing and parse(text + missing) is not None else ""


def from_yaml(text: str) -> Any:
    """Parse a value as YAML, where ``{a:b}`` needs no space after the colon, as in Hydra's grammar.

    Raises:
        yaml.YAMLError: It is not YAML.
    """
    import yaml

    value = yaml.safe_load(text)
    if not isinstance(value, dict):
        return value
    pairs = {}
    for key, item in value.items():
        if item is None and ":" in str(key):
            key, _, item = str(key).partition(":")
            item = yaml.safe_load(item)
        pairs[key] = item
    return pairs


def unquoted(text: str) -> str:
    """Remove the quotes if one pair encloses the whole value."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return text
    from hydra.core.override_parser.types import QuotedString

    value = getattr(parse(f"key={text}"), "_value", None)
    return str(value.text) if isinstance(value, QuotedString) else text


def is_list(text: str) -> bool:
    """Check for a sweep's values separated by commas, without functions, brackets or quotes."""
    return "," in text and not set(text) & set("()[]{}'\"")


def options_of(parsed: Any) -> list[str]:
    """List the options that an override chooses for its group; a sweep chooses several."""
    from hydra.core.override_parser.types import ChoiceSweep

    value = parsed.value()
    chosen = value.list if isinstance(value, ChoiceSweep) else [value]
    return ["null" if item is None else str(item) for item in chosen]


def number_of(parsed: Any) -> float | None:
    """Count the values that an override gives a sweep, without listing them.

    Returns:
        None if they cannot be listed: an interval, or a range that does not end.
    """
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep

    value = parsed.value()
    if isinstance(value, IntervalSweep):
        return None
    if isinstance(value, ChoiceSweep):
        return len(value.list)
    if not isinstance(value, RangeSweep):
        return 1
    start, stop, step = (float(item or 0) for item in (value.start, value.stop, value.step))
    if not step or not all(map(math.isfinite, (start, stop, step))):
        return None
    return max(0.0, math.ceil((stop - start) / step))
