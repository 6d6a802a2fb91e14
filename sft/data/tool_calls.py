"""Convert tools, and the calls of tools, to OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sft.data.values import is_filled, parsed
from sft.errors import DataError

# What data calls the arguments of a call: OpenAI's, Llama's, others', Anthropic's.
ARGUMENTS = ("arguments", "parameters", "args", "input")


def calls_of(value: Any, place: str, unused: set[str]) -> list[dict[str, Any]]:
    """Convert tool calls to OpenAI's form, with arguments as objects.

    Args:
        value: The calls, or one of them, or their JSON text.
        place: The message that they are in, for the error.
        unused: Gets the keys of calls that are not in the result.

    Raises:
        DataError: They have not the known form.
    """
    what = f"the tool call of {place}"
    value = parsed(value, what)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{what} has no name")
        key = next((name for name in ARGUMENTS if is_filled(function.get(name))), "arguments")
        arguments = (
            parsed(function[key], f"{key} in {what}") if is_filled(function.get(key)) else {}
        )
        entry = {"name": function["name"], "arguments": arguments}
        known = {"function", "name", "id", "type", "index", key}
        unused |= {k for k, v in {**call, **function}.items() if k not in known and is_filled(v)}
        # Keep the id: some templates use it to match a call and its result.
        extra = {"id": call["id"]} if call.get("id") else {}
        calls.append({"type": "function", **extra, "function": entry})
    return calls


def tools_of(value: Any, column: str) -> list[dict[str, Any]] | None:
    """Convert a column of tools, given as JSON text or as objects, to OpenAI's form."""
    value = parsed(value, f"the column {column}") if is_filled(value) else None
    if not value:
        return None
    items: Iterable[Any] = value if isinstance(value, list) else [value]
    tools = []
    for item in items:
        item = parsed(item, "a tool")
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool has no name")
        if not is_filled(function.get("parameters")) and is_filled(function.get("input_schema")):
            function = {**function, "parameters": function["input_schema"]}
            del function["input_schema"]
        tools.append({"type": "function", "function": function})
    return tools
