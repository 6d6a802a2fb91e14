"""The general text is cut into samples, and the bytes that they score are counted exactly."""

import itertools
from typing import Any

import made_tokenizers
import pytest
from support import TINY
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sft.data.row_encoder import IGNORE_INDEX
from sft.training.forgetting import TEXT, WINDOW, WINDOWS, windows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def test_the_text_is_ascii_and_has_ten_passages_of_similar_length() -> None:
    text = TEXT.read_text(encoding="ascii")
    lengths = [len(passage) for passage in text.split("\n\n")]
    assert len(lengths) == 10 and 40_000 < len(text) < 55_000
    assert min(lengths) > 4000 and max(lengths) < 5500
    sources = TEXT.with_name("SOURCES.md").read_text()
    assert sources.count("\n|") == 12


def test_samples_of_a_long_text_are_spaced_evenly(tokenizer: Any) -> None:
    text = TEXT.read_text()
    samples, count = windows(tokenizer, text, WINDOW)
    assert [len(sample["input_ids"]) for sample in samples] == [WINDOW] * WINDOWS
    scored = [label for sample in samples for label in sample["labels"] if label != IGNORE_INDEX]
    # A token of this tokenizer is a byte; the first of each sample has nothing before it.
    assert count == len(scored) == WINDOWS * (WINDOW - 1)
    pieces = [tokenizer.decode(sample["input_ids"]) for sample in samples]
    places = [text.index(piece) for piece in pieces]
    gaps = {after - before for before, after in itertools.pairwise(places)}
    assert len(gaps) <= 2 and max(gaps) - min(gaps) <= 1


def test_all_of_a_short_text_is_scored_but_unknown_tokens(tokenizer: Any) -> None:
    [sample], count = windows(tokenizer, "ab\ncd", WINDOW)
    assert sample["input_ids"] == tokenizer("ab\ncd")["input_ids"]
    assert sample["labels"] == [IGNORE_INDEX, *sample["input_ids"][1:]] and count == 4
    first, second = windows(tokenizer, "abcdef", 3)[0]
    assert tokenizer.decode(first["input_ids"]) == "abc"
    assert tokenizer.decode(second["input_ids"]) == "def"
    unknown = tokenizer("b")["input_ids"][0]
    tokenizer.unk_token_id = unknown
    [sample], count = windows(tokenizer, "ab\ncd", WINDOW)
    assert sample["labels"][:2] == [IGNORE_INDEX] * 2 and count == 3


def test_bytes_are_those_of_the_scored_tokens() -> None:
    made = made_tokenizers.train_tokenizer("bytes")
    text = "the cat sat on the mat and ran to the house in the sun"
    ids = made(text)["input_ids"]
    assert len(ids) < len(text) / 2
    samples, count = windows(made, text, 4)
    assert [token for sample in samples for token in sample["input_ids"]] == ids
    assert count == len(text) - sum(len(made.decode(sample["input_ids"][:1])) for sample in samples)
    # BOS precedes each sample, so that every token is scored.
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    samples, count = windows(made, text, 4)
    assert {sample["input_ids"][0] for sample in samples} == {made.bos_token_id}
    assert [token for sample in samples for token in sample["labels"][1:]] == ids
    assert {sample["labels"][0] for sample in samples} == {IGNORE_INDEX} and count == len(text)
