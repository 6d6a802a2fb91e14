"""Check once for each shape of conversation that a chat template writes every part of it."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from sft.data.chat_template import ChatTemplate, Message, Tools, thought_of
from sft.errors import DataError

Mark = Callable[[int, str], str]  # gives a unique text for a part: a message's number, what it is
NAME = "the name"  # of a message's author, which few templates write: the audit counts the others
ANYWHERE = -1  # the place of the system message and the tools: templates differ in it


class Part(NamedTuple):
    """A part of a conversation: the number of its message, what it is, and its unique text."""

    message: int
    what: str
    text: str


class Parts:
    """Plants a unique text in each part of a conversation, and looks for all of them in order.

    What a template drops does not depend on the words of a row, but on its shape: which messages
    follow each other, and which parts each has. So a shape is checked once.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._lost: dict[Any, str | None] = {}
        self._drops_names: dict[Any, bool] = {}

    def shape(self, messages: list[Message], tools: Tools, turns: list[int]) -> Any:
        """Return what identifies the shape of a conversation."""
        described = tuple(
            (
                message["role"],
                bool(message["content"].strip()),
                _thinks(message),
                bool(message.get("reasoning_content")),
                len(message.get("tool_calls") or ()),
                bool(message.get("name")),
                bool(message.get("tool_call_id")),
            )
            for message in messages
        )
        return described, tuple(map(_features, tools or ())), tuple(turns)

    def require(self, messages: list[Message], tools: Tools, turns: list[int]) -> None:
        """Refuse a conversation of which the template leaves out a part.

        The reasoning of an answer that is not trained may be left out: the template does so in
        generation, too. So may an earlier answer that it writes when it is the last.

        Raises:
            DataError: A part is lost. The message says which.
        """
        key = self.shape(messages, tools, turns)
        if key not in self._lost:
            self._lost[key] = self._first_lost(messages, tools, turns)
        lost = self._lost[key]
        if lost is not None:
            raise DataError(
                f"the chat template does not write {lost}\n"
                "    fix: a template.chat_template that writes it, or remove it from the data"
            )

    def drops_names(self, messages: list[Message], tools: Tools) -> bool:
        """Return whether the template leaves out a name that a message has."""
        key = self.shape(messages, tools, [])
        if key not in self._drops_names:
            made, tools, parts = self.marked(messages, tools)
            whole = self.template.rendered(made, tools, generation=False).text
            names = [part.text for part in parts if part.what == NAME]
            self._drops_names[key] = any(name not in whole for name in names)
        return self._drops_names[key]

    def _first_lost(self, messages: list[Message], tools: Tools, turns: list[int]) -> str | None:
        made, tools, parts = self.marked(messages, tools)
        whole = self.template.rendered(made, tools, generation=False).text
        lost = [part for part in _missing(whole, parts) if part.what != NAME]
        for part in lost:
            if part.message == ANYWHERE:
                return part.what
            role = messages[part.message]["role"]
            if role != "assistant" or part.message in turns:
                return f"{part.what} of message {part.message + 1}, the {role} message"
            if part.what == "the reasoning":
                continue
            until = self.template.rendered(made[: part.message + 1], tools, generation=False).text
            if part.text not in until:
                return f"{part.what} of message {part.message + 1}, the {role} message"
        return None

    def marked(
        self, messages: list[Message], tools: Tools
    ) -> tuple[list[Message], Tools, list[Part]]:
        """Copy a conversation, with a unique text in the place of each part."""
        numbers = itertools.count(1000)
        parts: list[Part] = []

        def mark(message: int, what: str) -> str:
            parts.append(Part(message, what, f"Zq{next(numbers)}wK"))
            return parts[-1].text

        made_tools = [_tool(tool, mark) for tool in tools] if tools else None
        names = [tool["function"]["name"] for tool in made_tools or ()] or [None]
        made = []
        for index, message in enumerate(messages):
            copied = copy.deepcopy(message)
            if message.get("reasoning_content"):
                copied["reasoning_content"] = mark(index, "the reasoning")
            thought = thought_of(message)
            if thought and thought[2].strip():
                copied["content"] = f"<think>\n{mark(index, 'the reasoning')}\n</think>\n\n"
                if thought[4].strip():
                    copied["content"] += mark(index, "the content")
            elif message["role"] == "system":
                copied["content"] = mark(ANYWHERE, f"the content of message {index + 1}, system")
            elif message["content"].strip():
                copied["content"] = mark(index, "the content")
            if message.get("name"):
                copied["name"] = mark(index, NAME)
            for call in copied.get("tool_calls") or ():
                called = names[0] or mark(index, "the name of a call")
                if names[0]:
                    parts.append(Part(index, "the name of a call", called))
                arguments = {mark(index, "an argument"): mark(index, "an argument")}
                call["function"] = {"name": called, "arguments": arguments}
            made.append(copied)
        return made, made_tools, parts


