"""The commands of sft, by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sft.cli.command import Command

COMMANDS = {
    "train": "sft.train",
    "data": "sft.data.__main__",
    "generate": "sft.generate",
    "merge": "sft.merge.__main__",
    "prove": "sft.prove",
}


def command(name: str) -> Command[Any]:
    """Import a command; its libraries are imported only when it runs."""
    found: Command[Any] = importlib.import_module(COMMANDS[name]).main
    return found
