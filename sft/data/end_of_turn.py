"""Find the token that ends an answer in a chat template."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from sft.data.chat_template import ChatTemplate, Message
from sft.data.segment import shared_prefix
from sft.errors import DataError

# Texts that no template writes and that tell where a rendered part ends.
ANSWER, AFTER = "Zq5wK", "Zq6wK"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "Zq7wK",
        "description": "?",
        "parameters": {
            "type": "object",
            "properties": {"Zq8wK": {"type": "string", "description": "?"}},
            "required": ["Zq8wK"],
        },
    },
}
CALL: dict[str, Any] = {
    "type": "function",
    "id": "Zq7wKcall",  # Mistral's templates ask for nine characters
    "function": {"name": "Zq7wK", "arguments": {"Zq8wK": ANSWER}},
}


class End(NamedTuple):
    """The control token that ends an answer.

    Attributes:
        token: The token's text.
        written: Whether the template writes it after the answer. Otherwise it is the token that
            begins the following message, at which generation stops (GLM-4: ``<|user|>``).
    """

    token: str
    written: bool


def end_of_turn(template: ChatTemplate, calls: bool) -> End:
    """Return the token that ends an answer, or an answer that calls a tool.

    It is the last of the adjacent control tokens that the template writes after an answer, both at
    the end of a conversation and within one: some templates close a part of an answer with a token
    of its own before the end of the turn, and some write another EOS behind it.

    Raises:
        DataError: The template ends an answer with no control token, or refuses the answer.
    """
    user: Message = {"role": "user", "content": "?"}
    answer: Message = {"role": "assistant", "content": "" if calls else ANSWER}
    following: Message = {"role": "user", "content": AFTER}
    if calls:
        answer["tool_calls"] = [CALL]
        following |= {"role": "tool", "name": "Zq7wK", "tool_call_id": CALL["id"]}
    tools = [TOOL] if calls else None
    text = template.rendered([user, answer], tools, generation=False).text
    if ANSWER not in text:
        raise DataError(
            f"the chat template does not write {'the tool calls' if calls else 'the content'} of "
            "an answer\n    fix: a different template.chat_template"
        )
    last = text.rpartition(ANSWER)[2]
    try:
        text = template.rendered([user, answer, following], tools, generation=False).text
        within = text.partition(AFTER)[0].rpartition(ANSWER)[2]
    except DataError:
        within = last
    both = shared_prefix(last, within)
    plain = end_of_turn(template, calls=False) if calls else None
    if plain is not None and plain.written and plain.token in last:
        return plain
    if plain is None or plain.written:
        adjacent = re.compile(f"(?:{template.control.pattern})+")
        for text in (both, last):
            # A call holds control tokens of its own, so that its end is the last of them.
            if found := adjacent.findall(text):
                run = found[-1 if calls else 0]
                return End(template.control.findall(run)[-1], True)
    following_tokens = template.control.findall(within[len(both) :])
    if not following_tokens:
        raise DataError(
            "the chat template ends an assistant turn with no special token, so the model "
            "would never learn to stop\n    fix: template=completion, or a different "
            "template.chat_template"
        )
    return End(following_tokens[0], False)
