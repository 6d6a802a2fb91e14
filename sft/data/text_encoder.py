"""Encode the segments of a text separately, in training as in generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft.data.bpe import BytePairs
from sft.data.segment import TOKEN_BREAK, Segment
from sft.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TokenSpan = tuple[list[int], bool, str]  # ids, trained, role


class Encoder:
    """Encodes segments one by one, so that a prompt's ids never depend on the answer.

    If both were encoded together, a tokenizer could merge the end of the prompt with the beginning
    of the answer, and the prompt's ids would differ between training and generation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._fast: Tokenizer | None = None
        self._pairs: BytePairs | None = None
        if tokenizer.is_fast:
            from tokenizers import Tokenizer

            # Copy it, and disable any truncation and padding that the tokenizer's file sets.
            self._fast = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
            self._fast.no_truncation()
            self._fast.no_padding()
        plain = self.encode(["a"])[0]
        special = tokenizer("a")["input_ids"]
        self.bos_ids: list[int] = special[: special.index(plain[0])] if plain else []
        # SentencePiece adds a space before the first word of a text. A segment inside a text must
        # not get one: encode it after a short prefix, and remove the prefix's ids.
        first = tokenizer.convert_ids_to_tokens(plain)[0]
        self._leads = ("\n", "a") if first.startswith(("\u2581", "\u0120")) else ()
        self._lead_ids = {lead: self.encode([lead])[0] for lead in self._leads}

    def accelerate(self) -> None:
        """Switch to tiktoken if it gives the same ids; setting it up takes about a second."""
        if self._fast is not None and self._pairs is None:
            self._pairs = BytePairs.of(self._fast)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Encode texts without adding special tokens."""
        if self._pairs is not None:
            return self._pairs.encode(texts)
        if self._fast is not None:
            # The fast variant computes no offsets, and nothing here needs them.
            found = self._fast.encode_batch_fast(texts, add_special_tokens=False)
            return [encoding.ids for encoding in found]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def prompt(self, text: str, rendered: bool) -> list[int]:
        """Encode a prompt for generation; a rendered chat already has its BOS."""
        ids = self._parts([text], [True])[0]
        return ids if rendered else self._with_bos(ids)

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Prepend the tokenizer's BOS ids, unless the text begins with them."""
        return ids if ids[: len(self.bos_ids)] == self.bos_ids else self.bos_ids + ids

    def _parts(self, texts: Sequence[str], first: Sequence[bool]) -> list[list[int]]:
        """Encode segments, split at TOKEN_BREAK; ``first`` is true for those that begin a text."""
        if not any(TOKEN_BREAK in text for text in texts):
            return self._led(texts, first)
        flat, starts, owners = [], [], []
        for index, (text, begins) in enumerate(zip(texts, first, strict=True)):
            for number, part in enumerate(text.split(TOKEN_BREAK)):
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
        # The prefix must not merge with the segment: before whitespace it is a letter.
        leads = [
            "" if begins else self._leads[text[:1].isspace()]
            for text, begins in zip(texts, first, strict=True)
        ]
        encoded = self.encode([lead + text for lead, text in zip(leads, texts, strict=True)])
        result = []
        for lead, ids, text in zip(leads, encoded, texts, strict=True):
            head = self._lead_ids.get(lead, [])
            if ids[: len(head)] != head:
                raise DataError(f"the tokenizer cannot encode {text[:40]!r} separately")
            result.append(ids[len(head) :])
        return result

    def samples(
        self, rows: Sequence[list[Segment]], bos: bool, eos_id: int | None
    ) -> list[list[TokenSpan]]:
        """Return (ids, trained, role) for each segment of each row.

        Args:
            rows: Each row's segments.
            bos: Whether to prepend the tokenizer's BOS.
            eos_id: Token to append to the last segment, unless it ends with it; None: none.
        """
        texts = [segment.text for row in rows for segment in row]
        first = [index == 0 for row in rows for index in range(len(row))]
        encoded = iter(self._parts(texts, first))
        result = []
        for row in rows:
            spans = [(next(encoded), segment.trained, segment.role) for segment in row]
            if bos:
                ids, trained, role = spans[0]
                head = self._with_bos(ids)[: len(self.bos_ids)] if self.bos_ids else []
                if ids[: len(head)] != head:
                    spans.insert(0, (head, False, role))
            last, trained, role = spans[-1]
            if eos_id is not None and last[-1:] != [eos_id]:
                spans[-1] = ([*last, eos_id], trained, role)
            result.append(spans)
        return result
