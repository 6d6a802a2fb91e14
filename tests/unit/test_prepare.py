"""Prepared once, by content; nothing is lost uncounted, and nothing wrong is trained."""

import gc
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import warm_python
from datasets import load_from_disk
from support import SHARED, TINY
from transformers import AutoTokenizer

from sft.config.settings import DatasetConfig, TemplateConfig
from sft.data import artefact, bpe, prepare, workers
from sft.data.audit import describe_lengths
from sft.data.template import Template
from sft.errors import DataError
from sft.train import main

PAIRS = TemplateConfig(name="pairs", prompts=["{prompt}"], completions=["{completion}"])
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real input: {SHARED} is absent")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, rows: list[Any]) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"p{number} ", "completion": f"c{number}"}


def made(path: str | None, template: TemplateConfig = PAIRS, seed: int = 0, **fields: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return prepare.prepare(DatasetConfig(path=path, **fields), Template(template, tokenizer), seed)


def texts(samples: Any) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return [tokenizer.decode(sample["input_ids"]) for sample in samples.dataset]


def test_rows_that_do_not_fit_are_kept_with_their_place(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        [pair(1), "{not json", "", {"prompt": "no completion"}, {**pair(2), "completion": ""}]
        + [pair(n) for n in range(3, 9)],
    )
    with pytest.raises(DataError, match=r"2 of 10 train rows do not fit .*dropped.jsonl\)\n"):
        made(path)
    prepared = made(path, max_bad_fraction=0.2)
    counts = prepared.train.counts
    assert (counts.rows, counts.bad, counts.empty, counts.dropped, counts.samples) == (
        10,
        2,
        1,
        3,
        7,
    )
    dropped = [json.loads(line) for line in (prepared.folder / "dropped.jsonl").open()]
    assert [(row["file"], row["line"]) for row in dropped] == [(path, 2), (path, 4), (path, 5)]
    assert "is not valid JSON" in dropped[0]["reason"] and dropped[0]["row"] == "{not json"
    assert "cannot render a completion" in dropped[1]["reason"]
    assert "the completion is empty" in dropped[2]["reason"]


def test_the_same_is_read_from_the_cache_and_any_change_is_not(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(n) for n in range(5)])
    first = made(path)
    os.utime(path)  # touched, not changed
    assert made(path).folder == first.folder
    # What only judges the samples makes no new ones.
    assert made(path, max_bad_fraction=0.5, num_proc=1).folder == first.folder
    folders = {first.folder}
    for change in (
        {"max_length": 512},
        {"overlong": "drop"},
        {"packing": "bfd"},
        {"template": TemplateConfig("other", prompts=["{prompt}!"], completions=["{completion}"])},
        {"eval_fraction": 0.2},
        {"eval_fraction": 0.2, "seed": 1},
    ):
        folders.add(made(path, **change).folder)
    monkeypatch.setattr(prepare, "PACKAGE_DIR", tmp_path)  # other code
    folders.add(made(path).folder)
    monkeypatch.undo()
    monkeypatch.setenv("SFT_CACHE_DIR", str(own_cache))
    write(Path(path), [pair(n) for n in range(6)])
    changed = made(path)
    folders.add(changed.folder)
    assert len(folders) == 9
    assert len(changed.train.dataset) == 6
    # Nothing but finished folders and locks is left.
    names = {entry.name.partition(".")[2] for entry in (own_cache / "data").iterdir()}
    assert names == {"", "lock"}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "why"),
    [
        ("train.arrow", lambda file: os.truncate(file, 400), "train.arrow has 400 bytes, not "),
        ("train.arrow", flip, "train.arrow is damaged: its hash is not"),
        ("eval.arrow", Path.unlink, "eval.arrow is missing"),
        ("data.json", lambda file: os.truncate(file, 30), "data.json has 30 bytes, not "),
        ("data.json", flip, "data.json is damaged"),
        ("dropped.jsonl", Path.unlink, "dropped.jsonl is missing"),
        ("files.json", Path.unlink, "files.json is missing"),
        ("files.json", lambda file: os.truncate(file, 30), "files.json is damaged"),
        ("files.json", lambda file: file.write_text('{"a": 1}'), "a is missing"),
        ("files.json", lambda file: file.write_text("[]"), "the list of its files is damaged"),
    ],
)
def test_damaged_data_in_the_cache_is_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: Any, why: str
) -> None:
    caplog.set_level("INFO", "sft")
    path = write(tmp_path / "rows.jsonl", [pair(n) for n in range(20)])
    first = made(path, eval_fraction=0.2)
    whole = {file.name: file.read_bytes() for file in first.folder.iterdir()}
    harm(first.folder / name)
    caplog.clear()
    again = made(path, eval_fraction=0.2)
    [said] = [line for line in caplog.messages if "made again" in line]
    assert said.startswith(f"the prepared data in {first.folder} is made again: {why}")
    assert {file.name: file.read_bytes() for file in again.folder.iterdir()} == whole
    assert len(again.train.dataset) == 16
    caplog.clear()
    assert made(path, eval_fraction=0.2).folder == first.folder and not caplog.messages


