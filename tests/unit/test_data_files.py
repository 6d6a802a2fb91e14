"""Every kind of trouble with files, through the command: read rightly, or refused by name."""

import bz2
import csv
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, load_from_disk
from datasets.data_files import SPLIT_KEYWORDS
from support import TINY
from transformers import AutoTokenizer
from warm import run_warm

from sft.data.__main__ import main
from sft.data.named_splits import SPLITS
from sft.data.preview import marked

COMPLETION = ("model=tiny", "dataset=jsonl", "dataset.eval_fraction=0")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.chdir(tmp_path)
    return data


def pairs(*names: str) -> list[dict[str, Any]]:
    return [{"prompt": name, "completion": name.upper()} for name in names]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


class Audit:
    """What ``sft data --json`` says, and the samples that it wrote."""

    def __init__(self, *words: str, capsys: pytest.CaptureFixture[str]) -> None:
        capsys.readouterr()
        try:
            main([*words, "--json"])
            self.code = 0
        except SystemExit as end:
            self.code = int(end.code or 0)
        said = capsys.readouterr()
        self.error = said.err
        self.result = json.loads(said.out)

    @property
    def train(self) -> dict[str, Any]:
        assert self.code == 0, self.error
        return self.result["parts"]["train"]

    def texts(self, part: str = "train") -> list[str]:
        assert self.code == 0, self.error
        dataset = Dataset.from_file(f"{self.result['folder']}/{part}.arrow")
        tokenizer = AutoTokenizer.from_pretrained(TINY)
        return [marked(sample, tokenizer) for sample in dataset]

    def bad(self) -> list[tuple[str, int, str]]:
        """List the rows that were left out: file, line and reason."""
        assert self.code == 0, self.error
        text = Path(self.result["folder"], "dropped.jsonl").read_text()
        found = [json.loads(line) for line in text.splitlines()]
        return [(Path(row["file"]).name, row["line"], row["reason"]) for row in found]

    def refusal(self) -> str:
        assert self.code == 1, self.error
        assert "Traceback" not in self.error
        return str(self.result["error"])


Run = Callable[..., Audit]


@pytest.fixture
def audit(capsys: pytest.CaptureFixture[str]) -> Run:
    return lambda *words: Audit(*COMPLETION, *words, capsys=capsys)


def trained(*names: str) -> list[str]:
    return [f"{name}\n⟦{name.upper()}<|end|>⟧" for name in names]


# 19: folders


def test_tables_of_mixed_kinds_are_read_whole_and_in_order(folder: Path, audit: Run) -> None:
    (folder / "deep").mkdir()
    (folder / "a.JSONL").write_text(lines(pairs("a")))
    (folder / "b.csv").write_text("prompt,completion\nb,B\n")
    pq.write_table(pa.Table.from_pylist(pairs("c")), folder / "c.parquet")
    (folder / "deep" / "d.Json.GZ").write_bytes(gzip.compress(json.dumps(pairs("d")).encode()))
    (folder / "e.ndjson.bz2").write_bytes(bz2.compress(lines(pairs("e")).encode()))
    found = audit(f"dataset.path={folder}")
    assert found.texts() == trained("a", "b", "c", "d", "e")
    assert (found.train["rows"], found.train["files"]) == (5, 5)
    assert found.train["unused_files"] == []


