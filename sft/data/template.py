"""Render a row as text; no other module decides which of its characters are trained."""

from __future__ import annotations

import datetime
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.config.settings import TemplateConfig
from sft.config.template_settings import columns_of
from sft.data.chat import Chat
from sft.data.chat_template import ChatTemplate
from sft.data.flags import FLAGS, require_trained
from sft.data.formats import (
    Conversation,
    answer_of,
    conversation,
    conversation_of,
    format_of,
    history_of,
    recognise,
)
from sft.data.segment import Sample, Segment, control_of
from sft.data.values import (
    Empty,
    is_filled,
    is_known,
    present,
    refuse,
    unused,
)
from sft.data.variants import Filled, fill, require_filled
from sft.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection

    from transformers import PreTrainedTokenizerBase


class Rendered(NamedTuple):
    """What a row becomes.

    Attributes:
        samples: The segments of each sample.
        unused: Columns, and keys of messages as COLUMN.KEY, that the row fills but no sample holds.
        empty_answers: Whether an answer is left untrained because it is empty.
    """

    samples: list[Sample]
    unused: tuple[str, ...]
    empty_answers: bool = False


def _is_empty(message: dict[str, Any]) -> bool:
    """Return whether an answer has no text, no tool call and no reasoning."""
    parts = ("tool_calls", "reasoning_content")
    return not message["content"].strip() and not any(message.get(part) for part in parts)


