"""How a setting is declared, written, and held against its own rule."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sft.errors import Problem


@dataclass(frozen=True)
class Rule:
    """What a setting's value must satisfy, as a sentence and as a test."""

    text: str
    holds: Callable[[Any], bool]


def at_least(bound: float) -> Rule:
    """Allow the bound and what is above it."""
    return Rule(f"must be at least {bound}", lambda value: value >= bound)


def above(bound: float) -> Rule:
    """Allow what is above the bound."""
    return Rule(f"must be greater than {bound}", lambda value: value > bound)


def within(low: float, high: float) -> Rule:
    """A half-open range: ``low`` is allowed and ``high`` is not."""
    return Rule(f"must be at least {low} and less than {high}", lambda value: low <= value < high)


def share() -> Rule:
    """A share of something, which is neither nothing nor more than all."""
    return Rule("must be greater than 0 and at most 1", lambda value: 0 < value <= 1)


def one_of(*choices: str | bool) -> Rule:
    """Allow a few names, or a switch."""
    names = ", ".join(str(choice).lower() for choice in choices)
    return Rule(f"must be one of {names}", lambda value: value in choices)


def setting(default: Any, help: str, rule: Rule | None = None) -> Any:
    """Declare a field with its one-line description and its rule; None is always legal."""
    metadata = {"help": help, "rule": rule}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def fields_of(node: Any) -> Iterable[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (name, field, value) of a section's settings."""
    for item in dataclasses.fields(node):
        yield item.name, item, getattr(node, item.name)


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Give a field's default, also where a factory makes it."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def written(key: str, value: Any) -> str:
    """Write a setting as one types it."""
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    return f"{key}={value}"


def rule_problems(node: Any, prefix: str = "") -> Iterator[Problem]:
    """Apply each field's own rule, section by section."""
    for name, item, value in fields_of(node):
        if hasattr(value, "__dataclass_fields__"):
            yield from rule_problems(value, f"{prefix}{name}.")
            continue
        rule = item.metadata.get("rule")
        key = prefix + name
        if isinstance(value, float) and not math.isfinite(value):
            yield Problem(
                written(key, value), "must be a finite number", written(key, default_of(item))
            )
        elif rule is not None and value is not None and not rule.holds(value):
            yield Problem(written(key, value), rule.text, written(key, default_of(item)))
