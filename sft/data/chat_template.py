"""Render conversations with one tokenizer's Jinja chat template."""

from __future__ import annotations

import re
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.segment import TOKEN_BREAK, require_no_break
from sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None


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


class ChatTemplate:
    """One tokenizer's chat template and control tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        self.tokenizer = tokenizer
        if chat_template is not None:
            # Set it on the tokenizer, which is saved with the adapter.
            tokenizer.chat_template = named_template(chat_template)
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template\n"
                "    fix: template=plain-chat, template=completion or template=alpaca, or an "
                "instruction-tuned model"
            )

    @cached_property
    def specials(self) -> re.Pattern[str] | None:
        """Match any special token; None if the tokenizer has none."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        # Longest first, so that no token matches as the beginning of a longer one.
        names = sorted((token.content for token in tokens if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def guarded(self, messages: list[Message]) -> list[Message]:
        """Insert TOKEN_BREAK into control tokens that the data holds as text."""
        specials = self.specials

        def guard(value: Any) -> Any:
            if not isinstance(value, str):
                return value
            require_no_break(value)
            if specials is None:
                return value
            return specials.sub(lambda found: found[0][0] + TOKEN_BREAK + found[0][1:], value)

        return [
            {
                key: guard(value) if key in ("content", "reasoning_content") else value
                for key, value in message.items()
                if key != "train"
            }
            for message in messages
        ]

    def rendered(
        self, messages: list[Message], tools: Tools, generation: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text and the spans that ``{% generation %}`` marks, if any."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(None, tools)
        marked = not generation and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=generation,
                return_assistant_tokens_mask=marked,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # the template is arbitrary Jinja: it may raise anything
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return str(texts[0]), [tuple(span) for span in spans[0]] if marked else []

    def up_to_end_of_turn(self, text: str) -> str:
        """Remove what follows the token that ends the turn, such as newlines or a second EOS."""
        specials = self.specials
        end = None
        if specials is not None:
            pattern = specials.pattern
            end = re.fullmatch(rf"(.*?(?:{pattern}))(?:\s|{pattern})*", text, re.DOTALL)
        if end is None:
            raise DataError(
                "the chat template ends an assistant turn with no special token, so the model "
                "would never learn to stop\n    fix: template=completion, or a different "
                "template.chat_template"
            )
        return end[1]
