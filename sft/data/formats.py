"""Convert a row of any known format to what a template renders: columns, or messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sft.data.tool_calls import calls_of, tools_of
from sft.data.values import FLAGS, described, flag_of, is_absent, is_filled, parsed, text_of
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
    **dict.fromkeys(("observation", "tool", "function", "function_response", "ipython"), "tool"),
    "function_call": "function_call",
}
REASONING = ("reasoning_content", "reasoning", "thinking")


class Conversation(NamedTuple):
    """A conversation in OpenAI's form.

    Attributes:
        messages: Messages with ``role`` and ``content``, with ``tool_calls`` as objects, and with
            ``train`` where the data says whether it is trained.
        tools: Tools in OpenAI's form; None if there are none.
        used: Columns of the row that are in it.
        unused: Keys of messages that are not in it, as COLUMN.KEY.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    used: set[str]
    unused: set[str]


def recognise(row: dict[str, Any]) -> str:
    """Return the name of a row's format, detected from the columns that are not null or ''."""
    filled = {column for column, value in row.items() if value is not None and value != ""}
    for name, columns in FORMATS.items():
        if filled.issuperset(columns):
            return name
    return COLUMNS


def format_of(row: dict[str, Any], format: str) -> str:
    """Return the name of a row's format.

    Args:
        row: The row, with columns renamed by ``dataset.columns``.
        format: A name of FORMATS, ``columns``, or ``auto`` to detect it.

    Raises:
        DataError: The row lacks a column of the format.
    """
    name = recognise(row) if format == "auto" else format
    lacking = [column for column in FORMATS.get(name, ()) if row.get(column) is None]
    if lacking:
        raise DataError(f"the format {name} needs the column {lacking[0]}")
    return name


def conversation_of(row: dict[str, Any], name: str, answered: bool = True) -> Conversation | None:
    """Return the conversation that a row holds; None if the template makes one of its columns.

    A ``prompt`` or ``completion`` that is a list of messages makes a conversation, whatever the
    other one is. The answers in the prompt are not trained.

    Args:
        row: The row.
        name: Its format.
        answered: Whether a prompt without a completion is none; generation starts from one.

    Raises:
        DataError: It is not a conversation of the known form.
    """
    if name in ("messages", "sharegpt"):
        column = FORMATS[name][0]
        messages = _list(row[column], column)
        return conversation([(column, item) for item in messages], row, {column})
    if name != "prompt_completion":
        return None
    prompt, completion = row["prompt"], row.get("completion")
    if not (isinstance(prompt, list) or isinstance(completion, list)):
        return None
    if answered and not is_filled(completion):
        return None
    turns: list[tuple[str, Any]] = []
    if isinstance(prompt, list):
        turns += [("prompt", {**_plain(item, "prompt"), "train": False}) for item in prompt]
    else:
        turns.append(("prompt", {"role": "user", "content": prompt}))
    if isinstance(completion, list):
        turns += [("completion", item) for item in completion]
    elif is_filled(completion):
        turns.append(("completion", {"role": "assistant", "content": completion}))
    return conversation(turns, row, {"prompt", "completion"})


def conversation(
    items: Sequence[tuple[str, Any]], row: dict[str, Any], used: Iterable[str]
) -> Conversation:
    """Make a conversation of messages, and of a row's ``system`` and ``tools``.

    Args:
        items: The name of its column, and the message, of each.
        row: The row.
        used: Columns that the messages are made from.

    Raises:
        DataError: A message or a tool has not the known form.
    """
    if not items:
        raise DataError("the conversation is empty")
    used, unused = {*used, "tools"}, set[str]()
    messages = [
        _message(_plain(item, column), number, column, unused)
        for number, (column, item) in enumerate(items, 1)
    ]
    system = row.get("system")
    if is_filled(system):
        system = text_of(system, "the column system")
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        if messages[0]["content"] == system:
            used.add("system")
    return Conversation(messages, tools_of(row.get("tools")), used, unused)


def history_of(row: dict[str, Any]) -> list[tuple[str, Any]]:
    """Return the messages of a row's ``history``, each after the name of its column.

    Raises:
        DataError: It is not a list of pairs, of objects with user and assistant, or of messages.
    """
    if not is_filled(row.get("history")):
        return []
    turns: list[Any] = []
    for number, item in enumerate(_list(row["history"], "history"), 1):
        values = item if isinstance(item, dict) else {}
        keys = {key for key, value in values.items() if not is_absent(value)}
        if isinstance(item, list | tuple) and len(item) == 2:
            pair = item
        elif keys == {"user", "assistant"}:
            pair = [item["user"], item["assistant"]]
        elif keys & {"role", "from"}:
            turns.append(item)
            continue
        else:
            raise DataError(
                f"turn {number} of the column history holds {described(item)}; it must be a pair "
                "[question, answer], {user, assistant} or {role, content}"
            )
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return [("history", turn) for turn in turns]


def _list(value: Any, column: str) -> list[Any]:
    value = parsed(value, f"the column {column}")
    if not isinstance(value, list):
        raise DataError(f"the column {column} holds {described(value)}, not a list of messages")
    return value


def _plain(item: Any, column: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise DataError(
            f"a message of the column {column} holds {described(item)}, not an object with role "
            "and content"
        )
    return item


def _first(item: dict[str, Any], keys: Sequence[str], taken: set[str]) -> Any:
    """Return the value of the first key that is filled, and add that key to ``taken``."""
    for key in keys:
        if key in item and is_filled(item[key]):
            taken.add(key)
            return item[key]
    return None


def _message(item: dict[str, Any], number: int, column: str, unused: set[str]) -> dict[str, Any]:
    """Convert one message to OpenAI's form, and add keys that are not in it to ``unused``."""
    place = f"message {number}"
    taken: set[str] = set()
    said = _first(item, ("role", "from"), taken)
    role = ROLES.get(str(said))
    if role is None:
        if said is None:
            raise DataError(f"{place} has no role; its keys are {', '.join(map(str, item))}")
        known = ", ".join(ROLES)
        raise DataError(f"{place} has the role {said!r}; the known roles are {known}")
    content = _first(item, ("content", "value"), taken)
    message: dict[str, Any] = {"role": role, "content": ""}
    if role == "function_call":
        message = {"role": "assistant", "content": "", "tool_calls": calls_of(content, place)}
    else:
        message["content"] = _text(content, place)
        calls = ("tool_calls", "function_call") if role == "assistant" else ("tool_calls",)
        if (value := _first(item, calls, taken)) is not None:
            message["tool_calls"] = calls_of(value, place)
    if (reasoning := _first(item, REASONING, taken)) is not None:
        message["reasoning_content"] = text_of(reasoning, f"the reasoning of {place}")
    for key in ("name", "tool_call_id"):
        if (value := _first(item, (key,), taken)) is not None:
            message[key] = text_of(value, f"{key} of {place}")
    if (train := flag_of(item, place, prefix=f"{column}.")) is not None:
        if train and message["role"] != "assistant":
            raise DataError(
                f"{place} of role {role} is marked as trained; only the assistant's messages can be"
            )
        message["train"] = train
    if len(taken) < len(item):
        left = item.keys() - taken - FLAGS
        unused |= {f"{column}.{key}" for key in left if is_filled(item[key])}
    return message


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
