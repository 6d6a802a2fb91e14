"""Render conversations with a Jinja chat template, and find where each answer begins and ends."""

from __future__ import annotations

import bisect
import itertools
import re
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A private-use character that is inserted into control tokens which the data holds as text, and
# removed on encoding: both halves are encoded separately, so that a user's text cannot end a turn.
SEAM = "\uf8f0"
Piece = tuple[str, bool, str]  # text, trained, role
Message = dict[str, Any]
Tools = list[dict[str, Any]] | None


def require_no_seam(text: str) -> None:
    """Refuse text that holds the character SEAM.

    Raises:
        DataError: The text holds it; encoding would remove it.
    """
    if SEAM in text:
        raise DataError("the text holds the private-use character U+F8F0, which sft reserves")


def named_template(name: str) -> str:
    """Return a chat template's text: the Jinja given, a file's, or that of one that TRL ships.

    Raises:
        DataError: There is no such file or template.
    """
    if "{%" in name or "{{" in name:
        return name
    if name.endswith(".jinja"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError(f"there is no file {name}\n    fix: template.chat_template=FILE.jinja")
        return path.read_text(encoding="utf-8")
    spec = find_spec("trl")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "chat_templates"
    path = folder / f"{name}.jinja"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.jinja")))
        raise DataError(
            f"there is no chat template {name}; there are {known}\n"
            "    fix: template.chat_template=FILE.jinja"
        )
    return path.read_text(encoding="utf-8")


class Chat:
    """One tokenizer's chat template.

    The trained part of an answer is what the model has to generate: from the end of the generation
    prompt up to the token that ends the turn. If the template has ``{% generation %}`` markers,
    they decide instead.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, train_on: str
    ) -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        if chat_template is not None:
            # Set it on the tokenizer, which is saved with the adapter.
            tokenizer.chat_template = named_template(chat_template)
        if not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template\n"
                "    fix: template=plain-chat, template=completion or template=alpaca, or an "
                "instruction-tuned model"
            )

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        tokens = self.tokenizer.added_tokens_decoder.values()
        # Longest first, so that no token matches as the beginning of a longer one.
        names = sorted((token.content for token in tokens if token.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def prompt(self, messages: list[Message], tools: Tools) -> str:
        """Return the text that generation starts from."""
        return self._rendered(self._guarded(messages), tools, generation=True)[0]

    def end_of_turn(self) -> str:
        """Return the trained text of a short answer, which ends like every assistant turn."""
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
        return next(text for text, trained, _ in self._cut(turn, None, [1]) if trained)

    def samples(self, messages: list[Message], tools: Tools) -> list[list[Piece]]:
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
        messages = self._guarded(messages)
        if self.train_on == "all":
            text = self._rendered(messages, tools, generation=False)[0]
            return [[(text, True, "all")]]
        try:
            return [self._cut(messages, tools, turns)]
        except _RewrittenError:
            return [self._cut(messages[: index + 1], tools, [index]) for index in turns]

    def _guarded(self, messages: list[Message]) -> list[Message]:
        """Insert SEAM into control tokens that the data holds as text."""
        specials = self._specials

        def guard(value: Any) -> Any:
            if not isinstance(value, str):
                return value
            require_no_seam(value)
            if specials is None:
                return value
            return specials.sub(lambda found: found[0][0] + SEAM + found[0][1:], value)

        return [
            {
                key: guard(value) if key in ("content", "reasoning_content") else value
                for key, value in message.items()
                if key != "train"
            }
            for message in messages
        ]

    def _rendered(
        self, messages: list[Message], tools: Tools, generation: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text and the spans that ``{% generation %}`` marks, if any."""
        from transformers.utils.chat_template_utils import render_jinja_template

        template = self.tokenizer.get_chat_template(None, tools)
        marked = not generation and re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None
        try:
            texts, spans = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                add_generation_prompt=generation,
                return_assistant_tokens_mask=marked,
                **self.tokenizer.special_tokens_map,
            )
        except Exception as error:  # the template is arbitrary Jinja: it may raise anything
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return str(texts[0]), [tuple(span) for span in spans[0]] if marked else []

    def _cut(self, messages: list[Message], tools: Tools, turns: list[int]) -> list[Piece]:
        whole, marks = self._rendered(messages, tools, generation=False)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if marks and len(marks) != len(answers):
            raise DataError(
                f"the chat template marks {len(marks)} spans as generated, but the conversation "
                f"has {len(answers)} answers\n    fix: a different template.chat_template"
            )
        spans: list[tuple[int, int]] = []
        for index in turns:
            last = index == len(messages) - 1
            prompt = self._rendered(messages[:index], tools, generation=True)[0]
            until = whole if last else self._rendered(messages[: index + 1], tools, False)[0]
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
                span = (len(prompt), len(prompt) + len(self._up_to_end_of_turn(answer)))
            self._check_answer(messages[index], whole[slice(*span)])
            spans.append(span)
        return self._pieces(whole, messages, tools, spans)

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

    def _pieces(
        self, whole: str, messages: list[Message], tools: Tools, spans: list[tuple[int, int]]
    ) -> list[Piece]:
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
                gap = list(self._specials.finditer(whole, position, at)) if self._specials else []
                if len(gap) > 1:  # the end of one message and the beginning of the next
                    owners.append((gap[1].start(), role))
                elif role != "assistant":  # no safe split: all of it belongs to the later message
                    owners[-1] = (owners[-1][0], role)
            position = at + len(content)
        starts = [start for start, _ in owners]
        edges = sorted({0, len(whole), *starts, *(edge for span in spans for edge in span)})
        pieces: list[Piece] = []
        for begin, end in itertools.pairwise(edges):
            trained = any(span[0] <= begin < span[1] for span in spans)
            owner = owners[bisect.bisect_right(starts, begin) - 1][1]
            pieces.append((whole[begin:end], trained, "assistant" if trained else owner))
        return pieces

    def _up_to_end_of_turn(self, text: str) -> str:
        """Remove what follows the token that ends the turn, such as newlines or a second EOS."""
        specials = self._specials
        end = None
        if specials is not None:
            pattern = specials.pattern
            end = re.fullmatch(rf"(.*?(?:{pattern}))(?:\s|{pattern})*", text, re.DOTALL)
        if end is None:
            raise DataError(
                "the chat template ends an assistant turn with no special token, so the model "
                "would never learn to stop\n    fix: template=completion, or a different "
                "template.chat_template"
            )
        return end[1]


class _RewrittenError(Exception):
    """The template renders a turn differently once later messages follow."""
