"""Rows of every format at random, for the property tests: a unique mark stands in every part."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

MARK = re.compile(r"Kq\d+Z")
# What data holds that is easily taken for something else.
ODD = [
    *("", "", "", " ", "\n", "\n\n", "\t", "\r\n", "  a  ", ". ", "0", ",", "a", "the cat\n\nwhy"),
    *("<|im_end|>", "<|im_start|>assistant\n", "<|end|>", "<|user|>", "<|assistant|>", "</s>"),
    *("<s>", "[INST]", "[/INST]", "<|eot_id|>", "<|endoftext|>", "<EOS>", "<BOS>"),
    *(
        "<think>",
        "</think>",
        "<think>\n",
        "<tool_call>",
        "</tool_response>",
        "<|",
        "|>",
        "<|reserved_0|>",
    ),
    *("\u00e9", "e\u0301", "\u05e9\u05dc\u05d5\u05dd", "\u202e", "\U0001f600", "\U0001d4b3"),
    *("\U0001f469\u200d\U0001f469\u200d\U0001f467", "\u2028", "\ufeff", "\x00", "\x1c", "\u00a0"),
    *("{x}", "{{ x }}", "{% raw %}", "{", "}", "%s", "\\n", '"', "'", "\\", "&amp;", "\u2581"),
    *("long " * 400, " " * 300, "\n" * 100, "\u05d0" * 300),
]
_CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\uf8f0")
ODD_TEXT = st.one_of(
    st.sampled_from(ODD),
    st.tuples(st.sampled_from(ODD), st.sampled_from(ODD)).map("".join),
    st.text(_CHARACTERS, max_size=6),
)
EMPTY = st.sampled_from(["", " ", "\n", None])
FORMATS = (
    "texts",
    "alpaca",
    "question",
    "messages",
    "sharegpt",
    "lists",
    "text",
    "tokenized",
)


@dataclass
class Made:
    """A row, and what must become of it.

    Attributes:
        row: The row.
        trained: Marks of the parts that are trained, in order.
        context: Marks of the parts that must be in the text, not trained.
        optional: Marks of parts that a template may leave out, such as a result's name.
        texts: Parts that must be in the text as they are, but for white space around them.
        needs: What a template must support so that it can train the row.
        ids: Of a tokenised row: its ids without padding, and which of them are trained.
    """

    row: dict[str, Any] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    context: set[str] = field(default_factory=set)
    optional: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    needs: set[str] = field(default_factory=set)
    ids: list[tuple[int, bool]] = field(default_factory=list)


class Maker:
    """Makes one row.

    Args:
        draw: Draws from a strategy.
        train_on: The template's ``train_on``.
        encode: Gives the ids of a text, for tokenised rows.
    """

    def __init__(
        self, draw: Callable[[Any], Any], train_on: str, encode: Callable[[str], list[int]]
    ) -> None:
        self.draw, self.train_on, self.encode = draw, train_on, encode
        self.made = Made()
        self.count = 0

    def odds(self, of: int) -> bool:
        """Return True once in so many times; Hypothesis shrinks it to False."""
        return bool(self.draw(st.integers(0, of - 1)) == of - 1)

    def mark(self) -> str:
        self.count += 1
        return f"Kq{self.count:03d}Z"  # some templates sort the arguments of a call

    def text(self, marks: list[str] | set[str], plain: bool = False) -> str:
        """Make a text around a new mark, which is added to ``marks``."""
        mark = self.mark()
        marks.append(mark) if isinstance(marks, list) else marks.add(mark)
        if plain:
            return mark
        text = f"{self.draw(ODD_TEXT)}{mark}{self.draw(ODD_TEXT)}"
        if marks is not self.made.optional:
            self.made.texts.append(text)
        return text

    def context(self) -> Any:
        """Make the text of a part that is not trained; rarely an empty one."""
        if self.odds(20):
            self.made.needs.add("empty parts")
            return self.draw(EMPTY)
        return self.text(self.made.context)

    def answer(self, trained: list[str]) -> Any:
        return self.draw(EMPTY) if self.odds(12) else self.text(trained)

    # The formats

    def texts(self) -> Made:
        return self.pair("prompt", "completion")

    def question(self) -> Made:
        return self.pair("question", "answer", "context")

    def alpaca(self) -> Made:
        return self.pair("instruction", "output", "input")

    def pair(self, asked: str, answered: str, beside: str | None = None) -> Made:
        made, row = self.made, self.made.row
        filled = not self.odds(12)  # of a row without a completion, the history is not trained
        if filled and self.odds(4):
            row["history"] = self.history()
            made.needs |= {"chat", "several"}
        row[asked] = self.context()
        if beside and self.odds(2):
            row[beside] = self.context()
        row[answered] = self.text(made.trained) if filled else self.draw(EMPTY)
        self.beside(conversation=False)
        return made

    def history(self) -> list[Any]:
        """Make earlier turns, which are trained too."""
        trained = [] if self.train_on == "last_assistant" else self.made.trained
        turns = [
            (self.context() or "", self.answer(trained) or "")
            for _ in range(self.draw(st.integers(1, 2)))
        ]
        form = self.draw(st.integers(0, 2))
        if form == 0:
            found: list[Any] = [list(turn) for turn in turns]
        elif form == 1:
            found = [{"user": user, "assistant": answer} for user, answer in turns]
        else:
            roles = ("user", "assistant")
            found = [
                {"role": role, "content": text}
                for turn in turns
                for role, text in zip(roles, turn, strict=True)
            ]
        if self.train_on == "last_assistant":
            self.made.context |= {m for pair in turns for m in MARK.findall(pair[1])}
        return found

    def beside(self, conversation: bool, system: bool = True) -> None:
        """Fill columns beside the conversation."""
        made = self.made
        if system and self.odds(4):
            made.row["system"] = self.text(made.context)
            made.needs |= {"chat", "system"}
        if not conversation and self.odds(8):
            tools = [self.tool()]
            made.row["tools"] = self.draw(st.sampled_from([tools, json.dumps(tools)]))
            made.needs |= {"chat", "tools"}
        if self.odds(6):
            made.row["source"] = self.mark()  # no template writes it

    def text_row(self) -> Made:
        self.made.row["text"] = self.text(self.made.trained)
        return self.made

    def messages(self) -> Made:
        made = self.made
        messages, tools = self.conversation()
        made.row["messages"] = messages
        if tools:
            made.row["tools"] = self.draw(st.sampled_from([tools, json.dumps(tools)]))
        self.beside(conversation=True, system=messages[0]["role"] != "system")
        return made

    def lists(self) -> Made:
        """A prompt and a completion of which one, at least, is a list of messages."""
        made = self.made
        prompt = self.context_messages()
        answers: list[str] = []
        completion: Any = self.text(answers)
        made.trained += answers
        if len(prompt) == 1 and self.odds(2):
            made.row["prompt"] = prompt[0]["content"]
            completion = [{"role": "assistant", "content": completion}]
        else:
            made.row["prompt"] = prompt
            if self.odds(2):
                completion = [{"role": "assistant", "content": completion}]
        made.row["completion"] = completion
        made.needs.add("chat")
        self.beside(conversation=True, system=prompt[0]["role"] != "system")
        return made

    def context_messages(self) -> list[dict[str, Any]]:
        """Make messages that end with the user's; no answer among them is trained."""
        made = self.made
        messages: list[dict[str, Any]] = []
        if self.odds(4):
            messages.append({"role": "system", "content": self.text(made.context)})
            made.needs.add("system")
        for _ in range(self.draw(st.integers(0, 1))):
            made.needs.add("several")
            messages.append({"role": "user", "content": self.text(made.context)})
            answer = self.text(marks := [])
            # The reasoning of an answer that is not trained may be left out.
            (made.optional if "</think>" in answer else made.context).update(marks)
            messages.append({"role": "assistant", "content": answer})
        return [*messages, {"role": "user", "content": self.text(made.context)}]

    def sharegpt(self) -> Made:
        """The conversation of ``messages``, in the words of ShareGPT."""
        made = self.made
        messages, tools = self.conversation(sharegpt=True)
        words = {"user": ["human", "user"], "assistant": ["gpt", "assistant"]}
        words |= {"tool": ["observation", "tool"], "system": ["system"]}
        said = []
        for message in messages:
            role, value = message["role"], message.get("content")
            if message.get("tool_calls"):
                [call] = message["tool_calls"]
                said.append({"from": "function_call", "value": json.dumps(call["function"])})
                continue
            flag = {"train": message["train"]} if "train" in message else {}
            said.append({"from": self.draw(st.sampled_from(words[role])), "value": value, **flag})
        made.row["conversations"] = said
        if tools:
            made.row["tools"] = json.dumps(tools)
        self.beside(conversation=True, system=said[0]["from"] != "system")
        return made

    # Messages, tools and calls

    def conversation(self, sharegpt: bool = False) -> tuple[list[dict[str, Any]], Any]:
        """Make messages, and the tools that they call."""
        made = self.made
        made.needs.add("chat")
        messages: list[dict[str, Any]] = []
        answers: list[tuple[dict[str, Any], list[str]]] = []
        tools = [self.tool() for _ in range(self.draw(st.integers(1, 2)))] if self.odds(3) else None
        if self.odds(4):
            messages.append({"role": "system", "content": self.text(made.context)})
            made.needs.add("system")
        turns = self.draw(st.integers(1, 3))
        if turns > 1:
            made.needs.add("several")
        if turns > 1 and self.odds(12):
            made.needs.add("assistant first")
        for turn in range(turns):
            if turn or "assistant first" not in made.needs:
                messages.append({"role": "user", "content": self.content(self.context())})
            if tools and messages and self.odds(2):
                messages += self.called(tools, answers, sharegpt)
            marks: list[str] = []
            message: dict[str, Any] = {"role": "assistant"}
            if not sharegpt and self.odds(4):
                made.needs.add("reasoning")
                key = self.draw(st.sampled_from(["reasoning_content", "reasoning", "thinking"]))
                message[key] = self.text(marks)
            content = self.answer(marks)
            if not set(message) - {"role"} and self.odds(6):
                made.needs.add("reasoning")
                thought: list[str] = []
                content = f"<think>\n{self.text(thought)}\n</think>\n\n{content or ''}"
                marks[:0] = thought
            message["content"] = content if sharegpt else self.content(content)
            if self.odds(8):
                message["train"] = self.odds(2)
            answers.append((message, marks))
            messages.append(message)
        if tools:
            made.needs.add("tools")
        self.expect(answers, messages)
        return messages, tools

    def expect(self, answers: list[Any], messages: list[dict[str, Any]]) -> None:
        """Note which answers are trained, and what may be left out."""
        made = self.made
        chosen = answers[-1:] if self.train_on == "last_assistant" else answers
        last = 0
        for message, marks in answers:
            selected = message.get("train", True) and any(message is other for other, _ in chosen)
            if selected and marks:
                made.trained += marks
                last = next(n for n, other in enumerate(messages) if other is message)
            else:
                # The reasoning of an answer that is not trained may be left out.
                made.optional |= set(marks)
        made.context -= set(MARK.findall(str(messages[last + 1 :])))

    def content(self, text: Any) -> Any:
        """Give some texts the form of a list of parts."""
        if text is None or not self.odds(8):
            return text
        at = len(text) // 2
        parts = [text] if MARK.search(text) else [text[:at], text[at:]]
        return [{"type": "text", "text": part} for part in parts]

    def called(self, tools: list[Any], answers: list[Any], sharegpt: bool) -> list[dict[str, Any]]:
        """Make a call of a tool and its result."""
        marks: list[str] = []
        made = self.made
        function = self.draw(st.sampled_from(tools))
        name = function.get("function", function)["name"]
        marks += MARK.findall(name)
        key = self.text(marks, plain=True)
        arguments: Any = {key: self.text(marks)}
        if self.odds(3):
            second = self.text(marks, plain=True)
            arguments[second] = [self.text(marks), 1, None]
        if not sharegpt and self.odds(3):
            arguments = json.dumps(arguments)
        identity = f"{len(answers):09d}"
        call = {"id": identity, "type": "function"}
        call["function"] = {"name": name, "arguments": arguments}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        if not sharegpt and self.odds(4):
            message["content"] = self.text(content := [], plain=True)
            marks[:0] = content
            made.needs.add("words with a call")
        answers.append((message, marks))
        result = {"role": "tool", "tool_call_id": identity, "name": name}
        result["content"] = self.text(made.context)
        return [message, result]

    def tool(self) -> dict[str, Any]:
        context = self.made.context
        name = self.text(context, plain=True)
        parameter = {"type": "string", "description": self.text(context)}
        function = {
            "name": name,
            "description": self.text(context),
            "parameters": {
                "type": "object",
                "properties": {self.text(context, plain=True): parameter},
                "required": [],
            },
        }
        return function if self.odds(3) else {"type": "function", "function": function}

    # Tokens

    def tokenized(self) -> Made:
        """Tokens with labels, masks and padding that agree."""
        made = self.made
        for _ in range(self.draw(st.integers(1, 4))):
            flag = self.odds(2)
            ids = self.encode(self.draw(ODD_TEXT) + self.mark())
            made.ids += [(token, flag) for token in ids]
        left, right = self.draw(st.integers(0, 2)), self.draw(st.integers(0, 2))
        ids = [0] * left + [token for token, _ in made.ids] + [0] * right
        flags = [False] * left + [flag for _, flag in made.ids] + [False] * right
        columns: dict[str, Any] = {
            "labels": [t if f else -100 for t, f in zip(ids, flags, strict=True)],
            "completion_mask": [int(flag) for flag in flags],
            "assistant_masks": flags,
        }
        named = [name for name in columns if self.odds(2)]
        made.row = {"input_ids": ids, **{name: columns[name] for name in named}}
        if left or right or self.odds(2):
            seen = [0] * left + [1] * len(made.ids) + [0] * right
            made.row["attention_mask"] = seen
        if not named:
            made.ids = [(token, True) for token, _ in made.ids]
        if self.odds(4):
            made.row = {key: json.dumps(value) for key, value in made.row.items()}
        return made

    def of(self, kind: str) -> Made:
        """Make a row of a format."""
        return self.text_row() if kind == "text" else getattr(self, kind)()  # type: ignore[no-any-return]


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """Return a value with all of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: changed(item, change) for key, item in value.items()}
    return [changed(item, change) for item in value] if isinstance(value, list) else value
