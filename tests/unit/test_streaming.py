"""Of what does not fit a disk, the rows that a run takes are read, and no more."""

import json
from pathlib import Path
from typing import Any

import pytest
from support import TINY
from transformers import AutoTokenizer

from sft.config.settings import Config, DatasetConfig, TemplateConfig, TrainConfig, streamed_samples
from sft.data import sources, workers
from sft.data.folders import Location
from sft.data.prepare import prepare
from sft.data.prepared import Prepared
from sft.data.template import Template
from sft.errors import DataError

PAIRS = TemplateConfig(name="pairs", prompts=["{p}"], completions=["{c}"])
TEXT = TemplateConfig(name="text", kind="text", completions=["{text}"])
ROWS = 50  # in each file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(workers, "BATCH_ROWS", 10)
    return shards(tmp_path / "data", 20)


def shards(folder: Path, count: int, letter: str = "p") -> Path:
    folder.mkdir()
    for shard in range(count):
        rows = ({"p": f"{letter}{shard}", "c": f"{shard} {row}"} for row in range(ROWS))
        (folder / f"{shard:03}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def made(
    path: Path | None, samples: int, template: TemplateConfig = PAIRS, seed: int = 0, **fields: Any
) -> Prepared:
    made_of = Template(template, AutoTokenizer.from_pretrained(TINY))
    config = DatasetConfig(path=path and str(path), streaming=True, num_proc=1, **fields)
    return prepare(config, made_of, seed, samples)


def texts(prepared: Prepared) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return [tokenizer.decode(sample["input_ids"]) for sample in prepared.train.dataset]


def test_a_run_takes_max_steps_global_batches() -> None:
    config = Config(train=TrainConfig(max_steps=30, global_batch_size=16))
    assert streamed_samples(config) is None
    config.dataset.streaming = True
    assert streamed_samples(config) == 480


def test_only_what_is_needed_is_read_from_files_in_an_order_of_the_seed(folder: Path) -> None:
    first = made(folder, 120)
    assert first.train.counts.rows == 120
    found = texts(first)
    shards_seen = list(dict.fromkeys(text.split(" ")[0] for text in found))
    assert len(shards_seen) == 3
    assert shards_seen != sorted(shards_seen)
    assert texts(made(folder, 120, seed=1)) != found
    # A longer run begins with the same rows.
    assert texts(made(folder, 200))[:120] == found


def test_what_is_held_out_or_dropped_is_read_beside_it(folder: Path) -> None:
    prepared = made(folder, 120, eval_fraction=0.25)
    assert prepared.train.counts.samples == 120
    assert prepared.eval is not None and prepared.eval.counts.samples == 40
    # "p19 49" with its end is 10 tokens or so; half of the shards have longer names.
    prepared = made(folder, 100, max_length=8, overlong="drop", stop_above={})
    assert prepared.train.counts.samples >= 100
    assert prepared.train.counts.rows > 200
    assert made(folder, 100, sample=0.5).train.counts.samples == 100


def test_packed_blocks_are_counted_not_rows(folder: Path) -> None:
    prepared = made(folder, 20, packing="bfd", max_length=64)
    assert 20 <= prepared.train.counts.samples <= 24
    assert prepared.train.counts.rows < 400


def test_plain_text_is_streamed(tmp_path: Path, folder: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"text": f"{n:06} " * 10}) + "\n" for n in range(1000)))
    prepared = made(lines, 30, TEXT, packing="wrapped", max_length=64)
    assert 30 <= prepared.train.counts.samples < 45


def test_a_mixture_is_of_samples_in_the_ratio_of_the_weights(tmp_path: Path, folder: Path) -> None:
    other = shards(tmp_path / "other", 20, "q")
    mix = {"a": {"path": str(folder), "weight": 3}, "b": {"path": str(other)}}
    prepared = made(None, 200, mix=mix)
    found = [text[0] for text in texts(prepared)]
    assert (found.count("p"), found.count("q")) == (150, 50)


def test_of_a_streamed_source_no_more_rows_are_read_than_asked(
    tmp_path: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = shards(tmp_path / "other", 20, "q")
    mix = {"a": {"path": str(folder), "max_rows": 30}, "b": {"path": str(other), "max_rows": 500}}
    with caplog.at_level("INFO", "sft"):
        prepared = made(None, 200, mix=mix)
    found = [text[0] for text in texts(prepared)]
    assert (found.count("p"), found.count("q")) == (30, 100)
    assert "the source ended after 130 samples; the run takes 200" in caplog.text


def test_a_source_that_ends_is_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "sft"):
        assert made(folder, 5000).train.counts.samples == 20 * ROWS
    assert "the source ended after 1,000 samples; the run takes 5,000" in caplog.text


def test_a_changed_file_is_read_anew(folder: Path) -> None:
    found = texts(made(folder, 1000))
    (folder / "007.jsonl").write_text('{"p": "new", "c": "row"}\n')
    changed = texts(made(folder, 1000))
    assert len(changed) == len(found) - ROWS + 1
    assert any(text.startswith("new") for text in changed)


def test_the_hub_is_streamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder stands in for the hub: Datasets reads both with the same code."""
    monkeypatch.setattr(sources, "resolve", lambda path, split: Location(path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    prepared = made(folder, 120)
    assert prepared.train.counts.rows == 120
    shards_seen = {text.split(" ")[0] for text in texts(prepared)}
    assert len(shards_seen) > 3  # shuffled in a buffer, over shards in an order of the seed
    with pytest.raises(DataError, match="nobody/nothing cannot be loaded from the hub"):
        made(Path("nobody/nothing"), 120)