def test_a_killed_preparation_leaves_nothing_that_is_used(tmp_path: Path, own_cache: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(n) for n in range(20_000)])
    script = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
        "from sft.config.settings import DatasetConfig; from sft.data import prepare\n"
        "from sft.data.template import Template; from transformers import AutoTokenizer\n"
        "from sft.config.settings import TemplateConfig\n"
        "pair = {'prompts': ['{prompt}'], 'completions': ['{completion}']}\n"
        "template = TemplateConfig('pairs', **pair)\n"
        f"made = Template(template, AutoTokenizer.from_pretrained({str(TINY)!r}))\n"
        f"prepare.prepare(DatasetConfig(path={path!r}), made, 0)\n"
    )
    command = [warm_python.executable(), "-c", script]
    child = subprocess.Popen(command)
    deadline = time.monotonic() + 120
    while not list(own_cache.glob("data/*.partial/ids.bin")):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()  # and with it all of its group
    child.wait()
    assert len(list(own_cache.glob("data/*.partial"))) == 1
    # Two at once do the work once, and neither spoils it.
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    assert not list(own_cache.glob("data/*.partial"))
    assert made(path).train.counts.samples == 20_000
    assert len(list(own_cache.glob("data/*/data.json"))) == 1


def test_processes_give_what_one_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "BATCH_ROWS", 50)
    path = write(tmp_path / "rows.jsonl", [pair(n) for n in range(900)] + ["{"])
    alone = made(path, num_proc=1, max_bad_fraction=0.1)
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "other"))
    shared = made(path, num_proc=3, max_bad_fraction=0.1)
    assert shared.folder != alone.folder
    assert shared.train.dataset[:] == alone.train.dataset[:]
    assert shared.train.counts == alone.train.counts
    assert (shared.train.counts.rows, shared.train.counts.bad) == (901, 1)


def test_the_heap_is_frozen_while_data_is_prepared_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(n) for n in range(9)])
    gc.unfreeze()  # what conftest.py has frozen
    frozen = []
    make = prepare._make
    monkeypatch.setattr(
        prepare, "_make", lambda *given: frozen.append(gc.get_freeze_count()) or make(*given)
    )
    made(path)
    assert frozen[0] > 10_000
    assert gc.get_freeze_count() == 0
    with pytest.raises(DataError, match="leaves none to train on"):
        made(path, eval_fraction=0.99)
    assert gc.get_freeze_count() == 0
    gc.freeze()  # again, for the tests that follow
    made(path, max_length=99)
    assert gc.get_freeze_count() > 10_000


def test_half_a_character_is_no_text(tmp_path: Path) -> None:
    rows = [pair(1), '{"prompt": "p", "completion": "fine \\ud83d"}', pair(2)]
    prepared = made(write(tmp_path / "rows.jsonl", rows), max_bad_fraction=0.5)
    assert prepared.train.counts.bad == 1
    dropped = json.loads((prepared.folder / "dropped.jsonl").read_text())
    assert dropped["reason"] == r"the text holds '\ud83d', which is half of a surrogate pair"
    assert r"\ud83d" in dropped["row"]


@needs_shared
def test_much_data_is_encoded_by_tiktoken_with_the_same_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / "gpt2")
    template = Template(PAIRS, tokenizer)
    lines = (SHARED / "data" / "dolly-15k" / "dolly-sample-5000.jsonl").open(encoding="utf-8")
    rows = [json.loads(line) for line in lines][:300]
    pairs = [{"prompt": f"{r['instruction']}\n", "completion": r["response"]} for r in rows]
    path = write(tmp_path / "rows.jsonl", pairs)
    found = []
    used = []
    encode = bpe.BytePairs.encode
    monkeypatch.setattr(bpe.BytePairs, "encode", lambda *a: used.append(1) or encode(*a))
    for batch, cache in ((300, "a"), (50, "b")):
        monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / cache))
        monkeypatch.setattr(workers, "BATCH_ROWS", batch)
        config = DatasetConfig(path=path, overlong="truncate", num_proc=1)
        found.append(prepare.prepare(config, template, 0).train.dataset[:])
        assert bool(used) is (batch == 50)
    assert found[0] == found[1]


