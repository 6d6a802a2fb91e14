"""Render a row as text; no other module decides which of its characters are trained."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from sft.config.data_settings import columns_of
from sft.config.settings import TemplateConfig
from sft.data.chat import Chat
from sft.data.chat_template import ChatTemplate
from sft.data.formats import normalise
from sft.data.segment import Sample, Segment, require_no_break
from sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Empty(DataError):
    """A row has the columns to be trained, but all of them are empty."""


def fill(variants: list[str], row: dict[str, Any]) -> str | None:
    """Fill the first variant whose columns are all filled in the row; None if there is none."""
    for variant in variants:
        values = {name: row.get(name) for name in columns_of(variant)}
        if all(value is not None and value != "" for value in values.values()):
            return variant.format(**values)
    return None


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
        self.train_on = config.train_on or {
            "chat": "assistant",
            "completion": "completion",
            "text": "all",
        }.get(config.kind)
        self.chat: Chat | None = None
        if config.kind == "chat":
            given = ChatTemplate(tokenizer, config.chat_template, config.kwargs)
            if config.date is None and given.writes_date:
                config.date = datetime.date.today().isoformat()  # saved with the run's settings
            given.date = datetime.date.fromisoformat(config.date) if config.date else None
            self.chat = Chat(given, str(self.train_on))

    def render(self, row: dict[str, Any], by_turn: bool = False) -> list[Sample]:
        """Return the samples of a row.

        A row gives one sample. If a chat template rewrites the history of a conversation, each
        trained turn is a sample of its own, in the context in which it would be generated.

        Raises:
            Empty: There is nothing to train.
            DataError: The row does not fit its format or the template.
        """
        row = normalise(row, self.format)
        if self.chat is not None:
            messages = self._messages(row)
            return self.chat.samples(messages, row.get("tools"), by_turn)
        if "messages" in row:
            raise DataError(
                f"the row is a conversation, which template={self.config.name} cannot render\n"
                "    fix: template=chat, or template=plain-chat without a chat template"
            )
        completion = self._completion(row)
        if self.config.kind == "text":
            return [Sample([Segment(completion, True, "text")])]
        prompt = self._filled(self.config.prompts, row, "prompt")
        trains_prompt = self.train_on == "all"
        answer = Segment(completion, True, "completion")
        return [Sample([Segment(prompt, trains_prompt), answer])]

    def render_prompt(self, row: dict[str, Any]) -> str:
        """Return the text that generation starts from: everything before the last answer.

        Plain text has no answer: generation continues all of it.
        """
        if self.config.kind == "text":
            return self._filled(self.config.completions, row, "text")
        if self.chat is None:
            return self._filled(self.config.prompts, row, "prompt")
        if not ({"messages", "conversations"} & row.keys()):
            messages = self._with_system(
                [{"role": "user", "content": self._filled(self.config.prompts, row, "prompt")}]
            )
            return self.chat.prompt(messages, None)
        row = normalise(row, self.format)
        messages = self._with_system(row["messages"])
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        return self.chat.prompt(messages, row.get("tools"))

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

    def _completion(self, row: dict[str, Any]) -> str:
        names = {name for text in self.config.completions for name in columns_of(text)}
        values = [row[name] for name in names if name in row]
        if values and all(value is None or value == "" for value in values):
            raise Empty("there is nothing to train: the completion is empty")
        return self._filled(self.config.completions, row, "completion")

    def _filled(self, variants: list[str], row: dict[str, Any], what: str) -> str:
        text = fill(variants, row)
        if text is None:
            needed = " or ".join(
                " + ".join(columns_of(variant)) or repr(variant) for variant in variants
            )
            given = ", ".join(name for name, value in row.items() if value not in (None, ""))
            fix = f"dataset.columns.{columns_of(variants[0])[0]}=COLUMN, or a different template"
            raise DataError(
                f"template={self.config.name} cannot render a {what} of this row: it needs the "
                f"columns {needed}; the row fills {given or 'none'}\n    fix: {fix}"
            )
        require_no_break(text)
        return text

    def _messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if "messages" in row:
            return self._with_system(row["messages"])
        completion = self._completion(row)
        messages = [
            {"role": "user", "content": self._filled(self.config.prompts, row, "prompt")},
            {"role": "assistant", "content": completion},
        ]
        if isinstance(row.get("system"), str) and row["system"]:
            messages.insert(0, {"role": "system", "content": row["system"]})
        return self._with_system(messages)

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.config.system is not None and messages[0]["role"] != "system":
            return [{"role": "system", "content": self.config.system}, *messages]
        return messages
