"""Render conversations with one tokenizer's Jinja chat template."""

from __future__ import annotations

import datetime
import json
import re
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.data.named_template import named_template, refusal, require_length, source_of
from sft.data.segment import TOKEN_BREAK, as_text, control_of
from sft.errors import DataError, ModelError
from sft.limits import OutOfTime, TimeLimit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None

# Reasoning at the beginning of a content. Some models get the first tag with the prompt.
_TAGGED = re.compile(r"(\s*<think>)(.*?)(</think>)(.*)", re.DOTALL)
_CLOSED = re.compile(r"()((?:(?!<think>).)*?\n)(</think>)(\s.*|)", re.DOTALL)
LIMIT = 20  # seconds for one conversation; the longest of real data take less than one
RESERVED = ("messages", "tools", "documents", "add_generation_prompt")


def thought_of(message: Message) -> re.Match[str] | None:
    """Match the reasoning within an answer's content: begin, reasoning, end and the rest."""
    content: str = message["content"]
    if message["role"] != "assistant" or "</think>" not in content:
        return None
    return _TAGGED.fullmatch(content) or _CLOSED.fullmatch(content)


class Rendered(NamedTuple):
    """A rendered conversation, and the spans that ``{% generation %}`` marks, if any."""

    text: str
    marks: list[tuple[int, int]]


