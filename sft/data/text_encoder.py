"""Encode the segments of a text separately, in training as in generation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sft.data.bpe import BytePairs
from sft.data.segment import TOKEN_BREAK, Segment

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

TokenSpan = tuple[list[int], float, str]  # ids, weight in the loss (0: not trained), role


class _Piece(NamedTuple):
    """A text to encode after a context.

    Attributes:
        alike: Its ids do not depend on the context, or no later prompt of its row holds it.
    """

    context: str
    text: str
    alike: bool


NEUTRAL = ("\n", "a", "1", ".")  # white space is rarely merged with text, or text with white space
# An answer's left context of more characters is not encoded with it: the whole prompt of some
# templates, to no effect but the cost.
LONG = 200


class Encoder:
    """Encodes segments one by one, so that a prompt's ids never depend on the answer.

    If both were encoded together, a tokenizer could merge the end of the prompt with the beginning
    of the answer, and the prompt's ids would differ between training and generation.

    A segment is encoded after its left context, of which the ids are then removed: the text since
    the last control token, at which tokenizers split a text. SentencePiece adds a space to the
    first word of a text and after a control token, but not elsewhere, and some control tokens take
    the white space that follows them.
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
        added = list(tokenizer.added_tokens_decoder.values())
        names = sorted((token.content for token in added), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        first = tokenizer.convert_ids_to_tokens(plain)[0]
        # Whether the ids of a text differ at its beginning, and after a control token.
        self._adds_space = first.startswith(("\u2581", "\u0120"))
        self._takes_space = self._adds_space or any(token.rstrip for token in added)

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

    def prompt(self, text: str, bos: bool) -> list[int]:
        """Encode a prompt for generation.

        Args:
            text: The prompt; a text that contains TOKEN_BREAK is split there.
            bos: Whether to prepend the tokenizer's BOS, unless the text begins with it.
        """
        [spans] = self.samples([[Segment(text, False)]], bos, eos_id=None)
        assert spans is not None
        return [token for ids, _, _ in spans for token in ids]

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Prepend the tokenizer's BOS ids, unless the text begins with them."""
        return ids if ids[: len(self.bos_ids)] == self.bos_ids else self.bos_ids + ids

    def samples(
        self, rows: Sequence[Sequence[Segment]], bos: bool, eos_id: int | None
    ) -> list[list[TokenSpan] | None]:
        """Return (ids, trained, role) for each segment of each row.

        Args:
            rows: Each row's segments.
            bos: Whether to prepend the tokenizer's BOS.
            eos_id: Token to append to the last segment, unless it ends with it; None: none.

        Returns:
            The spans of each row. None for a row in which the tokenizer merges the end of a prompt
            with an answer that a later prompt holds: generation would see other ids there.
        """
        pieces = [piece for row in rows for piece in self._pieces(row)]
        encoded = self.encode([piece.context + piece.text for piece in pieces])
        contexts = list({piece.context for piece in pieces if piece.context})
        heads = dict(zip(contexts, self.encode(contexts), strict=True)) | {"": []}
        apart = [
            index
            for index, (piece, ids) in enumerate(zip(pieces, encoded, strict=True))
            if ids[: len(heads[piece.context])] != heads[piece.context]
        ]
        again = self._apart([pieces[index].text for index in apart])
        for index, piece in enumerate(pieces):
            encoded[index] = encoded[index][len(heads[piece.context]) :]
        merged = set()
        for index, found in zip(apart, again, strict=True):
            encoded[index] = found or []
            if found is None or not pieces[index].alike:
                merged.add(index)
        result: list[list[TokenSpan] | None] = []
        place = 0
        for row in rows:
            spans: list[TokenSpan] = []
            begin = place
            for segment in row:
                ids: list[int] = []
                for _ in range(segment.text.count(TOKEN_BREAK) + 1):
                    ids += encoded[place]
                    place += 1
                spans.append((ids, segment.trained, segment.role))
            if merged and not merged.isdisjoint(range(begin, place)):
                result.append(None)
                continue
            result.append(self._ended(spans, bos, eos_id))
        return result

    def _ended(self, spans: list[TokenSpan], bos: bool, eos_id: int | None) -> list[TokenSpan]:
        """Add BOS and EOS to a row's spans."""
        if bos:
            ids, _, role = spans[0]
            head = self._with_bos(ids)[: len(self.bos_ids)] if self.bos_ids else []
            if ids[: len(head)] != head:
                spans.insert(0, (head, False, role))
        last, trained, role = spans[-1]
        if eos_id is not None and last[-1:] != [eos_id]:
            spans[-1] = ([*last, eos_id], trained, role)
        return spans

    def _pieces(self, row: Sequence[Segment]) -> Iterator[_Piece]:
        """Split a row's segments at TOKEN_BREAK; give each piece the context that it needs."""
        answers = max((n for n, segment in enumerate(row) if segment.trained), default=-1)
        # What the text since the last control token follows: that token, TOKEN_BREAK or nothing.
        follows, context = "", ""
        for number, segment in enumerate(row):
            for position, text in enumerate(segment.text.split(TOKEN_BREAK)):
                if position:
                    follows, context = TOKEN_BREAK, ""
                last = number >= answers
                # What follows TOKEN_BREAK has the same ids in every prompt that holds it.
                alike = last or position > 0
                yield _Piece(self._needed(follows, context, text, last), text, alike)
                for found in self._control.finditer(text):
                    follows, context, text = found[0], "", found.string[found.end() :]
                context += text

    def _needed(self, follows: str, context: str, text: str, last: bool) -> str:
        """Return the part of a left context that decides how a text is encoded."""
        if not text or not (follows or context) or self._control.match(text):
            return ""
        if context and last and (not follows or len(context) > LONG):
            return self._neutral(text)
        if follows == TOKEN_BREAK:
            follows = self._neutral(context or text)
        elif not self._takes_space:
            follows = ""
        return follows + context

    def _neutral(self, text: str) -> str:
        """Return a character that a text does not merge with, if its beginning would differ."""
        return NEUTRAL[text[:1].isspace()] if self._adds_space else ""

    def _apart(self, texts: list[str]) -> list[list[int] | None]:
        """Encode texts as if each stood within a text; None where nothing can precede a text."""
        if not self._adds_space:
            return list(self.encode(texts))
        found: list[list[int] | None] = [None] * len(texts)
        for lead in NEUTRAL:
            head = self.encode([lead])[0]
            for index, ids in enumerate(self.encode([lead + text for text in texts])):
                if found[index] is None and ids[: len(head)] == head:
                    found[index] = ids[len(head) :]
        return found
