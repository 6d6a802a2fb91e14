"""Rows of every kind of source, each with its place; and content told from its name."""

import bz2
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from support import SHARED

from sft.data import json_rows, locations
from sft.data.folders import resolve
from sft.data.rows import BadRow, Row
from sft.errors import DataError

ROWS = [{"a": "x,1\nü", "b": '"q"'}, {"a": "y", "b": "z"}, {"a": " ", "b": "\\n"}]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows: list[dict[str, Any]], separator: str) -> str:
    quoted = ['"' + value.replace('"', '""') + '"' for row in rows for value in row.values()]
    pairs = [separator.join(quoted[i : i + 2]) for i in range(0, len(quoted), 2)]
    return "\r\n".join([f"a{separator}b", *pairs, ""])


def arrow(path: Path, stream: bool) -> None:
    data = pa.Table.from_pylist(ROWS)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as sink, make(sink, data.schema) as writer:
        writer.write_table(data)


WRITERS: dict[str, Callable[[Path], object]] = {
    "rows.jsonl": lambda p: p.write_text(lines(ROWS)),
    "bom.jsonl": lambda p: p.write_text("\ufeff" + lines(ROWS)),
    "rows.json": lambda p: p.write_text(json.dumps(ROWS, indent=1)),
    "inside.json": lambda p: p.write_text(json.dumps({"version": "1", "data": ROWS})),
    "lines.json": lambda p: p.write_text(lines(ROWS)),
    "rows.csv": lambda p: p.write_bytes(table(ROWS, ",").encode("utf-8-sig")),
    "rows.tsv": lambda p: p.write_bytes(table(ROWS, "\t").encode()),
    "rows.jsonl.gz": lambda p: p.write_bytes(gzip.compress(lines(ROWS).encode())),
    "rows.csv.bz2": lambda p: p.write_bytes(bz2.compress(table(ROWS, ",").encode())),
    "rows.parquet": lambda p: pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), p),
    "stream.arrow": lambda p: arrow(p, stream=True),
    "file.arrow": lambda p: arrow(p, stream=False),
    "saved": lambda p: Dataset.from_list(ROWS).save_to_disk(str(p)),
    "saved_splits": lambda p: DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(str(p)),
}


def read(path: object, split: str = "train") -> list[Row | BadRow]:
    return list(locations.read(resolve(str(path), split)))


def fingerprint(path: object) -> str:
    return locations.fingerprint(resolve(str(path)))


