"""Every token lands in a block, once, and no block is longer than it may be."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import SHARED, TINY
from transformers import AutoTokenizer

from sft.config.settings import DatasetConfig, TemplateConfig
from sft.data import packing
from sft.data.prepare import prepare
from sft.data.prepared import Prepared
from sft.data.preview import marked
from sft.data.row_encoder import sanitized
from sft.data.template import Template
from sft.errors import DataError

TEXT = TemplateConfig(name="text", kind="text", completions=["{text}"])
PAIRS = TemplateConfig(name="pairs", prompts=["{p}"], completions=["{c}"])


def made(
    tmp_path: Path, rows: list[dict[str, Any]], config: TemplateConfig, **fields: Any
) -> Prepared:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = Template(config, AutoTokenizer.from_pretrained(TINY))
    return prepare(DatasetConfig(path=str(path), **fields), template, seed=0)


def texts(prepared: Prepared) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return [tokenizer.decode(sample["input_ids"]) for sample in prepared.train.dataset]


@pytest.mark.parametrize("asked", ["auto", "wrapped"])
def test_wrapped_text_trains_every_token_once(tmp_path: Path, asked: str) -> None:
    rows = [{"text": "abcdefghij"}, {"text": "klmno"}]
    prepared = made(tmp_path, rows, TEXT, max_length=8, packing=asked)
    # A block that goes on with a document begins with its last token, as context only.
    assert texts(prepared) == ["abcdefgh", "hij<|end|>klmn", "no<|end|>"]
    first, second, third = prepared.train.dataset
    assert first["labels"] == [-100, *first["input_ids"][1:]]
    assert second["seq_lengths"] == [4, 4]
    ids = second["input_ids"]
    assert second["labels"] == [-100, *ids[1:4], -100, *ids[5:]]
    assert third["labels"][0] == -100
    counts = prepared.train.counts
    assert (counts.documents, counts.samples, counts.tokens) == (2, 3, 19)
    assert counts.trained_tokens == 11 + 6 - 2  # nothing predicts the first token of a document
    assert counts.efficiency == pytest.approx(19 / 24)


def test_rows_are_not_packed_unless_asked(tmp_path: Path) -> None:
    """A step would hold more rows than train.global_batch_size says."""
    rows = [{"p": "ab", "c": "c"}, {"p": "de", "c": "f"}]
    assert texts(made(tmp_path, rows, PAIRS, max_length=16)) == ["abc<|end|>", "def<|end|>"]


def test_lines_are_one_document(tmp_path: Path) -> None:
    rows = [{"text": "abcdefghij"}, {"text": "klmno"}]
    lines = TemplateConfig(name="lines", kind="text", completions=["{text}"], append_eos=False)
    prepared = made(tmp_path, rows, lines, max_length=8, packing="wrapped")
    assert texts(prepared) == ["abcdefgh", "hijklmno"]
    assert prepared.train.counts.trained_tokens == 14
    assert "seq_lengths" not in prepared.train.dataset.column_names


def test_boundary_begins_after_the_last_boundary(tmp_path: Path) -> None:
    rows = [{"text": "ab\ncd\nefghijklmnop\nq"}]
    both = {"max_length": 8, "packing": "boundary", "boundary_overlap": "train"}
    prepared = made(tmp_path, rows, TEXT, **both)
    assert texts(prepared) == ["ab\ncd\nef", "efghijkl", "mnop\nq<|end|>"]
    # The first token of a block is not predicted; e and f are trained in one block more.
    assert (prepared.train.counts.trained_tokens, prepared.train.counts.repeated) == (20, 2)
    # A character of several tokens is not cut: its window ends before it.
    prepared = made(tmp_path, [{"text": "abcdefgßxyz"}], TEXT, **both)
    assert texts(prepared) == ["abcdefg", "ßxyz<|end|>"]
    with pytest.raises(DataError, match="is 2 tokens, not one"):
        made(tmp_path, rows, TEXT, max_length=8, packing="boundary", boundary="ab")


@pytest.mark.parametrize("isolated", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_boundary_trains_each_token_once(seed: int, isolated: bool) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 50, 200)
    documents = generator.permutation(200)
    total = int(lengths.sum())
    boundaries = np.flatnonzero(generator.random(total) < 0.1)
    plan = packing.at_boundaries(documents, lengths, 16, boundaries, lambda s: s, True, isolated)
    begins = np.zeros(200, np.int64)
    begins[documents] = np.cumsum(lengths[documents]) - lengths[documents]
    trained = []
    for block in range(plan.blocks):
        for piece in range(plan.first[block], plan.first[block + 1]):
            predicted = isolated or piece == plan.first[block]  # from a token of its document
            low = max(int(plan.repeated[piece]), int(predicted))
            begin = int(begins[plan.document[piece]])
            trained += range(begin + int(plan.start[piece]) + low, begin + int(plan.stop[piece]))
    firsts = set(begins.tolist()) if isolated else {0}
    assert sorted(trained) == [place for place in range(total) if place not in firsts]
    sizes = plan.stop - plan.start
    assert all(sizes[a:b].sum() <= 16 for a, b in itertools.pairwise(plan.first.tolist()))


def test_a_context_token_is_trained_once(tmp_path: Path) -> None:
    rows = [{"text": "ab\ncd\nefghijklmnop\nq"}]
    prepared = made(tmp_path, rows, TEXT, max_length=8, packing="boundary")
    assert texts(prepared) == ["ab\ncd\nef", "efghijkl", "lmnop\nq<|end|>"]
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert [marked(sample, tokenizer) for sample in prepared.train.dataset] == [
        *("a⟦b\ncd\nef⟧", "ef⟦ghijkl⟧", "l⟦mnop\nq<|end|>⟧"),
    ]
    counts = prepared.train.counts
    assert (counts.tokens, counts.repeated, counts.trained_tokens) == (24, 3, 20)


def test_order_sample_and_sanitize(tmp_path: Path) -> None:
    rows = [{"text": "bbbb"}, {"text": "a"}, {"text": "ccccccc"}]
    joined = {"max_length": 16, "packing": "wrapped"}
    one = made(tmp_path, rows, TEXT, order="shortest", **joined)
    assert texts(one) == ["a<|end|>bbbb<|end|>ccccccc<|end|>"]
    assert texts(made(tmp_path, rows, TEXT, order="longest", **joined))[0].startswith("ccccccc")
    shuffled = {texts(made(tmp_path, rows, TEXT, order="random", **joined))[0] for _ in range(2)}
    assert len(shuffled) == 1
    plan = packing.whole(np.arange(10), np.full(10, 4), 8).keep(0.3)
    assert plan.document.tolist() == [3, 6, 9]
    assert sanitized("a\r\n\n\nb\\nc\t d   e \n") == "a\nb\nc d e\n"


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_fills_blocks_and_loses_nothing(seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(1, 65, 2000)
    plan = packing.best_fit(packing.whole(np.arange(2000), sizes, 64), 64)
    assert sorted(plan.document.tolist()) == list(range(2000))
    filled = np.add.reduceat(sizes[plan.document], plan.first[:-1])
    assert filled.max() <= 64
    assert plan.blocks <= 1.02 * np.ceil(sizes.sum() / 64)


@pytest.mark.parametrize("seed", range(5))
def test_split_and_wrapped_keep_every_label(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, 50, 200)
    documents = generator.permutation(200)
    for plan in (
        packing.split(documents, lengths, 16),
        packing.wrapped(documents, lengths, 16, True),
    ):
        trained = [
            (document, place)
            for document, start, stop in zip(plan.document, plan.start, plan.stop, strict=True)
            for place in range(start + 1, stop)
        ]
        expected = [(d, place) for d in range(200) for place in range(1, lengths[d])]
        assert sorted(trained) == expected
        sizes = plan.stop - plan.start
        assert all(sizes[a:b].sum() <= 16 for a, b in itertools.pairwise(plan.first.tolist()))


def test_bfd_packs_whole_rows_and_says_how_full(tmp_path: Path) -> None:
    rows = [{"p": "p", "c": "c" * n} for n in (9, 2, 5, 1, 3)]  # and a prompt token and EOS
    prepared = made(tmp_path, rows, PAIRS, max_length=12, packing="bfd")
    assert prepared.train.dataset["seq_lengths"][:] == [[11], [7, 5], [4, 3]]
    counts = prepared.train.counts
    assert (counts.documents, counts.samples, counts.tokens) == (5, 3, 30)
    assert counts.efficiency == pytest.approx(30 / 36)
    with pytest.raises(DataError, match="longer than"):
        made(tmp_path, rows, PAIRS, max_length=10, packing="bfd")
    cut = made(tmp_path, rows, PAIRS, max_length=10, packing="bfd_split").train.counts
    assert (cut.overlong, cut.trained_tokens) == (1, counts.trained_tokens)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real input: {SHARED} is absent")
def test_shakespeare_in_blocks() -> None:
    template = Template(TEXT, AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2"))
    path = str(SHARED / "data" / "tinyshakespeare" / "input.txt")
    config = DatasetConfig(path=path, max_length=256, eval_fraction=0.1, packing="wrapped")
    prepared = prepare(config, template, seed=0)
    train, held_out = prepared.parts["train"], prepared.parts["eval"]
    # 338,025 GPT-2 tokens, and EOS after each of the two halves.
    assert (train.lengths["max"], held_out.lengths["max"]) == (301_963, 36_064)
    assert (train.samples, held_out.samples) == (1_185, 142)
    assert train.trained_tokens == 301_962
    assert train.efficiency == pytest.approx(0.9993, abs=1e-4)
    config.packing = "boundary"
    once = prepare(config, template, seed=0).parts["train"]
    assert (once.samples, once.trained_tokens) == (1_205, 301_962)
    assert once.tokens - once.repeated == 301_963
    config.boundary_overlap = "train"
    assert prepare(config, template, seed=0).parts["train"].samples == 1_204


def test_held_out_documents_are_neither_packed_nor_sampled(tmp_path: Path) -> None:
    rows = [{"p": "p", "c": "c" * (3 + n)} for n in range(10)]
    fields = {"max_length": 8, "packing": "bfd_split", "sample": 0.5}
    prepared = made(tmp_path, rows, PAIRS, eval_fraction=0.4, **fields)
    assert prepared.eval is not None
    assert "seq_lengths" not in prepared.eval.dataset.column_names
    assert prepared.eval.counts.documents == 4
    everything = made(tmp_path, rows, PAIRS, eval_fraction=0.4, max_length=8, packing="bfd_split")
    assert prepared.train.counts.samples == everything.train.counts.samples // 2
    assert everything.eval is not None
    assert prepared.eval.counts.samples == everything.eval.counts.samples
