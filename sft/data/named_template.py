"""Find a chat template by name (Jinja text, a file, or one that TRL ships); why one fails."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from sft.errors import DataError


def named_template(name: str) -> str:
    """Return a chat template's text: the Jinja given, a file's, or that of one that TRL ships.

    Raises:
        DataError: There is no such file or template.
    """
    if "{%" in name or "{{" in name:
        return name
    if name.endswith(".jinja"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"there is no file {name}\n    fix: template.chat_template=FILE.jinja")
        return path.read_text(encoding="utf-8")
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "chat_templates"
    path = folder / f"{name}.jinja"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.jinja")))
        raise DataError(
            f"there is no chat template {name}; there are {known}\n"
            "    fix: template.chat_template=FILE.jinja"
        )
    return path.read_text(encoding="utf-8")


def refusal(error: Exception) -> DataError:
    """Return the error of a conversation that a template cannot render."""
    reason = str(error).strip() or type(error).__name__
    if isinstance(error, MemoryError):  # which has no message of its own
        reason = "it needs more memory than this process can get"
    elif isinstance(error, RecursionError):
        reason = f"its macros call one another more than {sys.getrecursionlimit():,} deep"
    return DataError(
        f"the chat template refuses the conversation: {reason}\n"
        "    fix: correct the conversation, or the template, which training takes from "
        "template.chat_template=FILE.jinja"
    )
