"""Find a chat template (Jinja text, a file, one that TRL ships, a tokenizer's); why one fails."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANY_LENGTH = 1 << 20  # characters of a text that no template is refused for
INFLATED = 100  # times the conversation and the template together


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
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            fix = "template.chat_template=FILE.jinja, with text in UTF-8"
            raise DataError(f"{name} cannot be read: {error}\n    fix: {fix}") from error
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


def source_of(tokenizer: PreTrainedTokenizerBase, tools: Any) -> str:
    """Return the Jinja text of a tokenizer's template; there may be another one for tools.

    Raises:
        DataError: There are several by name, and none is the default.
    """
    try:
        return str(tokenizer.get_chat_template(None, tools))
    except ValueError as error:
        raise DataError(
            f"the tokenizer's chat templates cannot be used: {str(error).splitlines()[0]}\n"
            "    fix: template.chat_template=FILE.jinja"
        ) from error


def require_length(text: str, given: int) -> None:
    """Refuse a text that a template has inflated, as ``tojson(indent=100000000)`` does.

    Args:
        text: The rendered conversation.
        given: Characters of the conversation and of the template.

    Raises:
        ModelError: The text is much longer. The next conversation's would be, too.
    """
    if len(text) > max(ANY_LENGTH, INFLATED * given):
        raise ModelError(
            f"the chat template writes {len(text):,} characters for a conversation of at most "
            f"{given:,}\n    fix: template.chat_template=FILE.jinja, which writes less"
        )
