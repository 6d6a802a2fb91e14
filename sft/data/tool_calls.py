"""Convert tools, and the calls of tools, to OpenAI's form."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sft.data.values import is_absent, is_filled, parsed
from sft.errors import DataError


def calls_of(value: Any, place: str) -> list[dict[str, Any]]:
    """Convert tool calls to OpenAI's form, with arguments as objects."""
    what = f"the tool call of {place}"
    value = parsed(value, what)
    calls = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{what} has no name")
        arguments = function.get("arguments")
        if is_absent(arguments) or arguments == "":
            arguments = {}
        entry = {
            "name": function["name"],
            "arguments": parsed(arguments, f"arguments in {what}"),
        }
        # Keep the id: some templates use it to match a call and its result.
        extra = {"id": call["id"]} if call.get("id") else {}
        calls.append({"type": "function", **extra, "function": entry})
    return calls


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """Convert tools, given as JSON text or as objects, to OpenAI's form."""
    value = parsed(value, "the column tools") if is_filled(value) else None
    if not value:
        return None
    items: Iterable[Any] = value if isinstance(value, list) else [value]
    tools = []
    for item in items:
        item = parsed(item, "a tool")
        function = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool has no name")
        tools.append({"type": "function", "function": function})
    return tools