def test_a_mixture_sees_each_source_as_often_as_asked(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [pair(n) for n in range(10)])
    b = write(tmp_path / "b.jsonl", [{"q": f"q{n}", "completion": "x"} for n in range(10)])
    mix = {"a": {"path": a, "weight": 2.5}, "b": {"path": b, "columns": {"prompt": "q"}}}
    mixed = made(None, mix=mix)
    found = texts(mixed.train)
    assert len(found) == 25 + 10
    assert sorted(found.count(f"p{n} c{n}<|end|>") for n in range(10)) == [2] * 5 + [3] * 5
    assert all(found.count(f"q{n}x<|end|>") == 1 for n in range(10))
    assert texts(made(None, mix=mix).train) == found
    assert texts(made(None, mix=mix, seed=1).train) != found
    assert mixed.train.counts.sources["a"] == {"rows": 10, "bad": 0, "empty": 0, "weight": 2.5}
    split = made(None, mix=mix, eval_fraction=0.25)
    held_out = texts(split.eval)
    assert len(held_out) == 5 and len(set(held_out)) == 5
    assert not set(held_out) & set(texts(split.train))


def test_of_each_source_of_a_mixture_the_first_rows_are_read(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", [pair(n) for n in range(10)])
    b = write(tmp_path / "b.jsonl", [{"q": f"q{n}", "completion": "x"} for n in range(10)])
    mix = {
        "a": {"path": a, "weight": 2, "max_rows": 3},
        "b": {"path": b, "columns": {"prompt": "q"}, "max_rows": None},
    }
    mixed = made(None, mix=mix)
    found = texts(mixed.train)
    assert sorted(found) == sorted(
        [f"p{n} c{n}<|end|>" for n in range(3)] * 2 + [f"q{n}x<|end|>" for n in range(10)]
    )
    read = {name: source["rows"] for name, source in mixed.train.counts.sources.items()}
    assert read == {"a": 3, "b": 10}
    # dataset.max_rows is of each source too, and the smaller number holds.
    few = made(None, mix=mix, max_rows=5).train.counts
    assert {name: source["rows"] for name, source in few.sources.items()} == {"a": 3, "b": 5}
    few = made(None, mix=mix, max_rows=2).train.counts
    assert {name: source["rows"] for name, source in few.sources.items()} == {"a": 2, "b": 2}


def test_copies_are_found_within_and_between(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [pair(1), pair(1), pair(2), pair(3)])
    held_out = write(tmp_path / "eval.jsonl", [pair(3), pair(4)])
    prepared = made(train, eval_path=held_out)
    assert prepared.train.counts.checks["duplicates"] == 1
    assert prepared.eval.counts.checks["eval_in_train"] == 1
    with pytest.raises(
        DataError, match=r"eval: 1 documents \(50.0%\) are held out and also trained on\n.*=1"
    ):
        made(train, eval_path=held_out, stop_above={"eval_in_train": 0.1})


def test_named_sets_are_prepared_and_audited_each_by_itself(tmp_path: Path) -> None:
    train = write(tmp_path / "train.jsonl", [pair(n) for n in range(20)])
    hard = write(tmp_path / "hard.jsonl", [pair(n) for n in range(18, 24)])
    other = write(tmp_path / "other.jsonl", [{"q": "x ", "completion": "y"}] * 3)
    sets = {
        "hard": {"path": hard, "max_rows": 4},
        "other": {"path": other, "columns": {"prompt": "q"}},
    }
    plain, found = made(train, eval_fraction=0.2), made(train, eval_fraction=0.2, eval=sets)
    assert list(found.parts) == ["train", "eval", "eval_hard", "eval_other"]
    for name in ("train", "eval"):  # a set may be added to a run that is resumed
        first, second = (folder / f"{name}.arrow" for folder in (plain.folder, found.folder))
        assert first.read_bytes() == second.read_bytes()
    trained = {text for text in texts(found.train) if text in texts(found.sets["eval_hard"])}
    leaked = {name: counts.checks.get("eval_in_train") for name, counts in found.parts.items()}
    assert leaked["eval_hard"] == len(trained) > 0 and leaked["eval_other"] == 0
    counts = found.parts["eval_hard"]
    assert (counts.rows, counts.samples, counts.files) == (4, 4, 1)
    assert counts.sources == {"eval_hard": {"rows": 4, "bad": 0, "empty": 0, "weight": 1.0}}
    assert found.parts["eval_other"].checks["duplicates"] == 2
    with pytest.raises(DataError, match=r"eval_hard: . documents .* are held out and also trained"):
        made(train, eval_fraction=0.2, eval=sets, stop_above={"eval_in_train": 0.1})
    # With prepared data, and as the only held-out rows.
    artefact.save(found, tmp_path / "ready")
    ready = DatasetConfig(path=str(tmp_path / "ready"))
    again = artefact.load(ready, AutoTokenizer.from_pretrained(TINY))
    assert again is not None and again.parts == found.parts
    assert texts(again.sets["eval_hard"]) == texts(found.sets["eval_hard"])
    only = made(train, eval={"hard": {"path": hard}}, max_eval_rows=2)
    assert only.eval is None and list(only.held_out) == ["eval_hard"]
    assert (only.train.counts.samples, only.sets["eval_hard"].counts.samples) == (20, 2)
    with pytest.raises(DataError, match=r"gone.jsonl\n    fix: dataset.eval.a.path="):
        made(train, eval={"a": {"path": str(tmp_path / "gone.jsonl")}})


def test_a_text_is_halved_beside_a_named_set(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(f"line {n}\n" for n in range(10)))
    (tmp_path / "two.txt").write_text("other\n")
    text = TemplateConfig("text", kind="text", completions=["{text}"])
    sets = {"two": {"path": str(tmp_path / "two.txt")}}
    found = made(str(tmp_path / "one.txt"), text, eval_fraction=0.2, eval=sets, packing="wrapped")
    assert [texts(part) for part in found.held_out.values()] == [
        ["line 8\nline 9\n<|end|>"],
        ["other\n<|end|>"],
    ]


def test_what_never_stops_and_what_is_not_trained_stops_the_run(tmp_path: Path) -> None:
    endless = TemplateConfig("e", prompts=["{prompt}"], completions=["{completion}"])
    endless.append_eos = False
    path = write(tmp_path / "rows.jsonl", [pair(n) for n in range(3)])
    with pytest.raises(
        DataError, match=r"3 documents \(100.0%\) train no token that ends.*\n.*never_st"
    ):
        made(path, endless)
    labels = [{"input_ids": [1, 2, 3], "labels": [-100] * 3}, {"input_ids": [1, 2, 3]}]
    with pytest.raises(DataError, match=r"1 documents \(50.0%\) have no trained token"):
        made(write(tmp_path / "ids.jsonl", labels))
    path = write(tmp_path / "bos.jsonl", [{"prompt": "<|user|><|user|>x", "completion": "y"}])
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    template = Template(PAIRS, tokenizer)
    assert (
        prepare.prepare(DatasetConfig(path=path), template, 0).train.counts.checks["control_tokens"]
        == 1
    )


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, {"input_ids": [8, 9]}]
    limits = {"stop_above": {}}
    prepared = made(write(tmp_path / "ids.jsonl", rows), **limits)
    assert prepared.train.dataset["input_ids"][:] == [[5, 6, 7], [8, 9]]
    assert prepared.train.dataset["labels"][:] == [[-100, -100, 7], [-100, 9]]
    shifted = [{"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, {"input_ids": [1], "labels": []}]
    with pytest.raises(DataError, match="label 6 at 0 is neither -100 nor the token there"):
        made(write(tmp_path / "shifted.jsonl", shifted))


def test_an_artefact_trains_the_same_and_knows_its_tokenizer(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [pair(n) for n in range(20)])
    prepared = made(path, packing="bfd", max_length=32, eval_fraction=0.1)
    folder = tmp_path / "prepared"
    artefact.save(prepared, folder)
    assert not list(tmp_path.glob("*.partial"))
    saved = load_from_disk(str(folder))
    assert saved["train"].column_names == ["input_ids", "labels", "rows", "seq_lengths"]
    rows = [row for part in saved.values() for rows in part["rows"] for row in rows]
    assert sorted(rows) == [*range(1, 21)]
    again = made(str(folder))
    assert again.train.dataset[:] == prepared.train.dataset[:]
    assert again.parts == prepared.parts
    assert artefact.template_of(str(folder)) == PAIRS
    assert artefact.template_of(path) is None
    with pytest.raises(DataError, match="exists\n    fix: output="):
        artefact.save(prepared, folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(DataError, match="tokenised with a tokenizer that is not the model's"):
        prepare.prepare(DatasetConfig(path=str(folder)), Template(PAIRS, tokenizer), 0)
    flip(next((folder / "train").glob("*.arrow")))
    with pytest.raises(DataError, match=r"cannot be used: train/.*arrow is damaged(.|\n)*again: "):
        made(str(folder))


def test_lengths_are_described() -> None:
    import numpy as np

    found = describe_lengths(np.arange(1, 101))
    assert {key: found[key] for key in ("p50", "p90", "p95", "p99", "max", "mean")} == {
        **{"p50": 51, "p90": 91, "p95": 96, "p99": 100, "max": 100, "mean": 50.5}
    }
    assert found["suggested_max_length"] == found["max_length_for_all"] == 128
    assert sum(count for _, _, count in found["histogram"]) == 100
    assert found["histogram"][0] == [0, 5, 5]


# What is known of the real files, with the tokenizer that is named.
AUDITS: dict[str, tuple[str, list[str], dict[str, Any]]] = {
    "dolly": (
        "gpt2",
        ["dataset=dolly", "dataset.path={data}/dolly-15k/dolly-sample-5000.jsonl"],
        {
            **{"rows": 4900, "documents": 4862, "overlong": 70, "truncated": 32, "dropped": 38},
            **{"tokens": 913_451, "trained_tokens": 364_932},
            "checks": {"nothing_trained": 38, "answer_cut": 32, "duplicates": 2},
        },
    ),
    "gsm8k": (
        "opt",
        [
            *("dataset=gsm8k", "dataset.path={data}/gsm8k/train.jsonl"),
            *("dataset.subset=null", "dataset.eval_split=null"),
        ],
        {
            **{"rows": 7473, "documents": 7473, "dropped": 0, "longest": 436},
            **{"tokens": 1_147_182, "trained_tokens": 719_541},
            "checks": {"never_stops": 0, "double_bos": 0, "duplicates": 0},
        },
    ),
    "glaive": (
        "gpt-neox-20b",
        [
            *("dataset=jsonl", "template=plain-chat", "dataset.max_length=2048"),
            "dataset.path={data}/llamafactory-demo/glaive_toolcall_en_demo.json",
            "dataset.eval_fraction=0",
        ],
        {
            **{"rows": 300, "bad": 0, "documents": 300, "longest": 2007},
            **{"tokens": 144_269, "trained_tokens": 86_454},
            "roles": {
                "user": {"tokens": 34_764, "trained": 0},
                "assistant": {"tokens": 86_454, "trained": 86_454},
                "tool": {"tokens": 23_051, "trained": 0},
            },
            "checks": {"never_stops": 0, "nothing_trained": 0},
        },
    ),
    "sharegpt": (
        "gpt2",
        [
            *("dataset=jsonl", "template=plain-chat", "dataset.packing=bfd"),
            *("dataset.max_length=512", "dataset.eval_fraction=0"),
            "dataset.path={data}/fastchat/dummy_conversation.json",
        ],
        {
            **{"rows": 500, "bad": 0, "documents": 500, "tokens": 28_522, "trained_tokens": 15_561},
            "checks": {"never_stops": 0, "duplicates": 0},
        },
    ),
}


@needs_shared
@pytest.mark.parametrize("name", AUDITS)
def test_audit_of_real_rows(name: str) -> None:
    tokenizer_name, overrides, expected = AUDITS[name]
    data = SHARED / "data"
    config = main.compose([item.format(data=data) for item in overrides])
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / tokenizer_name)
    template = Template(config.template, tokenizer)
    found = vars(prepare.prepare(config.dataset, template, 42).train.counts)
    for key, value in expected.items():
        if key == "checks":
            assert {check: found["checks"][check] for check in value} == value
        else:
            assert found[key] == value, key
    assert found["tokens"] == sum(role["tokens"] for role in found["roles"].values())
    assert found["trained_tokens"] == sum(role["trained"] for role in found["roles"].values())
