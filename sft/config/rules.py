"""How a setting is declared, the rule for its value, and the value that a run chose for it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from sft.errors import Problem


class Dataclass(Protocol):
    """Any dataclass, as ``dataclasses.fields`` takes it: the schema of a command's settings."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


@dataclass(frozen=True)
class Rule:
    """A condition on a setting's value, as a sentence and as a function."""

    text: str
    holds: Callable[[Any], bool]
    choices: tuple[str | bool, ...] = ()


def at_least(bound: float) -> Rule:
    """Allow the bound and larger values."""
    return Rule(f"must be at least {bound}", lambda value: value >= bound)


def between(low: float, high: float) -> Rule:
    """Allow both bounds and what is between them."""
    return Rule(f"must be from {low} to {high}", lambda value: low <= value <= high)


def above(bound: float) -> Rule:
    """Allow values larger than the bound."""
    return Rule(f"must be greater than {bound}", lambda value: value > bound)


def within(low: float, high: float) -> Rule:
    """Allow a half-open range: ``low`` is allowed and ``high`` is not."""
    return Rule(f"must be at least {low} and less than {high}", lambda value: low <= value < high)


def share() -> Rule:
    """Allow fractions above 0, up to and including 1."""
    return Rule("must be greater than 0 and at most 1", lambda value: 0 < value <= 1)


def each(rule: Rule) -> Rule:
    """Apply a rule to each value of a mapping."""
    return Rule(
        f"each value {rule.text}", lambda value: all(rule.holds(item) for item in value.values())
    )


def one_of(*choices: str | bool) -> Rule:
    """Allow only these names or booleans."""
    names = ", ".join(str(choice).lower() for choice in choices)
    return Rule(f"must be one of {names}", lambda value: value in choices, choices)


# A kernel of the hub, as Transformers takes it: OWNER/NAME, @REVISION, :FUNCTION.
HUB_KERNEL = re.compile(r"[^/:@\s]+/[^/:@\s]+(@[^/:@\s]+)?(:[^/:@\s]+)?")


def or_matching(pattern: re.Pattern[str], rule: Rule) -> Rule:
    """Allow texts that match a pattern, besides the values of a rule."""
    return Rule(
        rule.text, lambda value: rule.holds(value) or bool(pattern.fullmatch(value)), rule.choices
    )


@dataclass(frozen=True)
class Choice:
    """The value that a setting has in a run.

    Attributes:
        setting: The setting's full name, such as ``model.lm_head``.
        value: The value that the run uses, as a user would write it; never ``auto``.
        reason: The reason for the value, as a clause for the log.
    """

    setting: str
    value: Any
    reason: str

    def record(self) -> dict[str, dict[str, Any]]:
        """Return value and reason by the setting's name, for ``run.json``."""
        return {self.setting: {"value": self.value, "reason": self.reason}}


LARGEST = 1 << 40  # for any number: more overflow the libraries' integers
LARGEST_SEED = (1 << 32) - 1  # NumPy's
LARGEST_RANK = 1 << 16  # more than the width of any layer of a model
LONGEST_NAME = 239  # bytes: the 255 of file systems, less our longest suffix, .PID.partial
AS_SET = "as set"  # the reason of a value that the user gave


