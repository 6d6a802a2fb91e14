"""All tables of bad inputs."""

from __future__ import annotations

from hostile import files, models, runs, words
from hostile.case import Case


def in_process() -> list[Case]:
    """List the inputs that are words alone."""
    return words.cases()


def with_files() -> list[Case]:
    """List the inputs that need files or an environment, and a process of their own."""
    return [*files.cases(), *models.cases(), *runs.cases()]
