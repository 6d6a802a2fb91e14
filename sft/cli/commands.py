"""The commands of sft, by name."""

from __future__ import annotations

import importlib
from typing import Any

COMMANDS = {
    "train": "sft.train",
    "data": "sft.data.__main__",
    "import": "sft.convert.__main__",
    "generate": "sft.generate",
    "merge": "sft.merge.__main__",
    "report": "sft.report.__main__",
    "runs": "sft.runs",
    "prove": "sft.prove",
}


def command(name: str) -> Any:
    """Import a command; its libraries are imported only when it runs."""
    return importlib.import_module(COMMANDS[name]).main
