"""What is answered while a model trains: prompts of a list, of a file, or of held-out samples."""

from __future__ import annotations

import io
import itertools
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from sft.config.settings import Config
from sft.data.folders import resolve
from sft.data.locations import read
from sft.data.preview import parts_of
from sft.data.readers import TEXT, kind_of
from sft.data.row_encoder import IGNORE_INDEX
from sft.data.rows import BadRow, Row
from sft.data.sources import Source
from sft.data.text_encoder import Encoder
from sft.errors import DataError, SourceError
from sft.inference.answers import room

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from sft.data.prepared import Prepared
    from sft.data.template import Template

logger = logging.getLogger("sft")

START = 32  # tokens of a plain text that the model continues, at most half of it


class Prompt(NamedTuple):
    """A prompt that the model answers.

    Attributes:
        ids: Its token ids, as in training.
        text: Its text, as the model sees it.
        reference: The token ids of the answer in the data; None: there is none.
    """

    ids: list[int]
    text: str
    reference: list[int] | None = None


class Prompts:
    """The prompts of ``sample.prompts``; those of a file are read again each time."""

    def __init__(
        self, config: Config, template: Template, prepared: Prepared, model: PreTrainedModel
    ) -> None:
        """Read the prompts for the first time.

        Args:
            config: The run's config.
            template: Renders the prompts.
            prepared: The data, whose held-out samples are used if the setting is null.
            model: The model, with or without weights, whose positions limit a prompt.

        Raises:
            DataError: A prompt cannot be read or rendered, or is too long.
        """
        self.settings, self.template, self.model = config.sample, template, model
        self.renamed = Source(
            "", columns=config.dataset.columns, roles=config.dataset.roles
        ).renamed
        if self.settings.prompts is not None:
            self._good = self._read()
        else:
            assert prepared.eval is not None  # the settings have been checked
            taken = itertools.islice(spoken(prepared.eval.dataset), self.settings.num)
            decode = template.tokenizer.decode
            self._good = [Prompt(ids, decode(ids), answer) for ids, answer in taken]
        self.room = self._room(self._good)
        self._fault = ""

    def again(self) -> list[Prompt]:
        """Return the prompts, read again; if that fails, log it once and return the last ones."""
        if isinstance(self.settings.prompts, str):
            try:
                found = self._read()
                self.room, self._good, self._fault = self._room(found), found, ""
            except (DataError, OSError) as error:
                fault = str(error).partition("\n")[0]
                if fault != self._fault:
                    logger.info("warning: sample.prompts: %s; the previous prompts are used", fault)
                self._fault = fault
        return self._good

    def _read(self) -> list[Prompt]:
        given, template = self.settings.prompts, self.template
        encoder = Encoder(template.tokenizer)
        found = []
        try:
            for row in itertools.islice(self._rows(given), self.settings.num):
                text = template.render_prompt(row)
                found.append(Prompt(encoder.prompt(text, bos=template.adds_bos), text))
        except (DataError, OSError):
            raise
        # A row of training that a template or the tokenizer cannot take is refused like this, too.
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
            raise DataError(
                f"{given}: prompt {len(found) + 1} cannot be used: {fault}\n"
                "    fix: correct or remove it"
            ) from error
        if not found:
            raise DataError(f"{given} holds no prompts\n    fix: write one a line")
        return found

    def _rows(self, given: str | list[str]) -> Iterator[dict[str, object]]:
        if isinstance(given, list):
            yield from map(self.template.prompt_row, given)
            return
        lines = kind_of(given) in TEXT
        for row in rows_of(given, "sample.prompts"):
            if lines:
                # Not splitlines(): it also cuts at form feeds and at Unicode's separators.
                texts = io.StringIO(str(row.values["text"]), newline=None).read().split("\n")
                yield from map(self.template.prompt_row, filter(str.strip, texts))
            else:
                yield self.renamed(row.values)

    def _room(self, prompts: list[Prompt]) -> int:
        """Return how many tokens may follow a prompt.

        Raises:
            DataError: A prompt is as long as the model's context, or longer.
        """
        return room(self.model, [prompt.ids for prompt in prompts], self.settings.max_new_tokens)


def rows_of(path: str, setting: str) -> Iterator[Row]:
    """Yield the rows of a file of prompts.

    Raises:
        DataError: The file or one of its rows cannot be read.
    """
    try:
        for row in read(resolve(path)):
            if isinstance(row, BadRow):
                fix = "correct or remove it"
                raise DataError(f"{row.file}:{row.line}: {row.reason}\n    fix: {fix}")
            yield row
    except SourceError as error:  # which names the setting of training
        raise error.of(setting) from error


def last_answer(ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Split a document into what precedes its last trained span, and that span."""
    stop = len(labels)
    while labels[stop - 1] == IGNORE_INDEX:
        stop -= 1
    start = stop
    while start and labels[start - 1] != IGNORE_INDEX:
        start -= 1
    return ids[:start], ids[start:stop]


def spoken(samples: Iterable[dict[str, list[int]]]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the prompt and the answer of each document of held-out samples.

    All of a plain text is trained; its beginning is the prompt.
    """
    for sample in samples:
        for ids, labels in parts_of(sample):
            if all(label == IGNORE_INDEX for label in labels):
                continue  # the later part of a document that was cut
            prompt, answer = last_answer(ids, labels)
            if len(prompt) < 2 and len(answer) > 1:
                cut = len(prompt) + min(START, len(answer) // 2)
                prompt, answer = ids[:cut], ids[cut : len(prompt) + len(answer)]
            if prompt:
                yield prompt, answer