def setting(
    default: Any,
    help: str,
    rule: Rule | None = None,
    *,
    changes_training: bool = True,
    ours: bool = False,
    in_data_key: bool = True,
    decides: tuple[str, ...] = (),
    path: str | None = None,
    null: Any = None,
) -> Any:
    """Declare a field of a section; the value None always passes the rule.

    Args:
        default: The default value.
        help: A line that describes the setting.
        rule: The condition on its value.
        changes_training: Whether the trained weights depend on the setting, beyond the order of
            floating-point sums. A resumed run must have the same value.
        ours: Whether the upstream class of the section does not get the setting, because the class
            does not know it or because our code does what the setting asks for.
        in_data_key: Whether prepared samples depend on the setting, so that cached samples are used
            only with the same value. Read for settings of the dataset section only.
        decides: Upstream fields that this setting decides, such as ``train.bf16``; the ``extra`` of
            their section refuses them.
        path: ``read`` or ``written`` if the value is the path of a local file or folder, so that
            ``~/`` at its beginning is the home folder.
        null: The value that null stands for, in a setting that is not null itself: "off". A list,
            a mapping or false that is the default needs none.
    """
    metadata = {
        "help": help,
        "rule": rule,
        "changes_training": changes_training,
        "ours": ours,
        "in_data_key": in_data_key,
        "decides": decides,
        "path": path,
        "null": null,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def fields_of(node: Any) -> Iterable[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (name, field, value) of a section's settings."""
    for item in dataclasses.fields(node):
        yield item.name, item, getattr(node, item.name)


def declared(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield (full name, field) of every setting of a schema and its sections."""
    for item in dataclasses.fields(schema):
        if isinstance(item.default_factory, type) and dataclasses.is_dataclass(
            item.default_factory
        ):
            yield from declared(item.default_factory, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def named(schema: type, **facts: bool) -> frozenset[str]:
    """Return the names of settings with this metadata: ``named(TrainConfig, ours=False)``."""
    return frozenset(
        name
        for name, item in declared(schema)
        if all(item.metadata[fact] is value for fact, value in facts.items())
    )


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Return a field's default, from its factory if it has one."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def typed(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def written(key: str, value: Any) -> str:
    """Return a setting as it is typed on the command line."""
    return f"{key}={typed(value)}"


def _storable(text: str) -> bool:
    """Check that a text can be in a file and in a path: no null character, and valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def name_fault(text: str) -> str:
    """Return the rule that a text violates as the name of a folder; "" if it can be one."""
    if Path(text).name != text or text in ("", ".."):
        return "must be a name without a folder"
    return _too_long(text)


def _too_long(path: str) -> str:
    """Return the rule that a path violates by a name that no file system takes; "" if none does."""
    longest = max(len(name.encode(errors="replace")) for name in path.split("/"))
    if longest <= LONGEST_NAME:
        return ""
    return f"a name has {longest} bytes and must have at most {LONGEST_NAME}"


def _numbers(value: Any) -> Iterator[float]:
    """Yield the floating-point numbers of a value, within lists and mappings too."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def rule_problems(node: Any, prefix: str = "") -> Iterator[Problem]:
    """Check each value against its field's rule, section by section."""
    for name, item, value in fields_of(node):
        if hasattr(value, "__dataclass_fields__"):
            yield from rule_problems(value, f"{prefix}{name}.")
            continue
        rule = item.metadata.get("rule")
        key, default = prefix + name, written(prefix + name, default_of(item))
        if isinstance(value, str) and not _storable(value):
            yield Problem(written(key, value), "contains bytes that are not text", "use UTF-8")
        elif item.metadata.get("path") == "written" and "://" in str(value):
            rule_text = "must be a local path: sft writes to no URL"
            yield Problem(written(key, value), rule_text, f"{key}=PATH on this machine")
        elif item.metadata.get("path") == "written" and (fault := _too_long(str(value))):
            yield Problem(written(key, value), fault, f"{key}=PATH with shorter names")
        elif not all(map(math.isfinite, _numbers(value))):
            yield Problem(written(key, value), "must be a finite number", default)
        elif isinstance(value, int | float) and abs(value) > LARGEST:
            yield Problem(written(key, value), f"must be at most {LARGEST:,}", default)
        elif rule is not None and value is not None and not rule.holds(value):
            usable = default_of(item)
            if isinstance(value, dict):  # the rule is of each value
                usable = {name: one for name, one in value.items() if rule.holds({name: one})}
            yield Problem(written(key, value), rule.text, written(key, usable))