def _tool(tool: dict[str, Any], mark: Mark) -> dict[str, Any]:
    """Copy a tool with unique texts for its name, description and parameters."""
    function = tool["function"]
    made: dict[str, Any] = {"name": mark(ANYWHERE, "the name of a tool")}
    if function.get("description"):
        made["description"] = mark(ANYWHERE, "the description of a tool")
    schema = function.get("parameters")
    if isinstance(schema, dict) and (
        not schema or "properties" in schema or isinstance(schema.get("type"), str)
    ):
        made["parameters"] = {"properties": {}} | _schema({"type": "object", **schema}, mark)
    elif isinstance(schema, dict):
        # Some data has the parameters themselves in the place of their JSON schema.
        made["parameters"] = _properties(schema, mark)
    return {"type": "function", "function": made}


def _schema(schema: dict[str, Any], mark: Mark) -> dict[str, Any]:
    """Copy a JSON schema with unique texts for the names and descriptions in it."""
    kind = schema.get("type")
    made: dict[str, Any] = {"type": kind if isinstance(kind, str | list) else "string"}
    if schema.get("description"):
        made["description"] = mark(ANYWHERE, "the description of a parameter")
    if isinstance(schema.get("properties"), dict):
        made["properties"] = _properties(schema["properties"], mark)
        made["required"] = list(made["properties"])
    if isinstance(schema.get("items"), dict):
        made["items"] = _schema(schema["items"], mark)
    return made


def _properties(values: dict[str, Any], mark: Mark) -> dict[str, Any]:
    return {
        mark(ANYWHERE, "a parameter of a tool"): _schema(v if isinstance(v, dict) else {}, mark)
        for v in values.values()
    }


def _features(tool: dict[str, Any]) -> str:
    """Return which parts a tool has."""
    numbers = itertools.count()
    return json.dumps(_tool(tool, lambda _message, _what: str(next(numbers))))


def _thinks(message: Message) -> bool:
    """Return whether an answer's content begins with reasoning between tags."""
    thought = thought_of(message)
    return thought is not None and bool(thought[2].strip())


def _missing(whole: str, parts: list[Part]) -> Iterator[Part]:
    """Yield the parts that a text lacks, or has before a part of an earlier message.

    Tools and the system message may stand anywhere before the answers.
    """
    start = end = 0
    message = -1
    for part in parts:
        if part.message != message:
            message, start = part.message, end
        at = whole.find(part.text, 0 if part.message == ANYWHERE else start)
        if at < 0:
            yield part
        elif part.message != ANYWHERE:
            end = max(end, at + len(part.text))


def texts_of(message: Message) -> list[str]:
    """Return the texts of a message's content: the reasoning in it, and the rest."""
    thought = thought_of(message)
    texts = [thought[2], thought[4]] if thought else [message["content"]]
    return [text.strip() for text in texts if text.strip()]


def require_texts(
    whole: str, messages: list[Message], tools: Tools, answers: list[tuple[int, str]]
) -> None:
    """Refuse a text that lacks a message or a tool: a template may drop some of them only.

    Args:
        whole: The rendered conversation.
        messages: Its messages.
        tools: Its tools.
        answers: The number of each trained message, and the text that is trained of it.

    Raises:
        DataError: The template leaves out a message, or a tool.
    """
    for index, answer in answers:
        if any(text not in answer for text in texts_of(messages[index])):
            raise DataError(
                f"the chat template does not write all of message {index + 1}, the assistant "
                "message\n    fix: a different template.chat_template, or remove it from the data"
            )
    position = 0
    for number, message in enumerate(messages, 1):
        role = message["role"]
        for text in texts_of(message) if role != "assistant" else ():
            start = 0 if role == "system" else position
            found = [whole.find(form, start) for form in {text, json.dumps(text)[1:-1]}]
            found += [whole.find(json.dumps(text, ensure_ascii=False)[1:-1], start)]
            at = max(found)
            if at < 0:
                raise DataError(
                    f"the chat template leaves out message {number}, the {role} message\n"
                    "    fix: a different template.chat_template, or remove it from the data"
                )
            position = max(position, min(place for place in found if place >= 0))
    for tool in tools or ():
        if tool["function"]["name"] not in whole:
            raise DataError(
                "the chat template does not write the tools\n"
                "    fix: a template.chat_template that writes them, or remove them from the data"
            )
