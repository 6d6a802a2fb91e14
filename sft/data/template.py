"""A row becomes text, and each character of it is trained or not, decided here and nowhere else."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from sft.config import TemplateConfig, columns_of
from sft.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Segment(NamedTuple):
    """A stretch of a sample's text; ``trained`` says whether the loss sees it."""

    text: str
    trained: bool


def fill(variants: list[str], row: dict[str, Any]) -> str | None:
    """Fill the first variant all of whose columns the row has and does not leave empty."""
    for variant in variants:
        values = {name: row.get(name) for name in columns_of(variant)}
        if all(value is not None and value != "" for value in values.values()):
            return variant.format(**values)
    return None


class Template:
    """Renders rows and prompts with one template and one tokenizer.

    Training and generation both come through here, so that a prompt is the same string in both.
    """

    def __init__(self, config: TemplateConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.tokenizer = tokenizer
        if config.kind == "chat" and not tokenizer.chat_template:
            raise DataError(
                "the tokenizer has no chat template\n"
                "    fix: template=completion or template=alpaca, or an instruction-tuned model"
            )

    def is_empty(self, row: dict[str, Any]) -> bool:
        """Tell whether a row has the columns to be trained, and nothing in any of them."""
        if self.config.kind == "chat" and row.get("messages"):
            return False
        names = {name for text in self.config.completions for name in columns_of(text)}
        values = [row[name] for name in names if name in row]
        return bool(values) and all(value is None or value == "" for value in values)

    def render(self, row: dict[str, Any]) -> list[Segment]:
        """Give a row's text in segments.

        Raises:
            DataError: The row lacks a column that the template needs, or has nothing to train.
        """
        if self.config.kind == "chat":
            return self._chat_segments(self._messages(row))
        completion = self._filled(self.config.completions, row, "completion")
        if self.config.kind == "text":
            return [Segment(completion, True)]
        return [
            Segment(self._filled(self.config.prompts, row, "prompt"), False),
            Segment(completion, True),
        ]

    def render_prompt(self, row: dict[str, Any]) -> str:
        """Give the text that generation starts from: all that precedes the last trained part.

        Plain text has no such seam: generation goes on from the whole of it.
        """
        if self.config.kind == "text":
            return self._filled(self.config.completions, row, "text")
        segments = self.render({**row, **self._placeholder(row)})
        last = max(index for index, segment in enumerate(segments) if segment.trained)
        return "".join(segment.text for segment in segments[:last])

    def answer(self, row: dict[str, Any]) -> str:
        """Give the last trained part of a row: what a perfect model would say to its prompt."""
        return [segment.text for segment in self.render(row) if segment.trained][-1]

    def stop_id(self) -> int | None:
        """Give the token that ends an assistant's turn, which need not be the tokenizer's EOS."""
        if self.config.kind != "chat":
            return None
        turn = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "?"}]
        text = next(segment.text for segment in self._chat_segments(turn) if segment.trained)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids[-1]

    def prompt_row(self, prompt: str) -> dict[str, Any]:
        """Make a row of a bare prompt, for the first variant that has a single column."""
        for variant in self.config.prompts or self.config.completions:
            names = columns_of(variant)
            if len(names) == 1:
                return {names[0]: prompt}
        raise DataError(
            f"the template {self.config.name} has no prompt of one column\n"
            "    fix: give a file of rows, file=rows.jsonl"
        )

    def _placeholder(self, row: dict[str, Any]) -> dict[str, Any]:
        """Fill in some completion, where a row to be answered has none."""
        if row.get("messages"):
            messages = list(row["messages"])
            if messages[-1].get("role") != "assistant":
                messages.append({"role": "assistant", "content": "?"})
            return {"messages": messages}
        if fill(self.config.completions, row) is not None:
            return {}
        return dict.fromkeys(columns_of(self.config.completions[0]), "?")

    def _filled(self, variants: list[str], row: dict[str, Any], what: str) -> str:
        text = fill(variants, row)
        if text is None:
            needed = " or ".join(
                " + ".join(columns_of(variant)) or repr(variant) for variant in variants
            )
            given = ", ".join(name for name, value in row.items() if value not in (None, ""))
            fix = f"dataset.columns.{columns_of(variants[0])[0]}=COLUMN, or another template"
            raise DataError(
                f"the template {self.config.name} makes no {what} of this row: it needs the "
                f"columns {needed}; the row fills {given or 'none'}\n"
                f"    fix: {'template=chat' if row.get('messages') else fix}"
            )
        return text

    def _messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        if row.get("messages"):
            messages = [dict(message) for message in row["messages"]]
            if messages[-1].get("role") != "assistant":
                raise DataError("the last message is not the assistant's: nothing to train")
        else:
            messages = [
                {"role": "user", "content": self._filled(self.config.prompts, row, "prompt")},
                {
                    "role": "assistant",
                    "content": self._filled(self.config.completions, row, "completion"),
                },
            ]
        if self.config.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.config.system})
        return messages

    def _chat_segments(self, messages: list[dict[str, Any]]) -> list[Segment]:
        """Cut a rendered conversation at each assistant turn; its end-of-turn token is trained.

        Raises:
            DataError: The chat template renders a prefix of the conversation differently from the
                whole (as templates that drop earlier reasoning do), so that no cut is exact.
        """
        whole = self._rendered(messages, generation=False)
        segments: list[Segment] = []
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            start = self._rendered(messages[:index], generation=True)
            end = self._rendered(messages[: index + 1], generation=False)
            if not (end.startswith(start) and whole.startswith(end) and len(start) >= done):
                raise DataError(
                    "the chat template renders the beginning of a conversation differently from "
                    "the whole, so what is trained cannot be told exactly\n"
                    "    fix: rows with one assistant turn, or another chat template"
                )
            trained = self._up_to_end_of_turn(end[len(start) :])
            segments += [Segment(whole[done : len(start)], False), Segment(trained, True)]
            done = len(start) + len(trained)
        segments.append(Segment(whole[done:], False))
        return [segment for segment in segments if segment.text]

    def _rendered(self, messages: list[dict[str, Any]], generation: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation
            )
        except Exception as error:  # the template is arbitrary Jinja: it may raise anything
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return str(text)

    def _up_to_end_of_turn(self, text: str) -> str:
        """Leave out what follows the token that ends the turn: newlines, a second EOS."""
        tokens = self.tokenizer.added_tokens_decoder.values()
        special = "|".join(re.escape(token.content) for token in tokens if token.special)
        pattern = rf"(.*?(?:{special}))(?:\s|{special})*"
        end = re.fullmatch(pattern, text, re.DOTALL) if special else None
        if end is None:
            raise DataError(
                "the chat template ends an assistant turn with no special token, so the model "
                "would never learn to stop\n    fix: template=completion, or another chat template"
            )
        return end[1]
