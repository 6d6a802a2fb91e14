"""Convert a row of any known format to what a template renders: columns, or messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from sft.data.flags import FLAGS_OF_MESSAGES
from sft.data.messages import ROLES, message_of
from sft.data.tool_calls import tools_of
from sft.data.values import described, is_absent, is_filled, parsed, text_of
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
# The columns of a pair of each format: a template that could also use those of another format
# uses these.
PAIRS = {
    "prompt_completion": frozenset(("prompt", "completion")),
    "alpaca": frozenset(("instruction", "input", "context", "output")),
    "question_answer": frozenset(("question", "context", "answer")),
}
# The format of all other rows: the template names the columns that it uses.
COLUMNS = "columns"


class Conversation(NamedTuple):
    """A conversation in OpenAI's form.

    Attributes:
        messages: Messages with ``role`` and ``content``, with ``tool_calls`` as objects, with
            ``train`` where the data says whether it is trained, and with ``weight`` where that is
            between 0 and 1.
        tools: Tools in OpenAI's form; None if there are none.
        used: Columns of the row that are in it.
        named: Keys of messages that hold a name, which not all templates write, as COLUMN.KEY.
        unused: Keys of messages that are not in it, as COLUMN.KEY.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    used: set[str]
    named: set[str]
    unused: set[str]


def recognise(row: dict[str, Any]) -> str:
    """Return the name of a row's format, detected from the columns that are filled."""
    filled = {
        column
        for column, value in row.items()
        if value is not None and value != "" and (value != [] or column == "input_ids")
    }
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
    other one is. The answers in the prompt are not trained, whatever their flags say.

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
        turns += [("prompt", _untrained(_plain(item, "prompt"))) for item in prompt]
    else:
        turns.append(("prompt", {"role": "user", "content": prompt}))
    if isinstance(completion, list):
        turns += [("completion", item) for item in completion]
        first = completion[0] if completion else None
        said = (first.get("role") or first.get("from")) if isinstance(first, dict) else None
        if ROLES.get(str(said)) in ("user", "system"):
            raise DataError(
                f"the completion begins with a message of role {said}, so it holds the "
                "prompt once more\n    fix: dataset.columns.messages=COLUMN, for a column that "
                "holds the whole conversation"
            )
        return conversation(turns, row, {"prompt", "completion"})
    if is_filled(completion):
        turns.append(("completion", answer_of(completion, row)))
    return conversation(turns, row, {"prompt", "completion", "reasoning_content"})


def _untrained(item: dict[str, Any]) -> dict[str, Any]:
    """Return a message without its flags and weights, which count in a completion only."""
    kept = {key: value for key, value in item.items() if key not in FLAGS_OF_MESSAGES}
    return {**kept, "train": False}


def answer_of(text: Any, row: dict[str, Any]) -> dict[str, Any]:
    """Return the message of a completion that is text, with the reasoning of its row."""
    message = {"role": "assistant", "content": text}
    if is_filled(row.get("reasoning_content")):
        message["reasoning_content"] = row["reasoning_content"]
    return message


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
    used, unused = set(used), set[str]()
    messages = [
        message_of(_plain(item, column), number, column, unused)
        for number, (column, item) in enumerate(items, 1)
    ]
    pairs = zip(items, messages, strict=True)
    named = {f"{column}.name" for (column, _), message in pairs if "name" in message}
    system = row.get("system")
    if is_filled(system):
        system = text_of(system, "the column system")
        if messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        if messages[0]["content"] == system:
            used.add("system")
    column = "tools" if is_filled(row.get("tools")) else "functions"
    tools = tools_of(row.get(column), column)
    return Conversation(messages, tools, {*used, column}, named, unused)


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
