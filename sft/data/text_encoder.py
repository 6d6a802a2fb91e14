"""Stretches of text become token ids, with the same seams in training and in generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft.data.bpe import BytePairs
from sft.data.chat import SEAM
from sft.data.template import Segment
from sft.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Stretch = tuple[list[int], bool, str]  # ids, trained, role


class Encoder:
    """Encodes segments one by one, as generation does: a prompt's ids never depend on the answer.

    A tokenizer that would merge across the seam of prompt and completion thus cannot: the ids of
    the prompt are the same in training and in generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._fast: Tokenizer | None = None
        self._pairs: BytePairs | None = None
        if tokenizer.is_fast:
            from tokenizers import Tokenizer

            # A copy, that neither truncates nor pads whatever the tokenizer's file says.
            self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._fast.no_truncation()
            self._fast.no_padding()
        plain = self.encode(["a"])[0]
        special = tokenizer("a")["input_ids"]
        self.bos_ids: list[int] = special[: special.index(plain[0])] if plain else []
        # SentencePiece puts a space before the first word of a text; not inside one. Encoded after
        # a lead, which is then taken off, a segment keeps its own beginning.
        first = tokenizer.convert_ids_to_tokens(plain)[0]
        self._leads = ("\n", "a") if first.startswith(("\u2581", "\u0120")) else ()
        self._lead_ids = {lead: self.encode([lead])[0] for lead in self._leads}

    def accelerate(self) -> None:
        """Prepare for much text: worth a second's work where tiktoken can do the encoding."""
        if self._fast is not None and self._pairs is None:
            self._pairs = BytePairs.of(self._fast)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode texts as they are, without special tokens around them."""
        if self._pairs is not None:
            return self._pairs.encode(texts)
        if self._fast is not None:
            # Without offsets, which nothing here needs.
            found = self._fast.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in found]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def prompt(self, text: str, rendered: bool) -> list[int]:
        """Encode what generation starts from; a rendered chat holds its BOS already."""
        ids = self._parts([text], [True])[0]
        return ids if rendered else self._with_bos(ids)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Begin with what the tokenizer begins a text with, unless the text itself does."""
        return ids if ids[: len(self.bos_ids)] == self.bos_ids else self.bos_ids + ids

    def _parts(self, texts: Sequence[str], first: Sequence[bool]) -> list[list[int]]:
        """Encode stretches of text; ``first`` tells which of them begin one."""
        if not any(SEAM in text for text in texts):
            return self._led(texts, first)
        flat, starts, owners = [], [], []
        for index, (text, begins) in enumerate(zip(texts, first, strict=True)):
            for number, part in enumerate(text.split(SEAM)):
                flat.append(part)
                starts.append(begins and number == 0)
                owners.append(index)
        joined: list[list[int]] = [[] for _ in texts]
        for owner, ids in zip(owners, self._led(flat, starts), strict=True):
            joined[owner] += ids
        return joined

    def _led(self, texts: Sequence[str], first: Sequence[bool]) -> list[list[int]]:
        if not self._leads:
            return self.encode(list(texts))
        # A lead that a segment's own newline could merge with would be no lead.
        leads = [
            "" if begins else self._leads[text[:1].isspace()]
            for text, begins in zip(texts, first, strict=True)
        ]
        encoded = self.encode([lead + text for lead, text in zip(leads, texts, strict=True)])
        result = []
        for lead, ids, text in zip(leads, encoded, texts, strict=True):
            head = self._lead_ids.get(lead, [])
            if ids[: len(head)] != head:
                raise DataError(f"the tokenizer cannot encode {text[:40]!r} by itself")
            result.append(ids[len(head) :])
        return result

    def samples(
        self, rows: Sequence[list[Segment]], bos: bool, eos_id: int | None
    ) -> list[list[Stretch]]:
        """Give each row's (ids, trained, role), stretch by stretch.

        Args:
            rows: Each row's segments.
            bos: Whether to begin with what the tokenizer begins a text with.
            eos_id: Trained after the last segment, unless it is there already.
        """
        texts = [segment.text for row in rows for segment in row]
        first = [index == 0 for row in rows for index in range(len(row))]
        encoded = iter(self._parts(texts, first))
        result = []
        for row in rows:
            stretches = [(next(encoded), segment.trained, segment.role) for segment in row]
            if bos:
                ids, trained, role = stretches[0]
                head = self._with_bos(ids)[: len(self.bos_ids)] if self.bos_ids else []
                if ids[: len(head)] != head:
                    stretches.insert(0, (head, False, role))
            last, trained, role = stretches[-1]
            if eos_id is not None and last[-1:] != [eos_id]:
                stretches[-1] = ([*last, eos_id], trained, role)
            result.append(stretches)
        return result
