"""Convert a message of any known form to OpenAI's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft.data.flags import FLAGS_OF_MESSAGES, WEIGHTS, flag_of
from sft.data.tool_calls import calls_of
from sft.data.values import described, is_absent, is_filled, text_of
from sft.errors import DataError

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("observation", "tool", "function", "function_response", "ipython"), "tool"),
    "function_call": "function_call",
}
REASONING = ("reasoning_content", "reasoning", "thinking")


def _first(item: dict[str, Any], keys: Sequence[str], taken: set[str]) -> Any:
    """Return the value of the first key that is filled, and add that key to ``taken``."""
    for key in keys:
        if key in item and is_filled(item[key]):
            taken.add(key)
            return item[key]
    return None


def message_of(item: dict[str, Any], number: int, column: str, unused: set[str]) -> dict[str, Any]:
    """Convert one message to OpenAI's form.

    Args:
        item: The message.
        number: Its number in the conversation, from 1.
        column: The column that holds it.
        unused: Gets its keys that are not in the result, as COLUMN.KEY.

    Raises:
        DataError: It has no known role, content other than text, or flags that disagree.
    """
    place = f"message {number}"
    taken: set[str] = set()
    extra: set[str] = set()  # keys of calls
    said = _first(item, ("role", "from"), taken)
    role = ROLES.get(str(said))
    if role is None:
        raise _without_role(item, said, place)
    content = _first(item, ("content", "value"), taken)
    message: dict[str, Any] = {"role": role, "content": ""}
    if role == "function_call":
        message = {
            "role": "assistant",
            "content": "",
            "tool_calls": calls_of(content, place, extra),
        }
    else:
        message["content"] = _text(content, place)
        calls = ("tool_calls", "function_call") if role == "assistant" else ("tool_calls",)
        if (value := _first(item, calls, taken)) is not None:
            message["tool_calls"] = calls_of(value, place, extra)
    if (reasoning := _first(item, REASONING, taken)) is not None:
        message["reasoning_content"] = text_of(reasoning, f"the reasoning of {place}")
    for key in ("name", "tool_call_id"):
        if (value := _first(item, (key,), taken)) is not None:
            message[key] = text_of(value, f"{key} of {place}")
    weight = flag_of(item, place, FLAGS_OF_MESSAGES, f"{column}.", WEIGHTS)
    if weight is not None:
        train = weight > 0
        if train and message["role"] != "assistant":
            raise DataError(
                f"{place} of role {role} is marked as trained; only the assistant's messages can be"
            )
        message["train"] = train
        if 0 < weight < 1:
            message["weight"] = weight
    if len(taken) < len(item):
        left = item.keys() - taken - FLAGS_OF_MESSAGES
        unused |= {f"{column}.{key}" for key in left if is_filled(item[key])}
    unused |= {f"{column}.tool_calls.{key}" for key in extra}
    return message


def _without_role(item: dict[str, Any], said: Any, place: str) -> DataError:
    """Return the error for a message whose role is unknown or absent."""
    if said is None:
        return DataError(
            f"{place} has no role; its keys are {', '.join(map(str, item))}\n"
            "    fix: dataset.columns.role=KEY and dataset.columns.content=KEY"
        )
    return DataError(
        f"{place} has the role {said!r}; the known roles are {', '.join(ROLES)}\n"
        f"    fix: dataset.roles.user=[{said}], or assistant, system or tool in place of user"
    )


def _text(content: Any, place: str) -> str:
    """Return a message's text, joined if it is a list of parts."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return text_of(content, f"the content of {place}")
    texts = []
    for part in content:
        # LLaMA-Factory's parts have value instead of text.
        text = None
        if isinstance(part, dict):
            text = part.get("value") if is_absent(part.get("text")) else part["text"]
        if is_absent(text) or part.get("type", "text") != "text":
            raise DataError(
                f"{place} has content other than text, which a text model cannot read: "
                f"{described(part)}"
            )
        texts.append(text_of(text, f"a part of {place}"))
    return "".join(texts)
