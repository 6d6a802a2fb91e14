"""How a setting is declared, what is known of it, and what was chosen for it."""

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


@dataclass(frozen=True)
class Choice:
    """The value that a setting has in a run.

    Attributes:
        setting: The setting's full name, such as ``model.lm_head``.
        value: What the run uses, as the setting would be given it; never ``auto``.
        reason: Why, as a clause for the log.
    """

    setting: str
    value: Any
    reason: str


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
    called: tuple[str, ...] = (),
    example: str | None = None,
) -> Any:
    """Declare a field of a section; None is always legal.

    Args:
        default: Of the field.
        help: One line that describes it.
        rule: What a value must satisfy.
        changes_training: Whether the trained weights depend on it, beyond the order of
            floating-point sums. A run that is resumed must have the same value.
        ours: Whether it is unknown to the upstream class of its section, or must not be passed to
            it because we do what it asks for.
        in_data_key: Whether prepared samples depend on it, so that samples in the cache are used
            only with the same value. Read for settings of the dataset section.
        decides: Upstream fields that this setting decides, such as ``train.bf16``; the section's
            ``extra`` refuses them.
        called: Names of the same thing in other tools or older releases.
        example: An override that shows its use in a fix; None: the setting with its default.
    """
    metadata = {
        "help": help,
        "rule": rule,
        "changes_training": changes_training,
        "ours": ours,
        "in_data_key": in_data_key,
        "decides": decides,
        "called": called,
        "example": example,
    }
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def fields_of(node: Any) -> Iterable[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (name, field, value) of a section's settings."""
    for item in dataclasses.fields(node):
        yield item.name, item, getattr(node, item.name)


def declared(schema: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """Yield (full name, field) of every setting of a schema, sections included."""
    for item in dataclasses.fields(schema):
        if isinstance(item.default_factory, type) and dataclasses.is_dataclass(
            item.default_factory
        ):
            yield from declared(item.default_factory, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, item


def example_of(name: str, item: dataclasses.Field[Any]) -> str:
    """Write an override that shows how a setting is used."""
    return item.metadata["example"] or written(name, default_of(item))


def named(schema: type, **facts: bool) -> frozenset[str]:
    """Name the settings of which these facts hold: ``named(TrainConfig, ours=False)``."""
    return frozenset(
        name
        for name, item in declared(schema)
        if all(item.metadata[fact] is value for fact, value in facts.items())
    )


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Give a field's default, also where a factory makes it."""
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


def typed(value: Any) -> str:
    """Write a value as one types it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def written(key: str, value: Any) -> str:
    """Write a setting as one types it."""
    return f"{key}={typed(value)}"


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