def test_what_is_not_read_is_listed_and_counted(
    folder: Path, audit: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.jsonl").write_text(lines(pairs("a")))
    for name in ("README.md", "LICENSE.txt", ".gitattributes", "dataset_infos.json", "notes.xml"):
        (folder / name).write_text("{}")
    (folder / ".git").mkdir()
    (folder / ".git" / "b.jsonl").write_text(lines(pairs("hidden")))
    found = audit(f"dataset.path={folder}", "preview=1", "html=page.html")
    assert found.texts() == trained("a")
    assert found.train["files"] == 1
    others = [".git", ".gitattributes", "LICENSE.txt", "README.md", "dataset_infos.json"]
    assert found.train["unused_files"] == [*others, "notes.xml"]
    assert "have unknown endings and are not read: notes.xml" in found.error
    assert ".git, .gitattributes, LICENSE.txt and 3 more" in Path("page.html").read_text()
    main([*COMPLETION, f"dataset.path={folder}"])
    table = capsys.readouterr().out
    assert "beside them, not read" in table and "LICENSE.txt and 3 more" in table


def test_plain_text_and_tables_are_refused_by_name(folder: Path, audit: Run) -> None:
    (folder / "a.txt").write_text("text")
    (folder / "b.jsonl").write_text(lines(pairs("b")))
    said = audit(f"dataset.path={folder}").refusal()
    assert "holds plain text (a.txt) and tables (b.jsonl), which are not read together" in said
    assert audit(f"dataset.path={folder}/**/*.jsonl").texts() == trained("b")
    assert "plain text (a.txt)" in audit(f"dataset.path={folder}/*").refusal()


def test_a_pattern_leaves_nothing_out_unnamed(folder: Path, audit: Run) -> None:
    (folder / "b.jsonl").mkdir()
    (folder / "b.jsonl" / "c.jsonl").write_text(lines(pairs("c")))
    (folder / "a.jsonl").write_text(lines(pairs("a")))
    found = audit(f"dataset.path={folder}/*.jsonl")
    assert found.texts() == trained("a")
    assert found.train["unused_files"] == ["b.jsonl"]
    assert audit(f"dataset.path={folder}").texts() == trained("a", "c")
    assert audit(f"dataset.path={folder}/b.jsonl").texts() == trained("c")


def test_linked_folders_are_read_once(folder: Path, audit: Run, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.jsonl").write_text(lines(pairs("a")))
    (folder / "one").symlink_to(tmp_path / "disk")
    (folder / "two").symlink_to(tmp_path / "disk")
    (folder / "round").symlink_to(folder)
    assert audit(f"dataset.path={folder}").texts() == trained("a")


def test_files_have_no_splits(folder: Path, audit: Run) -> None:
    """Otherwise the same rows would be trained on and held out."""
    (folder / "a.jsonl").write_text(lines(pairs("a")))
    said = audit(f"dataset.path={folder}", "dataset.eval_split=test").refusal()
    assert "has no split test: files have no splits" in said


@pytest.mark.parametrize(
    "names",
    [
        ("data/train-00000-of-00001.jsonl", "data/test-00000-of-00001.jsonl"),
        ("train/a.jsonl", "test/a.jsonl"),
        ("rows_TRAINING.jsonl", "rows_eval.jsonl"),
        ("latest-train.jsonl", "contest-test.jsonl"),
    ],
)
def test_a_downloaded_dataset_is_not_trained_on_its_test(
    folder: Path, audit: Run, names: tuple[str, str]
) -> None:
    for name, row in zip(names, "ab", strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(lines(pairs(row)))
    found = audit(f"dataset.path={folder}")
    assert found.texts() == trained("a")
    assert found.train["unused_files"] == [names[1]]
    assert audit(f"dataset.path={folder}", "dataset.split=test").texts() == trained("b")
    found = audit(f"dataset.path={folder}", "dataset.eval_split=test")
    assert (found.texts(), found.texts("eval")) == (trained("a"), trained("b"))
    said = audit(f"dataset.path={folder}", "dataset.split=validation").refusal()
    assert "has no split validation; it has train, test" in said
    (folder / "more.jsonl").write_text(lines(pairs("c")))
    said = audit(f"dataset.path={folder}").refusal()
    assert f"of the splits train, test, and 1 of none, such as {folder}/more.jsonl" in said


def test_one_split_is_a_folder_like_others(folder: Path, audit: Run) -> None:
    (folder / "a_test.jsonl").write_text(lines(pairs("a")))
    (folder / "b.jsonl").write_text(lines(pairs("b")))
    assert audit(f"dataset.path={folder}").texts() == trained("a", "b")


def test_the_words_for_splits_are_those_of_datasets() -> None:
    assert {name: list(words) for name, words in SPLITS.items()} == SPLIT_KEYWORDS


def test_an_empty_folder_and_a_row_that_does_not_fit_are_named(
    folder: Path, audit: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    said = audit(f"dataset.path={folder}").refusal()
    assert said.startswith(f"{folder} holds no file of a known kind\n    fix: a folder with files")
    (folder / "a.jsonl").write_text('{"foo": 1}\n')
    said = Audit("dataset=jsonl", f"dataset.path={folder}", capsys=capsys).refusal()
    assert "a.jsonl:1: template=completion cannot render a completion" in said


@pytest.mark.parametrize("setting", ["output", "html"])
def test_what_is_written_is_local(folder: Path, audit: Run, setting: str) -> None:
    (folder / "a.jsonl").write_text(lines(pairs("a")))
    found = audit(f"dataset.path={folder}", "preview=1", f"{setting}=s3://bucket/there")
    assert found.code == 2 and f"{setting}=s3://bucket/there" in found.error
    assert not Path("s3:").exists()


# 20 and 21: what Datasets and sft have saved


@pytest.mark.parametrize("where", ["local", "file", "memory"])
def test_what_datasets_saved_is_read(folder: Path, audit: Run, where: str) -> None:
    names = {"local": f"{folder}", "file": f"file://{folder}", "memory": "memory://saved"}
    train = Dataset.from_list(pairs("a", "b", "c"))
    split = DatasetDict({"train": train, "test": Dataset.from_list(pairs("d"))})
    root = names[where]
    train.save_to_disk(f"{root}/one", num_shards=2)
    split.save_to_disk(f"{root}/two")
    (folder / "one" / "cache-1.arrow").parent.mkdir(exist_ok=True)
    (folder / "one" / "cache-1.arrow").write_text("left by map")
    found = audit(f"dataset.path={root}/one")
    assert found.texts() == trained("a", "b", "c")
    assert found.train["files"] == 2
    found = audit(f"dataset.path={root}/two", "dataset.eval_split=test")
    assert found.texts() == trained("a", "b", "c")
    assert found.texts("eval") == trained("d")
    assert audit(f"dataset.path={root}/two", "dataset.split=test").texts() == trained("d")
    said = audit(f"dataset.path={root}/two", "dataset.split=dev").refusal()
    assert "has no split dev; it has train, test" in said
    said = audit(f"dataset.path={root}/one", "dataset.eval_split=test").refusal()
    assert "has no split test: files have no splits" in said
    said = audit(f"dataset.path={root}").refusal()
    assert "folders that Datasets saved; only one can be read" in said


def test_prepared_held_out_samples_are_evaluated(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "a.jsonl").write_text(lines(pairs(*"abcdefghij")))
    rows = ("dataset=jsonl", f"dataset.path={folder}", "dataset.eval_fraction=0.2")
    found = Audit("model=tiny", *rows, "output=ready", capsys=capsys)
    assert found.train["files"] == 1
    ready = ("model=tiny", "dataset=pretokenized", "dataset.path=ready")
    steps = ("train.max_steps=2", "train.eval_strategy=steps", "train.eval_steps=1")
    run_warm("train", *ready, *steps, "train.global_batch_size=4", "output_dir=run", cwd=Path.cwd())
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert {record["step"] for record in records if "eval_loss" in record} >= {1, 2}
    assert len(load_from_disk("ready")["eval"]) == 2
    said = Audit(*ready, "dataset.eval_fraction=0.1", capsys=capsys)
    assert said.code == 2 and "has no effect on prepared data" in said.error


# 22: objects and delimiters

MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize(
    "content",
    [
        {"conversations": TURNS},
        {"messages": MESSAGES, "id": 7},
        {"tools": [], "messages": MESSAGES},
        {"version": "1", "meta": {"data": [1]}, "data": [{"messages": MESSAGES}]},
        [{"messages": MESSAGES}],
    ],
    ids=["sharegpt", "messages", "tools", "rows inside", "array"],
)
def test_one_object_is_a_row_or_holds_rows(folder: Path, audit: Run, content: Any) -> None:
    for indent in (None, 2):
        (folder / "a.json").write_text(json.dumps(content, indent=indent))
        found = audit(f"dataset.path={folder}", "template=plain-chat")
        assert found.texts() == ["USER: a\nASSISTANT:⟦ b<|end|>⟧\n"]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("ending", ["csv", "TSV"])
def test_what_separates_columns_is_detected(
    folder: Path, audit: Run, delimiter: str, ending: str
) -> None:
    with (folder / f"rows.{ending}").open("w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["prompt", "completion"])
        writer.writerow(["a, b; c|d\te", "x;y, z\n|"])
        writer.writerow(["f", "g"])
    texts = audit(f"dataset.path={folder}").texts()
    assert texts == ["a, b; c|d\te\n⟦x;y, z\n|<|end|>⟧", "f\n⟦g<|end|>⟧"]


@pytest.mark.parametrize("rest", ['\n[{"prompt": "b", "completion": "B"}]', " and more"])
def test_nothing_may_follow_an_array(folder: Path, audit: Run, rest: str) -> None:
    (folder / "a.json").write_text(json.dumps(pairs("a")) + rest)
    said = audit(f"dataset.path={folder}").refusal()
    assert "a.json:1: the array ends, but the file goes on" in said


def test_what_stands_beside_the_rows_of_an_object_is_named(folder: Path, audit: Run) -> None:
    (folder / "a.json").write_text(json.dumps({"data": pairs("a"), "more": {"rows": pairs("b")}}))
    found = audit(f"dataset.path={folder}")
    assert found.texts() == trained("a")
    assert "a.json: its rows are in data; not read: more" in found.error


def test_tables_of_spreadsheets(folder: Path, audit: Run) -> None:
    (folder / "a.csv").write_text("prompt,completion,,\na,A,,\nb,B,note,\n")
    (folder / "b.csv").write_text("sep=;\nprompt;completion\nc;C\nd\n")
    found = audit(f"dataset.path={folder}", "dataset.max_bad_fraction=0.5")
    assert found.texts() == trained("a", "b", "c")
    assert found.train["unused_columns"] == {"column 3": 1}
    assert found.bad() == [("b.csv", 4, "the row has 1 fields, the header 2")]
    (folder / "c.csv").write_bytes("prompt,completion\né,E\n".encode("cp1252"))
    said = audit(f"dataset.path={folder}").refusal()
    assert "it is not UTF-8" in said and "iconv -f WINDOWS-1252 -t UTF-8" in said


def test_only_files_about_the_data_hold_no_rows(folder: Path, audit: Run) -> None:
    names = ("a.jsonl", "license_qa.jsonl", "notice.jsonl", "readme_rows.jsonl")
    for name, row in zip(names, "abcd", strict=True):
        (folder / name).write_text(lines(pairs(row)))
    for name in ("LICENSE", "README.md", "readme_zh.md", "NOTICE.txt"):
        (folder / name).write_text("text")
    found = audit(f"dataset.path={folder}")
    assert found.texts() == trained(*"abcd")
    assert found.train["unused_files"] == ["LICENSE", "NOTICE.txt", "README.md", "readme_zh.md"]
    assert "unknown endings" not in found.error


def test_a_text_about_something_else_is_read(folder: Path, audit: Run) -> None:
    for name in ("notice_board.txt", "citations.txt", "README.md"):
        (folder / name).write_text("a text\n")
    found = audit(f"dataset.path={folder}", "template=text")
    assert (found.train["rows"], found.train["unused_files"]) == (2, ["README.md"])


# 23: remote folders


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_remote_folders_are_like_local_ones(
    folder: Path, audit: Run, protocol: str, slash: str
) -> None:
    root = f"{protocol}://{folder}/bucket"
    contents = {"b.jsonl": lines(pairs("b")), "a/a.csv": "prompt,completion\na,A\n"}
    for name, text in {**contents, "README.md": "#", ".x.jsonl": "{"}.items():
        with fsspec.open(f"{root}/{name}", "w", auto_mkdir=True) as file:
            file.write(text)
    found = audit(f"dataset.path={root}{slash}")
    assert found.texts() == trained("a", "b")
    assert found.train["files"] == 2
    assert sorted(found.train["unused_files"]) == [".x.jsonl", "README.md"]
    assert audit(f"dataset.path={root}/b.jsonl").texts() == trained("b")
    assert audit(f"dataset.path={root}/*/*.csv").texts() == trained("a")
    with fsspec.open(f"{root}/c.txt", "w") as file:
        file.write("text")
    assert "plain text (c.txt)" in audit(f"dataset.path={root}{slash}").refusal()


@pytest.mark.parametrize(
    ("url", "package", "extra"),
    [
        ("s3://bucket/prefix/", "s3fs", "s3"),
        ("https://example.com/a.jsonl", "aiohttp", "http"),
        ("gs://bucket/a.jsonl", "gcsfs", "gcs"),
        ("az://bucket/a.jsonl", "adlfs", "azure"),
    ],
)
def test_a_missing_package_is_named(
    audit: Run, monkeypatch: pytest.MonkeyPatch, url: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)  # as if it were not installed
    said = audit(f"dataset.path={url}").refusal()
    assert f"pip install {package}, which the extra sft[{extra}] includes" in said


# 30: rows and files that are damaged


def test_a_bad_row_of_json_kills_no_run(folder: Path, audit: Run) -> None:
    deep = '{"prompt": "a", "completion": ' + "[" * 100_000 + "]" * 100_000 + "}"
    hundred = '{"prompt": "a", "x": ' + "[" * 101 + "]" * 101 + ', "completion": "a"}'
    ninety = '{"prompt": "a", "x": ' + "[" * 90 + "]" * 90 + ', "completion": "A"}'
    number = '{"prompt": "a", "completion": ' + "1" * 5000 + "}"
    rows = [ninety, deep, hundred, number, '{"prompt": "b", "completion": "B"}']
    (folder / "a.jsonl").write_text("".join(f"{row}\n" for row in rows))
    found = audit(f"dataset.path={folder}", "dataset.max_bad_fraction=0.9")
    assert found.texts() == trained("a", "b")
    deeper = "the line is nested more than 100 deep"
    assert found.bad()[:2] == [("a.jsonl", 2, deeper), ("a.jsonl", 3, deeper)]
    assert found.bad()[2][:2] == ("a.jsonl", 4)
    assert "limit (4300 digits)" in found.bad()[2][2]
    for text in (f"[{hundred}, {deep}]", f'{{"data": [{hundred}, {rows[4]}]}}'):
        (folder / "a.jsonl").rename(folder / "a.json") if (folder / "a.jsonl").exists() else None
        (folder / "a.json").write_text(text)
        found = audit(f"dataset.path={folder}", "dataset.max_bad_fraction=0.9")
        if "data" in text:
            assert found.texts() == trained("b")
        else:
            assert "a.json:1: the element is nested more than 100 deep" in found.refusal()


def test_a_value_without_a_python_form_is_a_bad_row(folder: Path, audit: Run) -> None:
    times = pa.array([0, 2**55, 0], pa.timestamp("s"))
    table = pa.Table.from_pylist(pairs("a", "b", "c")).append_column("time", times)
    sink = pa.OSFile(str(folder / "a.arrow"), "wb")
    with sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found = audit(f"dataset.path={folder}", "dataset.max_bad_fraction=0.5")
    assert found.texts() == trained("a", "c")
    [(name, line, reason)] = found.bad()
    assert (name, line) == ("a.arrow", 2)
    assert "the row cannot be read: OverflowError" in reason


def test_an_error_of_a_row_kills_no_run(folder: Path, audit: Run) -> None:
    """Three values where two are unpacked are a ValueError."""
    good = {"instruction": "a", "output": "b"}
    (folder / "a.jsonl").write_text(lines([good, {**good, "history": [["a", "b", "c"]]}, good]))
    found = audit(f"dataset.path={folder}", "template=alpaca", "dataset.max_bad_fraction=0.5")
    assert found.train["samples"] == 2
    assert [(name, line) for name, line, _ in found.bad()] == [("a.jsonl", 2)]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl.gz", b'{"prompt": "a"}\n', "a.jsonl.gz cannot be read: Not a gzipped file"),
        ("a.jsonl.xz", b"no", "a.jsonl.xz cannot be read: "),
        ("a.csv.bz2", b"no", "a.csv.bz2 cannot be read: Invalid data stream"),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}" * 9, mtime=0)[:-9],
            "a.jsonl.gz cannot be read: Compressed file",
        ),
        ("a.csv", b'prompt,completion\na,"b" c\n', "a.csv:2: the row cannot be read: "),
        ("a.parquet", b"PAR1", "a.parquet is damaged"),
        ("a.arrow", b"ARROW1", "a.arrow is damaged"),
    ],
)
def test_a_damaged_file_is_refused_by_name(
    folder: Path, audit: Run, name: str, content: bytes, reason: str
) -> None:
    (folder / name).write_bytes(content)
    assert reason in audit(f"dataset.path={folder}").refusal()


def test_a_name_that_is_no_text_is_written_all_the_same(folder: Path, audit: Run) -> None:
    path = os.fsencode(folder) + b"/\xff.jsonl"
    with open(path, "w") as file:
        file.write(lines(pairs("a")) + "{\n")
    found = audit(f"dataset.path={folder}", "dataset.max_bad_fraction=0.5")
    assert found.texts() == trained("a")
    assert found.bad()[0][0] == "\udcff.jsonl"


# 31: only regular files


def test_only_regular_files_are_opened(folder: Path, audit: Run, tmp_path: Path) -> None:
    (folder / "a.jsonl").write_text(lines(pairs("a")))
    os.mkfifo(folder / "log")
    (folder / "link").symlink_to("nowhere")
    found = audit(f"dataset.path={folder}")
    assert found.texts() == trained("a")
    assert found.train["unused_files"] == ["link", "log"]
    os.mkfifo(folder / "b.jsonl")
    for path in (folder, f"{folder}/*.jsonl", folder / "b.jsonl", f"file://{folder}/b.jsonl"):
        assert "b.jsonl is a FIFO, not a file of rows" in audit(f"dataset.path={path}").refusal()
    (folder / "b.jsonl").unlink()
    (folder / "b.jsonl").symlink_to("nowhere")
    for path in (folder, folder / "b.jsonl"):
        assert "b.jsonl is a broken link to nowhere" in audit(f"dataset.path={path}").refusal()
    assert "/dev/null is a device, not a file" in audit("dataset.path=/dev/null").refusal()


@pytest.mark.parametrize("path", ["/no/where", "./rows", "../rows", "~/no-rows", "a/b/c"])
def test_a_path_is_not_looked_for_on_the_hub(audit: Run, path: str) -> None:
    assert f"there is no file or folder {path}" in audit(f"dataset.path={path}").refusal()


# 32: long rows

LIMIT = 200
SHORT = {"prompt": "a", "completion": "A"}
LONG = {"prompt": "b", "completion": "B" * LIMIT}


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "json", "parquet", "arrow"])
def test_a_long_row_is_a_bad_row(folder: Path, audit: Run, ending: str) -> None:
    rows = [SHORT, LONG, SHORT]
    path = folder / f"a.{ending}"
    table = pa.Table.from_pylist(rows)
    if ending == "parquet":
        pq.write_table(table, path)
    elif ending == "arrow":
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        text = json.dumps(rows) if ending == "json" else lines(rows)
        path.write_bytes(gzip.compress(text.encode()) if "gz" in ending else text.encode())
    limits = (f"dataset.max_row_bytes={LIMIT}", "dataset.max_bad_fraction=0.5")
    found = audit(f"dataset.path={folder}", *limits)
    assert found.texts() == trained("a", "a")
    [(name, line, reason)] = found.bad()
    assert (name, line) == (path.name, 1 if ending == "json" else 2)
    assert f"dataset.max_row_bytes={LIMIT}" in reason
    assert audit(f"dataset.path={folder}").train["rows"] == 3


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", 'prompt,completion\na,"' + "B\n" * LIMIT, "a.csv:100: the row is longer than "),
        ("a.json", json.dumps({"data": [LONG]}), "a.json:1: the object is longer than "),
        ("a.json", '[{"prompt": "' + "a" * 2**20, "a.json:1: the element is longer than "),
        ("a.txt", "a" * (LIMIT + 1), "a.txt:1: the text is longer than "),
    ],
)
def test_a_long_row_without_an_end_is_refused(
    folder: Path, audit: Run, name: str, content: str, reason: str
) -> None:
    (folder / name).write_text(content)
    template = "template=text" if name == "a.txt" else "template=completion"
    said = audit(f"dataset.path={folder}", f"dataset.max_row_bytes={LIMIT}", template).refusal()
    assert f"{reason}dataset.max_row_bytes={LIMIT}" in said


