"""Byte-level BPE by tiktoken: the very ids that tokenizers gives, several times as fast."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# What ByteLevel cuts a text by, unless a Split does (openai/gpt-2, src/encoder.py), with as little
# as possible outside the part without look-ahead, which runs as an automaton. The last alternative
# matches one space only: of several `\s+(?!\S)` takes all but one.
GPT2 = r"(?:'(?:[stmd]|re|ve|ll)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
UTF8 = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that text can have
LONG_SPACE = re.compile(r"\s{10000}")  # tiktoken's pattern engine runs out of stack on more


class BytePairs:
    """Encodes texts as a tokenizer does; by that tokenizer itself where that is not certain.

    Both merge alike. Let a token be reachable where its bytes alone encode to it. Where two
    neighbours in a half-merged text are together a reachable token, they are its last two parts:
    its bytes merge here as they do alone, since no merge has crossed their edges. Hence ranking
    pairs by the token that they make (tiktoken) is ranking them by the list of merges
    (tokenizers), and an unreachable token occurs in no text.

    Both cut alike, by the same pattern, where they agree on what a letter, a number and a space is:
    each character is compared before it is first relied on.
    """

    def __init__(
        self, tokenizer: Tokenizer, settings: dict[str, Any], pattern: str, tokens: dict[bytes, int]
    ) -> None:
        import tiktoken

        self._tokenizer = tokenizer
        merged = [number for token, number in tokens.items() if len(token) > 1]
        # Ids that ascend in the order of merging are ranks themselves, and need no translation.
        ascending = all(low < high for low, high in itertools.pairwise(merged))
        self._ids = None if ascending else list(tokens.values())  # by rank
        ranks = tokens if ascending else {token: rank for rank, token in enumerate(tokens)}
        self._encode = tiktoken.Encoding(
            "bytes", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        ).encode_ordinary
        self._composes = settings["normalizer"] is not None
        self._added = {token["content"]: token["id"] for token in settings["added_tokens"]}
        longest_first = sorted(self._added, key=len, reverse=True)
        self._cut = re.compile(f"({'|'.join(map(re.escape, longest_first))})")
        self._alike: set[str] = set(map(chr, range(128)))
        self._unlike: set[str] = set()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> BytePairs | None:
        """Take over a tokenizer's settings; None where they are others than we can prove."""
        settings = json.loads(tokenizer.to_str())
        model, added = settings["model"], settings["added_tokens"]
        pattern = _pattern(settings["pre_tokenizer"])
        groups = [
            {char for token in added if token["normalized"] is flag for char in token["content"]}
            for flag in (False, True)
        ]
        if (
            model["type"] != "BPE"
            or any(model.get(name) for name in ("dropout", "byte_fallback", *AFFIXES))
            or settings["normalizer"] not in (None, {"type": "NFC"})
            or pattern is None
            or any(token[name] for token in added for name in ("lstrip", "rstrip", "single_word"))
            or not all(token["content"].isascii() for token in added)
            or groups[0] & groups[1]
        ):
            return None
        tokens = _reachable(settings)
        return None if tokens is None else cls(tokenizer, settings, pattern, tokens)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts as they are, without special tokens around them."""
        certain = self._certain(texts)
        unsure = [text for text, sure in zip(texts, certain, strict=True) if not sure]
        others = iter(self._tokenizer.encode_batch_fast(unsure, add_special_tokens=False))
        return [
            self._one(text) if sure else next(others).ids
            for text, sure in zip(texts, certain, strict=True)
        ]

    def _one(self, text: str) -> list[int]:
        parts = self._cut.split(text) if self._added else [text]
        if len(parts) == 1:
            return self._merged(text)
        result: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:
                result.append(self._added[part])
            elif part:
                result += self._merged(part)
        return result

    def _merged(self, text: str) -> list[int]:
        ranks = self._encode(text)
        return ranks if self._ids is None else [self._ids[rank] for rank in ranks]

    def _certain(self, texts: Sequence[str]) -> list[bool]:
        """Tell of each text whether both are known to encode it alike."""
        wide = {index: set(text) for index, text in enumerate(texts) if not text.isascii()}
        self._compare(set().union(*wide.values()) - self._alike - self._unlike)
        return [
            (index not in wide or self._plain(text, wide[index]))
            and (len(text) < 10_000 or LONG_SPACE.search(text) is None)
            for index, text in enumerate(texts)
        ]

    def _plain(self, text: str, characters: set[str]) -> bool:
        composed = not self._composes or unicodedata.is_normalized("NFC", text)
        return composed and characters.isdisjoint(self._unlike)

    def _compare(self, characters: set[str]) -> None:
        """Encode characters beside every kind of neighbour, by both."""
        for char in characters:
            probes = [f"a{char}a", f"1{char}1", f" {char} ", f"!{char}!", f"'{char}", f"{char}\n"]
            # Characters that are new to Python might compose with others.
            known = unicodedata.category(char) not in ("Cn", "Cs")
            theirs = self._tokenizer.encode_batch_fast(
                probes if known else [], add_special_tokens=False
            )
            alike = known and all(
                self._one(probe) == encoding.ids
                for probe, encoding in zip(probes, theirs, strict=True)
            )
            (self._alike if alike else self._unlike).add(char)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """Give the one pattern that a text is cut by; None where it is done in another way."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, **others}:
            return GPT2 if others.get("use_regex", True) else None
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


def _reachable(settings: dict[str, Any]) -> dict[bytes, int] | None:
    """Give the ids of the tokens that merging can reach, in the order in which they are merged.

    None where a text may have other tokens, or cannot be told in these.
    """
    from tokenizers.models import BPE
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    model = settings["model"]
    vocabulary: dict[str, int] = model["vocab"]
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items() if byte in UTF8}
    if not vocabulary.keys() >= byte_of.keys():
        return None
    merges = [tuple(merge) for merge in model["merges"]]
    made = ("".join(merge) for merge in merges)
    letters = frozenset(byte_of)
    tokens = dict.fromkeys([*byte_of, *(token for token in made if letters.issuperset(token))])
    # Merging alone: a token's own letters, neither cut nor looked up whole. Without the model's
    # cache, which each token would enter and none would hit.
    alone = BPE(vocab=vocabulary, merges=merges, cache_capacity=0)
    reached = [token for token in tokens if len(alone.tokenize(token)) == 1]
    if model.get("ignore_merges"):
        added = {token["content"] for token in settings["added_tokens"]}
        if vocabulary.keys() - added - set(bytes_to_unicode().values()) - set(reached):
            return None
    return {bytes(map(byte_of.__getitem__, token)): vocabulary[token] for token in reached}
