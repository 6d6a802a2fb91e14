"""Find where an answer begins in a rendered conversation: where its generation prompt ends."""

from __future__ import annotations

from typing import Any

from sft.data.chat_parts import Parts
from sft.data.chat_template import ChatTemplate, Message, Tools
from sft.data.end_of_turn import AFTER
from sft.data.segment import shared_prefix
from sft.errors import DataError

Span = tuple[int, int]  # first character, and the one after the last


class RewrittenError(Exception):
    """The template renders a turn differently once later messages follow."""


class Beginnings:
    """Finds where answers begin.

    Args:
        template: Renders the conversations.
        parts: Tells their shapes.
    """

    def __init__(self, template: ChatTemplate, parts: Parts) -> None:
        self.template, self.parts = template, parts
        self._headers: dict[Any, int] = {}

    def begin(
        self, whole: str, messages: list[Message], tools: Tools, index: int
    ) -> tuple[int, bool]:
        """Return where an answer begins, and whether the generation prompt ends there."""
        if index == 0:
            first = self.template.rendered(messages[:1], tools, generation=False).text
            return self._first_begin(whole[: len(shared_prefix(whole, first))]), True
        prompt = self.template.rendered(messages[:index], tools, generation=True).text
        if whole.startswith(prompt):
            return len(prompt), True
        before = self.template.rendered(messages[:index], tools, generation=False).text
        if not whole.startswith(before):
            raise RewrittenError
        # The generation prompt goes on differently, for example with "<think>", which an answer
        # without reasoning lacks. The answer begins where both part, whatever its own text is.
        return len(before) + self._header(messages, tools, index), False

    def after_prompt(
        self, whole: str, marks: list[Span], messages: list[Message], tools: Tools
    ) -> tuple[str, int, list[Span]]:
        """Put the last answer after its generation prompt, in a text that has another beginning.

        Some templates write the reasoning before a call until the final answer follows it, so that
        generation sees what the whole conversation lacks.

        Returns:
            The generation prompt and the answer, where the answer begins, and the marks.

        Raises:
            DataError: The template does not begin the answer as its generation prompt ends.
        """
        before, prompt = (
            self.template.rendered(messages[:-1], tools, generation).text
            for generation in (False, True)
        )
        header = prompt[len(shared_prefix(before, prompt)) :]
        other = self.parts.marked(messages[-1:], None)[0]
        changed = self.template.rendered([*messages[:-1], *other], tools, generation=False).text
        at = whole.rfind(header, 0, len(shared_prefix(whole, changed)))
        if at < 0 or not header:
            raise DataError(
                "the chat template renders the messages before an answer differently once the "
                "answer follows, so the trained text cannot be determined\n"
                "    fix: a different template.chat_template"
            )
        begin = at + len(header)
        move = len(prompt) - begin
        moved = [(low + move, high + move) for low, high in marks]
        return prompt + whole[begin:], len(prompt), moved

    def _first_begin(self, first: str) -> int:
        """Return where the answer that begins a conversation begins: nothing is asked before it.

        Args:
            first: The conversation up to the end of this answer. A later answer may begin more as
                the generation prompt ends, such as with "<think>" and a line end.
        """
        user: list[Message] = [{"role": "user", "content": AFTER}]
        asked, prompt = (
            self.template.rendered(user, None, generation).text.rpartition(AFTER)[2]
            for generation in (False, True)
        )
        tokens = [found.end() for found in self.template.control.finditer(prompt)]
        common = len(shared_prefix(asked, prompt))
        header = prompt[max((end for end in tokens if end <= common), default=0) :].lstrip()
        # The end of the generation prompt may differ from the answer; see _header.
        ends = [found.end() for found in self.template.control.finditer(header)]
        for end in [len(header), *reversed(ends)] if header else ():
            if (at := first.find(header[:end])) >= 0:
                return at + end
        raise DataError(
            "the chat template does not show where an answer that begins a conversation begins\n"
            "    fix: a user message before it"
        )

    def _header(self, messages: list[Message], tools: Tools, index: int) -> int:
        """Return how many characters of an answer its generation prompt has, for any content."""
        key = self.parts.shape(messages[: index + 1], tools, [index])
        if key not in self._headers:
            made, tools, _ = self.parts.marked(messages[: index + 1], tools)
            texts = [
                self.template.rendered(made[:index], tools, generation=True).text,
                self.template.rendered(made, tools, generation=False).text,
            ]
            before = self.template.rendered(made[:index], tools, generation=False).text
            length = len(shared_prefix(*texts))
            for text in texts:  # two control tokens may begin alike
                tokens = self.template.control.finditer(text)
                length = min([length, *(t.start() for t in tokens if t.start() < length < t.end())])
            self._headers[key] = length - len(before)
        return self._headers[key]