def test_a_long_line_takes_bounded_memory(folder: Path, audit: Run) -> None:
    """The line is a hundred times as long as what may be in memory for it."""
    import tracemalloc

    limit = 1 << 20
    with gzip.open(folder / "a.jsonl.gz", "wt", compresslevel=1) as file:
        file.write(lines(pairs("a")) + '{"prompt": "')
        for _ in range(100):
            file.write("a" * limit)
        file.write('"}\n' + lines(pairs("b")))
    limits = (f"dataset.max_row_bytes={limit}", "dataset.max_bad_fraction=0.5")
    tracemalloc.start()
    try:
        found = audit(f"dataset.path={folder}", *limits)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.texts() == trained("a", "b")
    assert [(name, line) for name, line, _ in found.bad()] == [("a.jsonl.gz", 2)]
    assert peak < 20 * limit


# 12: the nulls that Arrow adds

CALLS = [
    {"name": "weather", "arguments": {"city": "Oslo"}},
    {"name": "time", "arguments": {"zone": {"of": "Rome"}, "hours": [{"am": 1}, {"pm": 2}]}},
]
TOOLS = [
    {"name": "weather", "parameters": {"city": {"type": "string"}}},
    {"name": "time", "parameters": {"zone": {"enum": ["Rome"]}}},
]
TOOL_ROWS = [
    {
        "messages": [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [tool],
    }
    for call, tool in zip(CALLS, TOOLS, strict=True)
]


def saved_by(kind: str, path: Path) -> str:
    if kind == "jsonl":
        path.write_text(lines(TOOL_ROWS))
        return str(path)
    table = pa.Table.from_pylist(TOOL_ROWS)
    if kind == "parquet":
        pq.write_table(table, path)
    elif kind == "json columns":
        Dataset.from_list(TOOL_ROWS, on_mixed_types="use_json").to_parquet(path)
    elif kind == "saved":
        Dataset(table).save_to_disk(str(path))
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return str(path)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "json columns", "hub"])
def test_null_keys_of_arrow_are_absent(
    folder: Path, audit: Run, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    chat = ("template=plain-chat", "dataset.max_length=4096")
    expected = audit(f"dataset.path={saved_by('jsonl', folder / 'a.jsonl')}", *chat).texts()
    assert "null" not in "".join(expected) and '"city": "Oslo"' in expected[0]
    if kind == "hub":  # a folder stands in for it: Datasets reads both with the same code
        from sft.data import sources
        from sft.data.folders import Location

        (folder / "hub").mkdir()
        saved_by("parquet", folder / "hub" / "train.parquet")
        monkeypatch.setattr(sources, "resolve", lambda path, split: Location(path))
        path = str(folder / "hub")
    else:
        ending = {"saved": "", "arrow": ".arrow"}.get(kind, ".parquet")
        path = saved_by(kind, folder / f"b{ending}")
    assert audit(f"dataset.path={path}", *chat).texts() == expected


def test_nulls_that_someone_wrote_stay(folder: Path, audit: Run) -> None:
    call = {"name": "f", "arguments": {"city": "Oslo", "a": None}}
    row = {"messages": [MESSAGES[0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    (folder / "a.jsonl").write_text(lines([row]))
    [text] = audit(f"dataset.path={folder}", "template=plain-chat").texts()
    assert '{"city": "Oslo", "a": null}' in text


# 24: the overlap of packing=boundary


@pytest.mark.parametrize(
    ("overlap", "trained_tokens", "second"),
    [("context", 20, "ef⟦ghijkl⟧"), ("train", 20, "e⟦fghijkl⟧")],
)
def test_the_overlap_of_boundary_is_counted(
    folder: Path, audit: Run, overlap: str, trained_tokens: int, second: str
) -> None:
    (folder / "a.txt").write_text("ab\ncd\nefghijklmnop\nq")
    text = ("template=text", "dataset.packing=boundary", "dataset.max_length=8")
    found = audit(f"dataset.path={folder}", *text, f"dataset.boundary_overlap={overlap}")
    assert found.texts()[1] == second
    assert found.train["trained_tokens"] == trained_tokens
    assert found.train["repeated"] == {"context": 3, "train": 2}[overlap]
