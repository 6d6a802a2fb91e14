"""What becomes of a key of another tool's configuration: the entries of the tables of keys.

The files ``foreign_*.py`` hold one table per tool. ``sft import`` converts a file by them, and
``names.suggest`` answers a mistyped setting by them, so that both give the same settings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from sft.config.grammar import hydra_text

# What becomes of a key.
CONVERTED = "converted"  # into settings of the same meaning
DEFAULT = "default"  # left out, because sft does so anyway
DIFFERS = "differs"  # converted, but the meaning is not quite the same; or done in another way
NOT_OURS = "not ours"  # left out, with the reason
UNKNOWN = "unknown"  # no table has it
OFF = (False, "none", "no", "off", "false", "disabled")


@dataclass(frozen=True)
class Outcome:
    """What becomes of a key with its value.

    Attributes:
        kind: One of the constants above.
        settings: Values by setting, or options by group, such as {"quantization": "nf4"}.
        note: The difference or the reason, as a clause.
        also: Settings that make an imported run behave as the other tool's; a hint leaves them out,
            because the note names them.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    also: Mapping[str, Any] = field(default_factory=dict)

    def words(self) -> str:
        """Return the settings as words of the command line."""
        return " ".join(f"{key}={hydra_text(value)}" for key, value in self.settings.items())


@dataclass(frozen=True)
class Key:
    """A key of another tool.

    Attributes:
        kind: What becomes of it with most values.
        becomes: Returns what becomes of it with a value that is not empty.
        ours: The settings, as the printed table shows them.
        note: What the printed table says.
        example: A value that is converted; None: any of the setting's type.
        secret: Whether the value must never be shown.
    """

    kind: str
    becomes: Callable[[Any], Outcome]
    ours: str = ""
    note: str = ""
    example: Any = None
    secret: bool = False

    def of(self, value: Any) -> Outcome:
        """Return what becomes of the key with this value."""
        if value is None or (isinstance(value, str | list | dict) and not value):
            return Outcome(DEFAULT, note="is empty, and sets nothing")
        return self.becomes(value)


def settings_of(words: str) -> dict[str, Any]:
    """Read words such as ``lora=none train=full``; values are read as YAML."""
    pairs = (word.partition("=") for word in words.split())
    return {key: yaml.safe_load(value) for key, _, value in pairs}


def to(
    setting: str,
    note: str = "",
    change: Callable[[Any], Any] | None = None,
    also: str = "",
    example: Any = None,
    kind: str = "",
) -> Key:
    """Convert a key to a setting, whose meaning differs if there is a note.

    Args:
        setting: The setting's full name.
        note: How the meaning differs.
        change: Returns our value, or an Outcome for a value that cannot be converted.
        also: Words of further settings that an import sets.
        example: A value that is converted.
        kind: What becomes of the key, if the note is no difference.
    """
    kind = kind or (DIFFERS if note else CONVERTED)

    def becomes(value: Any) -> Outcome:
        ours = change(value) if change else value
        if isinstance(ours, Outcome):
            return ours
        return Outcome(kind, {setting: ours}, note, settings_of(also))

    return Key(kind, becomes, setting, note, example)


def by(
    values: Mapping[Any, str | Outcome],
    note: str = "",
    rest: Key | None = None,
    example: Any = None,
) -> Key:
    """Convert a key by its value.

    Args:
        values: Words of settings for each value; "": the value asks for what sft does anyway.
        note: How the meaning of the words differs.
        rest: What becomes of other values; None: they are not ours.
        example: A value that is converted; None: the first of the values.
    """
    kind = DIFFERS if note else CONVERTED
    known = {str(value).lower(): found for value, found in values.items()}

    def becomes(value: Any) -> Outcome:
        text = str(value).lower()
        if text in ("0", "1") and text not in known:
            text = str(text == "1").lower()
        found = known.get(text)
        if isinstance(found, Outcome):
            return found
        if found is not None:
            return Outcome(kind, settings_of(found), note) if found else same()
        return rest.of(value) if rest else off(f"sft has nothing for the value {value}")

    words = [f"{str(value).lower()}: {item}" for value, item in values.items() if item]
    shown = [text for text in words if "Outcome(" not in text]
    shown += [rest.ours] if rest and rest.ours else []
    usual = (value for value, item in values.items() if isinstance(item, str) and item)
    example = next(usual, "") if example is None else example
    return Key(kind, becomes, "; ".join(shown), note, example)


def fn(ours: str, becomes: Callable[[Any], Outcome], note: str = "", example: Any = None) -> Key:
    """Convert a key by a function of its value."""
    return Key(DIFFERS if note else CONVERTED, becomes, ours, note, example)


def done(note: str) -> Key:
    """Leave a key out, because sft does so anyway, whatever the value."""
    return Key(DEFAULT, lambda value: same(note), "", note)


def no(reason: str, *harmless: Any) -> Key:
    """Leave a key out, because it is not ours; ``false`` and ``harmless`` ask for nothing."""
    usual = {str(item).lower() for item in (*OFF, *harmless)}

    def becomes(value: Any) -> Outcome:
        return same("asks for nothing") if str(value).lower() in usual else off(reason)

    return Key(NOT_OURS, becomes, "", reason)


def secret(reason: str) -> Key:
    """Leave a key out whose value must never be shown or written."""
    return Key(NOT_OURS, lambda value: off(reason), "", reason, secret=True)


def same(note: str = "sft does so anyway") -> Outcome:
    """Return the outcome of a key that sft does not need."""
    return Outcome(DEFAULT, note=note)


def off(reason: str) -> Outcome:
    """Return the outcome of a key that is not ours."""
    return Outcome(NOT_OURS, note=reason)


def listed(value: Any) -> list[Any]:
    """Return a list of a list, a tuple, or text with commas."""
    if isinstance(value, str):
        return [item.strip() for item in value.split(",") if item.strip()]
    return list(value) if isinstance(value, list | tuple) else [value]
