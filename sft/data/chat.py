"""Find where each answer of a rendered conversation begins and ends."""

from __future__ import annotations

import bisect
import itertools
from functools import cached_property

from sft.data.beginnings import Beginnings, RewrittenError, Span
from sft.data.chat_parts import Parts, require_texts, texts_of
from sft.data.chat_template import ChatTemplate, Message, Tools
from sft.data.end_of_turn import End, end_of_turn
from sft.data.segment import Sample, Segment
from sft.errors import DataError


class Chat:
    """Cuts rendered conversations into what is trained and what is not.

    The trained part of an answer is what the model has to generate: from the end of the generation
    prompt up to the token that ends the turn. If the template has ``{% generation %}`` marks, only
    what they mark of it is trained.
    """

    def __init__(self, template: ChatTemplate, train_on: str) -> None:
        self.template = template
        self.train_on = train_on
        self.parts = Parts(template)
        self.beginnings = Beginnings(template, self.parts)

    def prompt(self, messages: list[Message], tools: Tools) -> str:
        """Return the text that generation starts from."""
        messages, tools = self.template.guarded(messages), self.template.guarded_value(tools)
        return self.template.rendered(messages, tools, generation=True).text

    @cached_property
    def end(self) -> End:
        """The token that ends an answer."""
        return end_of_turn(self.template, calls=False)

    @cached_property
    def end_of_call(self) -> End:
        """The token that ends an answer that calls a tool."""
        return end_of_turn(self.template, calls=True)

    @cached_property
    def stop_ids(self) -> list[int]:
        """The ids of the tokens at which generation stops."""
        tokens = [self.end.token]
        try:
            tokens.append(self.end_of_call.token)
        except DataError:  # the template has no tool calls
            pass
        tokenizer = self.template.tokenizer
        return sorted({int(tokenizer.convert_tokens_to_ids(token)) for token in tokens})

    def samples(self, messages: list[Message], tools: Tools, by_turn: bool = False) -> list[Sample]:
        """Render a conversation and split it into trained and untrained segments.

        Args:
            messages: The conversation, in OpenAI's form.
            tools: The tools that it may call.
            by_turn: Make a sample of each trained turn, even if the template needs none.

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
        weights = [message.get("weight", True) for message in messages]
        ours = ("train", "weight")
        messages = [{k: v for k, v in message.items() if k not in ours} for message in messages]
        messages, tools = self.template.guarded(messages), self.template.guarded_value(tools)
        if self.train_on == "all":
            return [self._whole(messages, tools)]
        if not by_turn:
            try:
                return [self._cut(messages, tools, turns, weights)]
            except RewrittenError:
                pass
        return [self._cut(messages[: index + 1], tools, [index], weights) for index in turns]

    def _whole(self, messages: list[Message], tools: Tools) -> Sample:
        """Train the whole text."""
        text = self.template.rendered(messages, tools, generation=False).text
        self.parts.require(messages, tools, list(range(len(messages))))
        answers = [(i, text) for i, m in enumerate(messages) if m["role"] == "assistant"]
        require_texts(text, messages, tools, answers)
        end = self._end_of(messages[-1])
        return Sample([Segment(text if end.written else text + end.token, True, "all")])

    def _end_of(self, message: Message) -> End:
        return self.end_of_call if message.get("tool_calls") else self.end

    def _cut(
        self, messages: list[Message], tools: Tools, turns: list[int], weights: list[float]
    ) -> Sample:
        whole, marks = self.template.rendered(messages, tools, generation=False)
        spans: dict[Span, float] = {}
        answers: list[tuple[int, str]] = []
        differs = False
        for index in turns:
            last = index == len(messages) - 1
            until = whole
            if not last:
                until = self.template.rendered(messages[: index + 1], tools, generation=False).text
            end = self._end_of(messages[index])
            if not end.written:  # the token begins the next message
                until += end.token
                whole = until if last else whole
            try:
                begin, alike = self.beginnings.begin(whole, messages, tools, index)
            except RewrittenError:
                if not last or len(turns) > 1:
                    raise
                whole, begin, marks = self.beginnings.after_prompt(whole, marks, messages, tools)
                until, alike = whole, True
            differs |= not alike
            stop = until.rfind(end.token, begin) + len(end.token)
            if stop < len(end.token):
                raise DataError(
                    f"the chat template does not end this answer with {end.token}, as it ends "
                    "others\n    fix: a different template.chat_template"
                )
            if whole[:stop] != until[:stop]:
                raise RewrittenError
            answers.append((index, whole[begin:stop]))
            spans |= dict.fromkeys(self._trained(begin, stop, marks), weights[index])
        self.parts.require(messages, tools, turns)
        require_texts(whole, messages, tools, answers)
        sample = self._segments(whole, messages, spans)
        sample.prompt_differs = differs
        return sample

    def _trained(self, begin: int, stop: int, marks: list[Span]) -> list[Span]:
        """Return the span of an answer, or what the template marks of it."""
        if not self.template.marks_answers:
            return [(begin, stop)]
        marked = [(max(begin, low), min(stop, high)) for low, high in marks]
        spans: list[Span] = []
        for low, high in sorted(span for span in marked if span[0] < span[1]):
            if spans and spans[-1][1] == low:  # one answer, marked in two steps
                low = spans.pop()[0]
            spans.append((low, high))
        if not spans:
            raise DataError(
                "the chat template marks no part of an answer as generated\n"
                "    fix: a different template.chat_template"
            )
        return spans

    def _segments(self, whole: str, messages: list[Message], spans: dict[Span, float]) -> Sample:
        """Split a text at the trained spans, which have weights, and where a message begins.

        A message begins with a control token.

        No token extends over the beginning of a control token, so these splits change no token.
        """
        owners, position = [(0, str(messages[0]["role"]))], 0
        for index, message in enumerate(messages):
            role = str(message["role"])
            content = texts_of(message)[-1] if texts_of(message) else ""
            at = whole.find(content, position)
            if role == "assistant" and index + 1 < len(messages):
                # The template may have dropped this answer, and a later one may have its text.
                then = (texts_of(messages[index + 1]) or [""])[0]
                at = at if whole.find(then, at + len(content)) >= 0 else -1
            if at < 0:  # the template has changed the message, or writes it elsewhere
                at, content = position, ""
            if index:
                gap = list(self.template.control.finditer(whole, position, at))
                if len(gap) > 1:  # the end of one message and the beginning of the next
                    owners.append((gap[1].start(), role))
                elif role != "assistant":  # no safe split: all of it belongs to the later message
                    owners[-1] = (owners[-1][0], role)
            position = at + len(content)
        owners = [owner for owner in owners if not any(a < owner[0] < b for a, b in spans)]
        starts = [start for start, _ in owners]
        edges = sorted({0, len(whole), *starts, *(edge for span in spans for edge in span)})
        sample = Sample()
        for begin, end in itertools.pairwise(edges):
            found = (weight for span, weight in spans.items() if span[0] <= begin < span[1])
            trained = next(found, False)
            role = "assistant" if trained else owners[bisect.bisect_right(starts, begin) - 1][1]
            sample.append(Segment(whole[begin:end], trained, role))
        return sample
