"""Exceptions that users see. Each message gives what is wrong, the rule, and a fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

FEW = 3  # names in a message


@dataclass(frozen=True)
class Problem:
    """A problem of one setting.

    Attributes:
        setting: The setting as the user wrote or would write it, such as ``lora.r=0``.
        rule: The rule that the setting violates, as a sentence without a full stop. Its subject may
            be the setting.
        fix: An override or a command that solves the problem.
    """

    setting: str
    rule: str
    fix: str

    def __str__(self) -> str:
        # A value with a line break must not look like the next line of the message.
        setting, rule = (text.replace("\n", "\\n") for text in (self.setting, self.rule))
        return f"{setting}\n    {rule}\n    fix: {self.fix}"


class SftError(Exception):
    """An error that the user can correct; shown as a message without a traceback.

    ``result`` is what the command has found nevertheless; ``--json`` prints it beside the error.
    """

    exit_code = 1
    result: Mapping[str, object] = {}


class ConfigError(SftError):
    """One or more settings cannot be used; ``problems`` has every problem that was found."""

    exit_code = 2

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        head = "1 setting is refused" if count == 1 else f"{count} settings are refused"
        super().__init__("\n\n".join([head, *map(str, self.problems)]))


class ModelError(SftError):
    """The base model or its tokenizer cannot be loaded or adapted."""


class DataError(SftError):
    """The data cannot be read, or a row does not fit the template."""


class SourceError(DataError):
    """A path of rows cannot be used; the fix is another value of the setting that names it.

    Args:
        rule: What is wrong.
        value: The value for the setting, and maybe a remark.
        setting: The setting, as the user would write it.
    """

    def __init__(self, rule: str, value: str, setting: str = "dataset.path") -> None:
        super().__init__(f"{rule}\n    fix: {setting}={value}")
        self.rule, self.value = rule, value

    def of(self, setting: str) -> SourceError:
        """Return the error for a path that a different setting names."""
        return SourceError(self.rule, self.value, setting)


class RunError(SftError):
    """The run cannot start or continue: its folder has a different run, or its ranks disagree."""


class Stopped(SftError):
    """The run was asked to stop, and has saved its state."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CheckpointError(SftError):
    """A checkpoint is missing, incomplete, or from a different kind of run."""


class MergeError(SftError):
    """The adapter cannot be merged, or the merged model is not the one that was trained."""


def few(names: Iterable[object]) -> str:
    """Return the first names, and how many there are beside them."""
    found = list(map(str, names))
    return ", ".join(found[:FEW]) + f" and {len(found) - FEW} more" * (len(found) > FEW)