class ChatTemplate:
    """One tokenizer's chat template, its control tokens, and the form of message that it reads.

    Args:
        tokenizer: The tokenizer; it gets the chat template, and is saved with the adapter.
        chat_template: See ``named_template``; None: the tokenizer's own.
        kwargs: Values for the template's own switches, such as ``enable_thinking``.

    Attributes:
        date: The day that a template with ``strftime_now`` writes; None: today.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        if chat_template is not None:
            tokenizer.chat_template = named_template(chat_template)
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template\n"
                "    fix: template=plain-chat, template=completion or template=alpaca, or an "
                "instruction-tuned model"
            )
        self.kwargs = dict(kwargs or {})
        self.date: datetime.date | None = None
        for name in self.kwargs:
            if name in RESERVED or not re.search(rf"\b{re.escape(name)}\b", self.source(None)):
                raise DataError(
                    f"template.kwargs.{name}: the chat template reads no variable {name}\n"
                    f"    fix: '~template.kwargs.{name}', or a template.chat_template that reads it"
                )

    def source(self, tools: Tools) -> str:
        """Return the Jinja text."""
        return source_of(self.tokenizer, tools)

    @property
    def writes_date(self) -> bool:
        """Whether the template writes the current date."""
        return "strftime_now" in self.source(None)

    @cached_property
    def marks_answers(self) -> bool:
        """Whether the template marks what is trained with ``{% generation %}``."""
        return re.search(r"\{%-?\s*generation\s*-?%\}", self.source(None)) is not None

    @cached_property
    def control(self) -> re.Pattern[str]:
        """Match a control token: a special token, or an added token that the template writes."""
        given = self.tokenizer.chat_template
        source = "\n".join(given.values()) if isinstance(given, dict) else given
        return control_of(self.tokenizer, str(source))

    def guarded(self, messages: list[Message]) -> list[Message]:
        """Insert TOKEN_BREAK into the control tokens that messages hold as text.

        The tags around an answer's reasoning stay whole: templates look for them.
        """
        guarded = []
        for message in messages:
            made: Message = self.guarded_value(message)
            if thought := thought_of(message):
                begin, reasoning, end, answer = thought.groups()
                parts = (begin, self.guarded_value(reasoning), end, self.guarded_value(answer))
                made["content"] = "".join(parts)
            guarded.append(made)
        return guarded

    def guarded_value(self, value: Any) -> Any:
        """Insert TOKEN_BREAK into the control tokens in a value's texts, keys included."""
        if isinstance(value, str):
            return as_text(value, self.control)
        if isinstance(value, dict):
            items = value.items()
            return {self.guarded_value(key): self.guarded_value(item) for key, item in items}
        if isinstance(value, list):
            return [self.guarded_value(item) for item in value]
        return value

    def rendered(self, messages: list[Message], tools: Tools, generation: bool) -> Rendered:
        """Render a conversation, with or without the prompt that generation starts from.

        Raises:
            DataError: The template refuses the conversation.
            ModelError: It takes more than ``LIMIT`` seconds.
        """
        return self._rendered(self._adapted(messages), tools, generation)

    def _rendered(self, messages: list[Message], tools: Tools, generation: bool) -> Rendered:
        from transformers.utils.chat_template_utils import (
            _compile_jinja_template,
            render_jinja_template,
        )

        source = self.source(tools)
        marked = self.marks_answers and not generation
        if self.date is not None:
            compiled = _compile_jinja_template(source)
            compiled.globals["strftime_now"] = self.date.strftime
        try:
            with TimeLimit(LIMIT, often=True):
                texts, spans = render_jinja_template(
                    conversations=[messages],
                    tools=tools,
                    chat_template=source,
                    add_generation_prompt=generation,
                    return_assistant_tokens_mask=marked,
                    **{**self.tokenizer.special_tokens_map, **self.kwargs},
                )
        except OutOfTime:  # the template is at fault, not the row: the next one would take as long
            raise ModelError(
                f"the chat template took more than {LIMIT} s for one conversation\n"
                "    fix: template.chat_template=FILE.jinja, with a template that ends"
            ) from None
        except Exception as error:  # the template is arbitrary Jinja: it may raise anything
            raise refusal(error) from error
        # A template may write JSON in ASCII or Python's text of a list; both escape the character.
        text, escaped = str(texts[0]), json.dumps(TOKEN_BREAK)[1:-1]
        require_length(text, len(str((messages, tools, source))))
        marks = [(begin, end) for begin, end in spans[0]] if marked else []
        if escaped in text:
            before = [[text[:at].replace(escaped, TOKEN_BREAK) for at in mark] for mark in marks]
            marks = [(len(begin), len(end)) for begin, end in before]
            text = text.replace(escaped, TOKEN_BREAK)
        return Rendered(text, marks)

    def _adapted(self, messages: list[Message]) -> list[Message]:
        """Give contents, reasoning and arguments the form that the template reads."""
        if self._reads_reasoning:
            # A template that looks for the tags reads an empty pair of them as no reasoning.
            empty = "</think>" not in self.source(None)
            messages = [_with_reasoning(message, empty) for message in messages]
        if self._reads_parts:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                if message["content"]
                else message
                for message in messages
            ]
        if any(message.get("tool_calls") for message in messages) and self._prints_arguments:
            messages = [
                {**message, "tool_calls": [_with_text(call) for call in message["tool_calls"]]}
                if message.get("tool_calls")
                else message
                for message in messages
            ]
        return messages

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether a content must be a list of parts, as templates of image models read it."""

        def writes(content: Any) -> bool:
            try:
                text = self._rendered([{"role": "user", "content": content}], None, False).text
            except DataError:
                return False
            return "Zq0" in text

        return not writes("Zq0") and writes([{"type": "text", "text": "Zq0"}])

    @cached_property
    def _reads_reasoning(self) -> bool:
        """Whether the template writes the reasoning that a message holds beside its content."""
        answer: Message = {"role": "assistant", "content": "Zq0", "reasoning_content": "Zq1"}
        user: Message = {"role": "user", "content": "?"}
        try:
            text = self._rendered([user, answer], None, False).text
        except DataError:
            return False
        return "Zq1" in text

    @cached_property
    def _prints_arguments(self) -> bool:
        """Whether the arguments of a call must be JSON text, because the template prints them."""

        def writes(arguments: Any) -> bool:
            function = {"name": "Zq0", "arguments": arguments}
            call = {"type": "function", "id": "Zq0Zq0Zq0", "function": function}
            messages: list[Message] = [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
            ]
            schema = {"type": "object", "properties": {}}
            described = {"name": "Zq0", "description": "?", "parameters": schema}
            tool = {"type": "function", "function": described}
            try:
                text = self._rendered(messages, [tool], False).text
            except DataError:
                return False
            # Python's text of a dict is not what a model should learn to write.
            return "Zq1" in text and "Zq2" in text and "{'Zq1'" not in text

        return not writes({"Zq1": "Zq2"}) and writes('{"Zq1": "Zq2"}')


def _with_reasoning(message: Message, empty: bool) -> Message:
    """Move the reasoning at the beginning of an answer's content out of it.

    Args:
        message: The message.
        empty: Whether to remove tags without reasoning, too.
    """
    thought = None if message.get("reasoning_content") else thought_of(message)
    if thought is None or not (thought[2].strip() or empty):
        return message
    made = {**message, "content": thought[4].strip()}
    return made | {"reasoning_content": thought[2].strip()} if thought[2].strip() else made


def _with_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return {**call, "function": {**call["function"], "arguments": arguments}}