class Template:
    """Renders rows and prompts with one template and one tokenizer.

    Training and generation both use it, so that a prompt is the same string in both.
    """

    def __init__(
        self, config: TemplateConfig, tokenizer: PreTrainedTokenizerBase, format: str = "auto"
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.format = format
        self.answers = {name for text in config.completions for name in columns_of(text)}
        prompts = {name for text in config.prompts for name in columns_of(text)}
        # A column that the template writes is text, whatever its name is.
        self.flags = FLAGS - self.answers - prompts
        self.train_on = config.train_on or {
            "chat": "assistant",
            "completion": "completion",
            "text": "all",
        }.get(config.kind)
        self.control: re.Pattern[str] | None = None  # control tokens that are text in the columns
        default = "text" if config.kind == "completion" else "token"
        if config.kind != "chat" and (config.control_tokens or default) == "text":
            self.control = control_of(tokenizer, "".join((*config.prompts, *config.completions)))
        self.chat: Chat | None = None
        if config.kind == "chat":
            given = ChatTemplate(tokenizer, config.chat_template, config.kwargs)
            if config.date is None and given.writes_date:
                config.date = datetime.date.today().isoformat()  # saved with the run's settings
            given.date = datetime.date.fromisoformat(config.date) if config.date else None
            self.chat = Chat(given, str(self.train_on))

    def render(self, row: dict[str, Any]) -> list[Sample]:
        """Return the samples of a row.

        A row gives one sample. If a chat template rewrites the history of a conversation, each
        trained turn is a sample of its own, in the context in which it would be generated.

        Raises:
            Empty: There is nothing to train.
            DataError: The row does not fit its format or the template.
        """
        return self.rendered(row).samples

    def rendered(self, row: dict[str, Any], by_turn: bool = False) -> Rendered:
        """Render a row as ``render`` does, and report what of it was not used.

        Args:
            row: The row.
            by_turn: Make a sample of each trained turn of a conversation.

        Raises:
            Empty: There is nothing to train.
            DataError: As ``render``; or a column is not used although it changes what is trained.
        """
        row = present(row)
        if not self.flags.isdisjoint(row):
            require_trained(row, self.flags)
        format = format_of(row, self.format)
        talk = conversation_of(row, format)
        if talk is None and self.chat is not None:
            talk = self._paired(row, format, self._completion(row, format))
        if talk is not None:
            return self._chat_of(row, talk, by_turn)
        completion, used = self._completion(row, format)
        if self.config.kind == "text":
            sample = Sample([Segment(completion, True, "text")])
        else:
            prompt, names = self._filled(self.config.prompts, row, format, "prompt")
            used += names
            asked = Segment(prompt, self.train_on == "all")
            sample = Sample([asked, Segment(completion, True, "completion")])
        return Rendered([sample], self._unused(row, used))

    def _chat_of(self, row: dict[str, Any], talk: Conversation, by_turn: bool) -> Rendered:
        """Render a conversation."""
        if self.chat is None:
            raise DataError(
                f"the row is a conversation, which template={self.config.name} cannot render\n"
                "    fix: template=chat, or template=plain-chat without a chat template"
            )
        refuse(sorted(filter(is_known, talk.unused)), str(self.config.name))
        left = (*self._unused(row, talk.used), *sorted(talk.unused))
        messages, empty = self._trained(self._with_system(talk.messages))
        samples = self.chat.samples(messages, talk.tools, by_turn)
        if talk.named and self.chat.parts.drops_names(messages, talk.tools):
            left += tuple(sorted(talk.named))
        return Rendered(samples, left, empty)

    def _trained(self, messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], bool]:
        """Return messages of which no empty answer is trained, and whether there was one.

        Raises:
            Empty: No answer is left.
        """
        if messages[-1]["role"] != "assistant":
            return messages, False
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "last_assistant":
            answers = answers[-1:]
        chosen = [i for i in answers if messages[i].get("train", True)]
        weighted = any("weight" in messages[i] for i in chosen)
        if self.train_on == "all" and (len(chosen) < len(answers) or weighted):
            what = "a weight below 1" if weighted else "train: false or weight 0"
            raise DataError(
                f"an answer of the row has {what}, and template.train_on=all trains every token\n"
                "    fix: template.train_on=assistant"
            )
        if not chosen:
            raise Empty(
                "there is nothing to train: no message is trained, because each answer that "
                "template.train_on selects has train: false or weight 0"
            )
        empty = [i for i in chosen if _is_empty(messages[i])]
        if len(empty) == len(chosen):
            raise Empty("there is nothing to train: the answer is empty")
        if not empty:
            return messages, False
        return [{**m, "train": False} if i in empty else m for i, m in enumerate(messages)], True

    def _unused(self, row: dict[str, Any], used: Collection[str]) -> tuple[str, ...]:
        left = [name for name in row if name not in used and name not in self.flags]
        return unused(row, left, str(self.config.name), tokens=False) if left else ()

    def render_prompt(self, row: dict[str, Any]) -> str:
        """Return the text that generation starts from: everything before the last answer.

        Plain text has no answer: generation continues all of it.
        """
        row = present(row)
        # Rows to answer need not have the answer's columns, which dataset.format asks for.
        name = "prompt_completion" if isinstance(row.get("prompt"), list) else recognise(row)
        if self.config.kind == "text":
            return self._filled(self.config.completions, row, name, "text")[0]
        if self.chat is None:
            return self._filled(self.config.prompts, row, name, "prompt")[0]
        talk = conversation_of(row, name, answered=False) or self._paired(row, name)
        messages = self._with_system(talk.messages)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self.chat.prompt(messages, talk.tools)

    @property
    def adds_bos(self) -> bool:
        """Whether samples and prompts begin with what the tokenizer puts before a document."""
        if self.config.bos is not None:
            return self.config.bos == "tokenizer"
        return self.chat is None

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end an answer: those of the chat template, or EOS."""
        if self.chat is not None:
            return self.chat.stop_ids
        return [self.tokenizer.eos_token_id] if self.config.append_eos else []

    def prompt_row(self, prompt: str) -> dict[str, Any]:
        """Return a row that holds only a prompt, for the first variant with a single column."""
        for variant in self.config.prompts or self.config.completions:
            names = columns_of(variant)
            if len(names) == 1:
                return {names[0]: prompt}
        raise DataError(
            f"no prompt of template={self.config.name} has a single column for prompt=...\n"
            "    fix: file=rows.jsonl, with all columns"
        )

    def _completion(self, row: dict[str, Any], format: str) -> Filled:
        """Return the text of the completion, and its columns."""
        found = fill(self.config.completions, row, format, self.control)
        if found is None or not found[1]:
            values = [row[name] for name in self.answers if name in row]
            if values and not any(map(is_filled, values)):
                raise Empty("there is nothing to train: the completion is empty")
        name = str(self.config.name)
        return require_filled(found, self.config.completions, row, "completion", name)

    def _filled(self, variants: list[str], row: dict[str, Any], format: str, what: str) -> Filled:
        found = fill(variants, row, format, self.control)
        return require_filled(found, variants, row, what, str(self.config.name))

    def _paired(
        self, row: dict[str, Any], format: str, completion: Filled | None = None
    ) -> Conversation:
        """Make a conversation of a row's history, its prompt and its completion, if it is given."""
        prompt, used = self._filled(self.config.prompts, row, format, "prompt")
        turns = [*history_of(row), ("prompt", {"role": "user", "content": prompt})]
        if completion is not None:
            turns.append(("completion", answer_of(completion[0], row)))
            used += (*completion[1], "reasoning_content")
        return conversation(turns, row, {*used, "history"})

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.config.system is not None and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.config.system}, *messages]
        return messages
