"""Byte-level BPE with tiktoken: the same ids as tokenizers, several times as fast."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The pattern by which ByteLevel splits a text if no Split step does (openai/gpt-2, src/encoder.py).
# The first group needs no look-ahead, so it runs as an automaton; it holds as much as possible. The
# last alternative matches one space only: of several, `\s+(?!\S)` takes all but the last.
GPT2 = r"(?:'(?:[stmd]|re|ve|ll)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s"
AFFIXES = ("continuing_subword_prefix", "end_of_word_suffix")
UTF8 = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}  # bytes that occur in UTF-8
LONG_SPACE = re.compile(r"\s{10000}")  # tiktoken's regex engine exhausts its stack on more


class BytePairs:
    """Encodes texts with tiktoken if that gives the tokenizer's ids, else with the tokenizer.

    Both merge in the same order. Call a token reachable if its bytes alone encode to it. If two
    neighbours in a half-merged text together form a reachable token, they are the last two parts of
    that token: no merge has crossed its edges, so its bytes have merged as they do alone. Hence
    ranking pairs by the token that they form (tiktoken) equals ranking them by the list of merges
    (tokenizers), and an unreachable token occurs in no text.

    Both split a text by the same pattern if they agree which characters are letters, numbers and
    spaces. Each character is compared before tiktoken first encodes it.
    """

    def __init__(
        self, tokenizer: Tokenizer, settings: dict[str, Any], pattern: str, tokens: dict[bytes, int]
    ) -> None:
        import tiktoken

        self._tokenizer = tokenizer
        merged = [number for token, number in tokens.items() if len(token) > 1]
        # If ids ascend in merge order, they serve as ranks and need no translation.
        ascending = all(low < high for low, high in itertools.pairwise(merged))
        self._ids = None if ascending else list(tokens.values())  # ids in rank order
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
        """Build from a tokenizer's settings; None if the proof above does not cover them."""
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
        """Encode texts without adding special tokens."""
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
        """Return for each text whether tiktoken is known to give the tokenizer's ids."""
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
        """Check whether both encode each character alike next to every kind of neighbour."""
        for char in characters:
            probes = [f"a{char}a", f"1{char}1", f" {char} ", f"!{char}!", f"'{char}", f"{char}\n"]
            # NFC might compose a character that Python's Unicode tables lack with others.
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
    """Return the pattern that splits a text; None if the pre-tokenizer works differently."""
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
    """Return the ids of the tokens that merging can reach, in merge order.

    None if the vocabulary lacks a byte, or if a text may hold a token that no merge makes.
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
    # Merge each token's letters without splitting them or looking them up as one word. The cache is
    # off: each token would be stored and none would be found.
    alone = BPE(vocab=vocabulary, merges=merges, cache_capacity=0)
    reached = [token for token in tokens if len(alone.tokenize(token)) == 1]
    if model.get("ignore_merges"):
        added = {token["content"] for token in settings["added_tokens"]}
        if vocabulary.keys() - added - set(bytes_to_unicode().values()) - set(reached):
            return None
    return {bytes(map(byte_of.__getitem__, token)): vocabulary[token] for token in reached}
