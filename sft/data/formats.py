"""Convert a row of any known format to what a template renders: columns, or messages."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from sft.errors import DataError

# The columns that identify each format. A row has the first format whose columns it fills.
FORMATS: dict[str, tuple[str, ...]] = {
    "tokenized": ("input_ids",),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
# The format of all other rows: the template names the columns that it uses.
COLUMNS = "columns"
ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("observation", "tool", "function_response", "ipython"), "tool"),
    "function_call": "function_call",
}
REASONING = ("reasoning_content", "reasoning", "thinking")


def recognise(row: dict[str, Any]) -> str:
    """Return the name of a row's format, detected from the columns that it fills."""
    filled = {column for column, value in row.items() if value is not None}
    for name, columns in FORMATS.items():
        if filled.issuperset(columns):
            return name
    return COLUMNS


def normalise(row: dict[str, Any], format: str) -> dict[str, Any]:
    """Convert a row to the form that templates read.

    Args:
        row: The row, with columns renamed by ``dataset.columns``.
        format: A name of FORMATS, ``columns``, or ``auto`` to detect it.

    Returns:
        For a conversation, ``{"messages": [...], "tools": [...]}``, each message in OpenAI's form
        with ``tool_calls`` as objects; otherwise the row itself.

    Raises:
        DataError: The row does not fit the format.
    """
    name = recognise(row) if format == "auto" else format
    lacking = [column for column in FORMATS.get(name, ()) if row.get(column) is None]
    if lacking:
        raise DataError(f"the format {name} needs the column {lacking[0]}")
    if name == "messages":
        return _conversation(row["messages"], row)
    if name == "sharegpt":
        return _conversation(row["conversations"], row)
    if name == "prompt_completion" and isinstance(row["prompt"], list):
        context = [{**_plain(item), "train": False} for item in row["prompt"]]
        return _conversation(context + list(row["completion"]), row)
    if name == "alpaca" and row.get("history"):
        turns: list[dict[str, Any]] = []
        for question, answer in row["history"]:
            turns += [{"role": "user", "content": question}]
            turns += [{"role": "assistant", "content": answer}]
        asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        turns.append({"role": "user", "content": asked})
        turns.append({"role": "assistant", "content": row["output"]})
        return _conversation(turns, row)
    return row


def _conversation(items: Any, row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(items, list) or not items:
        raise DataError("the conversation is empty")
    messages = [_message(_plain(item), number) for number, item in enumerate(items, 1)]
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages, "tools": _tools(row.get("tools"))}


def _plain(item: Any) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(f"a message is {type(item).__name__}, not an object with role and content")
    return item


def _message(item: dict[str, Any], number: int) -> dict[str, Any]:
    """Convert one message to OpenAI's form."""
    said = item.get("role", item.get("from"))
    role = ROLES.get(str(said))
    if role is None:
        known = ", ".join(ROLES)
        raise DataError(f"message {number} has the role {said!r}; the known roles are {known}")
    content = _text(item.get("content", item.get("value")), number)
    message: dict[str, Any] = {"role": role, "content": content}
    if role == "function_call":
        message = {"role": "assistant", "content": "", "tool_calls": _calls(content, number)}
    elif item.get("tool_calls"):
        message["tool_calls"] = _calls(item["tool_calls"], number)
    elif role == "assistant" and item.get("function_call"):
        message["tool_calls"] = _calls(item["function_call"], number)
    for key in REASONING:
        if item.get(key):
            message["reasoning_content"] = item[key]
            break
    for key in ("name", "tool_call_id"):
        if item.get(key):
            message[key] = item[key]
    # OpenAI's fine-tuning files call this key weight, Axolotl's call it training.
    for key in ("train", "training", "weight"):
        if item.get(key) is not None:
            if role != "assistant" and role != "function_call" and item[key]:
                raise DataError(
                    f"message {number} of role {role} is marked as trained; only the assistant's "
                    "messages can be"
                )
            message["train"] = bool(item[key])
            break
    return message


def _text(content: Any, number: int) -> str:
    """Return a message's text, joined if it is a list of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(texts)  # type: ignore[arg-type]
    raise DataError(f"message {number} has content other than text, which a text model cannot read")


def _parsed(value: Any, what: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DataError(f"{what} is not valid JSON: {error}") from None


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """Convert tool calls to OpenAI's form, with arguments as objects."""
    what = f"the tool call of message {number}"
    value = _parsed(value, what)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{what} has no name")
        arguments = _parsed(function.get("arguments", {}), f"arguments in {what}")
        entry = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        # Keep the id: some templates use it to match a call and its result.
        extra = {"id": call["id"]} if call.get("id") else {}
        calls.append({"type": "function", **extra, "function": entry})
    return calls


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """Convert tools, given as JSON text or as objects, to OpenAI's form."""
    value = _parsed(value, "the column tools") if value else None
    if not value:
        return None
    items: Iterable[Any] = value if isinstance(value, list) else [value]
    tools = []
    for item in items:
        item = _parsed(item, "a tool")
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool has no name")
        tools.append({"type": "function", "function": function})
    return tools
