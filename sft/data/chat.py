"""Find where each answer of a rendered conversation begins and ends."""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING

from sft.data.chat_template import ChatTemplate, Message, Tools
from sft.data.segment import Segment
from sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Chat:
    """One tokenizer's chat template.

    The trained part of an answer is what the model has to generate: from the end of the generation
    prompt up to the token that ends the turn. If the template has ``{% generation %}`` markers,
    they decide instead.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, train_on: str
    ) -> None:
        self.template = ChatTemplate(tokenizer, chat_template)
        self.train_on = train_on

    def prompt(self, messages: list[Message], tools: Tools) -> str:
        """Return the text that generation starts from."""
        return self.template.rendered(self.template.guarded(messages), tools, generation=True)[0]

    def end_of_turn(self) -> str:
        """Return the trained text of a short answer, which ends like every assistant turn."""
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
        return next(segment.text for segment in self._cut(turn, None, [1]) if segment.trained)

    def samples(self, messages: list[Message], tools: Tools) -> list[list[Segment]]:
        """Render a conversation and split it into trained and untrained segments.

        Returns:
            One sample. If the template renders a turn differently once others follow, as templates
            that drop earlier reasoning do, one sample per trained turn.

        Raises:
            DataError: Nothing is trained, or the template refuses or leaves out a part of it.
        """
        if messages[-1]["role"] != "assistant":
            raise DataError("the last message is not the assistant's")
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "last_assistant":
            turns = turns[-1:]
        turns = [index for index in turns if messages[index].get("train", True)]
        if not turns:
            raise DataError(
                "no message is trained: each answer that template.train_on selects has train: false"
            )
        messages = self.template.guarded(messages)
        if self.train_on == "all":
            text = self.template.rendered(messages, tools, generation=False)[0]
            return [[Segment(text, True, "all")]]
        try:
            return [self._cut(messages, tools, turns)]
        except _RewrittenError:
            return [self._cut(messages[: index + 1], tools, [index]) for index in turns]

    def _cut(self, messages: list[Message], tools: Tools, turns: list[int]) -> list[Segment]:
        whole, marks = self.template.rendered(messages, tools, generation=False)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if marks and len(marks) != len(answers):
            raise DataError(
                f"the chat template marks {len(marks)} spans as generated, but the conversation "
                f"has {len(answers)} answers\n    fix: a different template.chat_template"
            )
        spans: list[tuple[int, int]] = []
        for index in turns:
            last = index == len(messages) - 1
            prompt = self.template.rendered(messages[:index], tools, generation=True)[0]
            until = (
                whole if last else self.template.rendered(messages[: index + 1], tools, False)[0]
            )
            if not (whole.startswith(prompt) and whole.startswith(until)):
                if last:
                    raise DataError(
                        "the chat template does not render the answer after its own generation "
                        "prompt, so the trained text cannot be determined\n    fix: a different "
                        "template.chat_template, or answers that include their reasoning"
                    )
                raise _RewrittenError
            if marks:
                span = marks[answers.index(index)]
            else:
                answer = until[len(prompt) :]
                span = (len(prompt), len(prompt) + len(self.template.up_to_end_of_turn(answer)))
            self._check_answer(messages[index], whole[slice(*span)])
            spans.append(span)
        return self._segments(whole, messages, tools, spans)

    def _check_answer(self, message: Message, text: str) -> None:
        """Refuse a template whose output lacks a part of the answer."""
        reasoning = str(message.get("reasoning_content") or "").strip()
        calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
        content = "" if "</think>" in message["content"] else message["content"].strip()
        for what, part in (
            ("reasoning_content", reasoning),
            ("content", content),
            *(("tool_calls", name) for name in calls),
        ):
            if part not in text:
                raise DataError(
                    f"the chat template does not write the {what} of an answer\n"
                    "    fix: a template.chat_template that writes it, or remove it from the data"
                )

    def _segments(
        self, whole: str, messages: list[Message], tools: Tools, spans: list[tuple[int, int]]
    ) -> list[Segment]:
        """Split a text at the trained spans, and where a control token begins a message.

        No token extends over the beginning of a control token, so these splits change no token.

        Raises:
            DataError: The text lacks a message or the tools.
        """
        if tools and tools[0]["function"]["name"] not in whole:
            raise DataError(
                "the chat template does not write the tools\n"
                "    fix: a template.chat_template that writes them, or remove them from the data"
            )
        owners, position = [(0, str(messages[0]["role"]))], 0
        for index, message in enumerate(messages):
            role, content = str(message["role"]), message["content"].strip()
            at = whole.find(content, position)
            if role == "assistant" and index + 1 < len(messages):
                # The template may have dropped this answer, and a later one may have its text.
                then = messages[index + 1]["content"].strip()
                at = at if whole.find(then, at + len(content)) >= 0 else -1
            if at < 0 and role in ("system", "user"):
                raise DataError(
                    f"the chat template leaves out message {index + 1}, the {role} message\n"
                    "    fix: a different template.chat_template, or remove it from the data"
                )
            if at < 0:  # the template has changed an answer or a tool's message
                at, content = position, ""
            if index:
                gap = (
                    list(self.template.specials.finditer(whole, position, at))
                    if self.template.specials
                    else []
                )
                if len(gap) > 1:  # the end of one message and the beginning of the next
                    owners.append((gap[1].start(), role))
                elif role != "assistant":  # no safe split: all of it belongs to the later message
                    owners[-1] = (owners[-1][0], role)
            position = at + len(content)
        starts = [start for start, _ in owners]
        edges = sorted({0, len(whole), *starts, *(edge for span in spans for edge in span)})
        segments: list[Segment] = []
        for begin, end in itertools.pairwise(edges):
            trained = any(span[0] <= begin < span[1] for span in spans)
            role = "assistant" if trained else owners[bisect.bisect_right(starts, begin) - 1][1]
            segments.append(Segment(whole[begin:end], trained, role))
        return segments


class _RewrittenError(Exception):
    """The template renders a turn differently once later messages follow."""
