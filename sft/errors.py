"""What can go wrong, by whose hand: each error says what is wrong, the rule, and the fix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a setting.

    Attributes:
        setting: What the user wrote or would write, such as ``lora.r=0``.
        rule: What holds and does not hold here, as a sentence without a full stop.
        fix: An override or a command that mends it.
    """

    setting: str
    rule: str
    fix: str

    def __str__(self) -> str:
        return f"{self.setting}\n    {self.rule}\n    fix: {self.fix}"


class SftError(Exception):
    """Something that the user can mend; shown as a message, without a traceback."""

    exit_code = 1


class ConfigError(SftError):
    """One or more settings cannot be used; carries every problem that was found."""

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


class RunError(SftError):
    """The run cannot start or go on: its folder is taken, or its ranks disagree."""


class Stopped(SftError):
    """The run was asked to stop, and saved what it had."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CheckpointError(SftError):
    """A checkpoint is missing, incomplete, or belongs to another kind of run."""


class MergeError(SftError):
    """The adapter cannot be merged, or the merged model is not the one that was trained."""