def values(path: object, **options: Any) -> list[dict[str, Any]]:
    found = read(path, **options)
    assert all(isinstance(row, Row) for row in found)
    return [row.values for row in found if isinstance(row, Row)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    assert values(tmp_path / name) == ROWS


def test_urls_patterns_and_folders(tmp_path: Path) -> None:
    with fsspec.open("memory://bucket/rows.jsonl", "w") as file:
        file.write(lines(ROWS))
    assert values("memory://bucket/rows.jsonl") == ROWS
    (tmp_path / "deep").mkdir()
    for name in ("b", "a", "deep/c"):
        (tmp_path / f"{name}.jsonl").write_text(lines([{"name": name}]))
    assert values(tmp_path / "*.jsonl") == [{"name": "a"}, {"name": "b"}]
    assert [row["name"] for row in values(tmp_path)] == ["a", "b", "deep/c"]
    (tmp_path / "b [1].md").write_text("one\r\n\r\ntwo")
    with pytest.raises(DataError, match=r"plain text \(b \[1\]\.md\) and tables \(a\.jsonl, b\.j"):
        read(tmp_path)
    assert values(tmp_path / "b [1].md") == [{"text": "one\r\n\r\ntwo"}]


def test_places_are_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": \n[1]\n{"a": "\xff"}\n{"a": 2}')
    found = read(path)
    assert [row.line for row in found] == [1, 3, 4, 5, 6]
    assert [type(row) for row in found] == [Row, BadRow, BadRow, BadRow, Row]
    assert [row.reason.partition(":")[0] for row in found if isinstance(row, BadRow)] == [
        "the line is not valid JSON",
        "the line is not an object but list",
        "the line is not valid JSON",
    ]
    path = tmp_path / "rows.json"
    path.write_text('[\n {"a": 1},\n 7,\n\n {"a":\n 2}]\n')
    assert [row.line for row in read(path)] == [2, 3, 5]
    path = tmp_path / "rows.csv"
    path.write_text('a,b\n1,"two\nlines"\n3\n4,5\n')
    found = read(path)
    assert [row.line for row in found] == [2, 4, 5]
    assert isinstance(found[1], BadRow) and found[1].reason == "the row has 1 fields, the header 2"


@pytest.mark.parametrize("block", [1, 2, 7, 40])
def test_an_array_is_read_a_block_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", block)
    path = tmp_path / "rows.json"
    path.write_text('[\n {"a": "1\\n]"},\n 1234, true,\n\n {"b":\n [2, {}]}\n]\n')
    found = [(row[0], row.line) for row in read(path)]
    assert found == [({"a": "1\n]"}, 2), (str(path), 3), (str(path), 3), ({"b": [2, {}]}, 5)]
    path.write_text('[{"a": 1},\n {"a": 2}')
    with pytest.raises(DataError, match=r"rows\.json:2: the JSON is damaged"):
        read(path)


def test_objects_keep_their_own_keys(tmp_path: Path) -> None:
    rows = [{"call": {"x": 1}}, {"call": {"y": [None, {"z": "w"}]}}]
    (tmp_path / "calls.jsonl").write_text(lines(rows))
    assert values(tmp_path / "calls.jsonl") == rows


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "there is no file or folder"),
        ("./absent", None, "there is no file or folder"),
        ("rows.xml", "<a/>", "has an unknown file ending"),
        ("empty.csv", "", "is empty"),
        ("either.csv", "a;b,c\n1;2,3\n", "cannot be told whether commas or semicolons"),
        ("unquoted.csv", "a;b\n1;2;3\n", "cannot be told whether semicolons"),
        ("twice.csv", "a,a\n1,2\n", "has the column a twice"),
        ("number.json", "7", "holds no JSON array or object"),
        ("two.json", '{"a": [], "b": []}', "one JSON object with 2 lists"),
        ("broken.json", '[{"a": 1},\n{"a"', "broken.json:2: the JSON is damaged"),
        ("broken.parquet", "PAR1", "is damaged"),
        ("bad.txt", b"\xff\xfe\x00", "it is not UTF-8: .*\n.*iconv -f UTF-16"),
        ("other://x.jsonl", None, "cannot be read"),
    ],
)
def test_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    elif content is not None:
        Path(name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(name)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file of a known kind"):
        read(tmp_path)
    for name in ("a.csv", "b.jsonl"):
        (tmp_path / name).write_text("x\n")
    WRITERS["saved_splits"](tmp_path / "saved")
    with pytest.raises(DataError, match=r"holds 1 folders that Datasets saved"):
        read(tmp_path)
    with pytest.raises(DataError, match="has no split test; it has train"):
        values(tmp_path / "saved", split="test")


def test_a_fingerprint_is_of_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text(lines(ROWS))
    first = fingerprint(path)
    assert not (tmp_path / "cache").exists()  # too fresh to be told by its time stamp
    os.utime(path, (1e9, 1e9))
    assert fingerprint(path) == first
    memo = tmp_path / "cache" / "digests.json"
    [(key, digest)] = json.loads(memo.read_text()).items()
    assert key.startswith(f"{path} ")
    memo.write_text(json.dumps({key: "told"}))
    assert fingerprint(path) != first  # what the memo tells is not read again
    memo.write_text("{damaged")
    assert fingerprint(path) == first
    assert json.loads(memo.read_text()) == {key: digest}
    path.write_text(lines(ROWS[:2]))
    assert fingerprint(path) != first
    WRITERS["saved_splits"](tmp_path / "saved")
    assert fingerprint(tmp_path / "saved") != first


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real input: {SHARED} is absent")
@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gsm8k/train.jsonl", 7473),
        ("dolly-15k/dolly-sample-5000.jsonl", 5000),
        ("llamafactory-demo/glaive_toolcall_en_demo.json", 300),
        ("llamafactory-demo/identity.json", 91),
        ("fastchat/dummy_conversation.json", 500),
        ("self-instruct/seed_tasks.jsonl", 175),
        ("llms-from-scratch/instruction-data.json", 1100),
    ],
)
def test_real_files(name: str, count: int) -> None:
    assert len(values(SHARED / "data" / name)) == count
