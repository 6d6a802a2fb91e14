"""Each row of the tables in docs/data.md, through the command: what is trained, and the counts."""

import csv
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from support import ROOT, TINY
from transformers import AutoTokenizer

from sft.data.__main__ import main
from sft.data.preview import marked

TOKENIZER = AutoTokenizer.from_pretrained(TINY)
USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"x": "1"}}}]}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d"}}]
IDS = TOKENIZER("abcd")["input_ids"]
SAID = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
CALLED = [
    *({"from": "human", "value": "u"}, {"from": "function_call", "value": '{"name": "f"}'}),
    *({"from": "observation", "value": "o"}, {"from": "gpt", "value": "a"}),
]
WRITTEN = 'TOOLS: [{"type": "function", "function": {"name": "f", "description": "d"}}]\n\n'
# A format of the table, in each of its forms: the template, a row, and its text.
FORMATS: dict[str, tuple[str, dict[str, Any], str]] = {
    "prompt_completion": ("completion", {"prompt": "p", "completion": "c"}, "p\n⟦c<|end|>⟧"),
    "prompt_completion, messages": (
        "plain-chat",
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
        "USER: u\nASSISTANT: a<|end|>\nUSER: u\nASSISTANT:⟦ a<|end|>⟧\n",
    ),
    "prompt_completion, history": (
        "plain-chat",
        {"prompt": "p", "completion": "c", "system": "s", "history": [["q", "r"]]},
        "s\n\nUSER: q\nASSISTANT:⟦ r<|end|>⟧\nUSER: p\nASSISTANT:⟦ c<|end|>⟧\n",
    ),
    "alpaca": ("completion", {"instruction": "i", "output": "o"}, "i\n⟦o<|end|>⟧"),
    "alpaca, input": (
        "completion",
        {"instruction": "i", "input": "n", "output": "o"},
        "i\n\nn\n⟦o<|end|>⟧",
    ),
    "alpaca, context": (
        "completion",
        {"instruction": "i", "context": "n", "output": "o"},
        "i\n\nn\n⟦o<|end|>⟧",
    ),
    "question_answer": ("completion", {"question": "q", "answer": "a"}, "q\n⟦a<|end|>⟧"),
    "question_answer, context": (
        "completion",
        {"context": "n", "question": "q", "answer": "a"},
        "n\n\nq\n⟦a<|end|>⟧",
    ),
    "messages": (
        "plain-chat",
        {"messages": [USER, {**ANSWER, "train": False}, USER, ANSWER]},
        "USER: u\nASSISTANT: a<|end|>\nUSER: u\nASSISTANT:⟦ a<|end|>⟧\n",
    ),
    "messages, tools": (
        "plain-chat",
        {
            "messages": [USER, CALL, {"role": "tool", "content": "o"}, ANSWER],
            "tools": TOOLS,
        },
        f'{WRITTEN}USER: u\nASSISTANT:⟦ CALL {{"name": "f", "arguments": {{"x": "1"}}}}<|end|>⟧\n'
        "TOOL: o\nASSISTANT:⟦ a<|end|>⟧\n",
    ),
    "messages, reasoning": (
        "plain-chat",
        {"messages": [USER, {**ANSWER, "reasoning_content": "t"}]},
        "USER: u\nASSISTANT:⟦ <think>\nt\n</think>\n a<|end|>⟧\n",
    ),
    "sharegpt": ("plain-chat", {"conversations": SAID}, "USER: u\nASSISTANT:⟦ a<|end|>⟧\n"),
    "sharegpt, calls": (
        "plain-chat",
        {"conversations": CALLED, "tools": TOOLS},
        f'{WRITTEN}USER: u\nASSISTANT:⟦ CALL {{"name": "f", "arguments": {{}}}}<|end|>⟧\n'
        "TOOL: o\nASSISTANT:⟦ a<|end|>⟧\n",
    ),
    # Nothing predicts the first token of a document.
    "text": ("text", {"text": "word"}, "w⟦ord<|end|>⟧"),
    "tokenized": ("completion", {"input_ids": IDS}, "a⟦bcd⟧"),
    "tokenized, labels": (
        "completion",
        {"input_ids": IDS, "labels": [-100, -100, *IDS[2:]]},
        "ab⟦cd⟧",
    ),
    "tokenized, masks": (
        "completion",
        {
            "input_ids": [*IDS, 0],
            "completion_mask": [0, 0, 1, 1, 0],
            "assistant_masks": [0, 0, 1, 1, 0],
            "attention_mask": [1, 1, 1, 1, 0],
        },
        "ab⟦cd⟧",
    ),
}
KINDS = ("jsonl", "json", "csv", "parquet", "arrow")
TURN = {"messages": [USER, ANSWER]}
# A template of the table: a row, and its text.
TEMPLATES: dict[str, tuple[dict[str, Any], str]] = {
    "alpaca": (
        {"instruction": "i", "output": "o"},
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\ni\n\n### Response:\n⟦o<|end|>⟧",
    ),
    "chat": (TURN, "<|user|>u<|end|><|assistant|>⟦a<|end|>⟧"),
    "plain-chat": (TURN, "USER: u\nASSISTANT:⟦ a<|end|>⟧\n"),
    "chatml": (
        TURN,
        "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n⟦a<|im_end|>⟧\n",
    ),
    "completion": ({"prompt": "p", "completion": "c"}, "p\n⟦c<|end|>⟧"),
    "text": ({"text": "word"}, "w⟦ord<|end|>⟧"),
    "lines": ({"text": "word\n"}, "w⟦ord\n⟧"),
}
PACKINGS = ("none", "bfd", "bfd_split", "wrapped", "boundary")
PLAIN = ("text", "lines")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as a file of the kind that its ending names."""
    kind = path.suffix[1:]
    if kind in ("txt", "md"):
        path.write_text("".join(text for row in rows for text in row.values()))
    elif kind in ("jsonl", "ndjson", "JSONL"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1))
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerow(rows[0])
            for row in rows:
                cells = row.values()
                writer.writerow([v if isinstance(v, str) else json.dumps(v) for v in cells])
    elif kind == "parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)


@pytest.fixture
def audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Give the command on rows in a file: its samples, and the counts."""
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(
        name: str, rows: list[dict[str, Any]], *overrides: str
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        write(tmp_path / name, rows)
        always = ("model=tiny", "dataset=jsonl", "dataset.eval_fraction=0", "dataset.num_proc=1")
        unstopped = ("dataset.stop_above.never_stops=1", "dataset.warn_above.never_stops=1")
        main(["--json", f"dataset.path={name}", *always, *unstopped, *overrides])
        result = json.loads(capsys.readouterr().out)
        samples = list(Dataset.from_file(f"{result['folder']}/train.arrow"))
        return samples, result["parts"]["train"]

    return run


def trained(sample: dict[str, Any]) -> int:
    return sum(label != -100 for label in sample["labels"])


def require_counts(samples: list[dict[str, Any]], counts: dict[str, Any], rows: int) -> None:
    """Require that the audit counts what was written."""
    assert (counts["rows"], counts["bad"], counts["empty"], counts["dropped"]) == (rows, 0, 0, 0)
    assert counts["samples"] == len(samples)
    assert counts["tokens"] == sum(len(sample["input_ids"]) for sample in samples)
    assert counts["trained_tokens"] == sum(map(trained, samples))
    assert counts["longest"] == max(len(sample["input_ids"]) for sample in samples)


@pytest.mark.parametrize(
    ("name", "kind"),
    # A cell of a CSV file is text in the columns prompt and completion, whatever it holds.
    sorted({*itertools.product(FORMATS, KINDS)} - {("prompt_completion, messages", "csv")}),
)
def test_each_format_in_each_kind_of_file(audit: Any, name: str, kind: str) -> None:
    template, row, text = FORMATS[name]
    format = "auto" if kind in ("jsonl", "csv", "parquet") else name.split(",")[0]
    given = (f"template={template}", "dataset.packing=none", f"dataset.format={format}")
    samples, counts = audit(f"rows.{kind}", [row, row], *given)
    assert [marked(sample, TOKENIZER) for sample in samples] == [text, text]
    require_counts(samples, counts, 2)


@pytest.mark.parametrize("ending", ["tsv", "ndjson", "JSONL"])
def test_other_endings_of_files(audit: Any, ending: str) -> None:
    template, row, text = FORMATS["messages, tools"]
    samples, counts = audit(f"rows.{ending}", [row], f"template={template}")
    assert [marked(sample, TOKENIZER) for sample in samples] == [text]
    require_counts(samples, counts, 1)


@pytest.mark.parametrize("ending", ["txt", "md"])
def test_plain_text_files(audit: Any, ending: str) -> None:
    samples, counts = audit(f"a.{ending}", [{"": "word\n"}], "template=text")
    assert [marked(sample, TOKENIZER) for sample in samples] == ["w⟦ord\n<|end|>⟧"]
    require_counts(samples, counts, 1)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the embedded model with ChatML's control tokens in its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(TINY, folder, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_each_template_with_each_packing(
    audit: Any, chatml: Path, capsys: pytest.CaptureFixture[str], name: str, packing: str
) -> None:
    row, text = TEMPLATES[name]
    given = [f"template={name}", f"dataset.packing={packing}"]
    if name == "chatml":
        given.append(f"model.name_or_path={chatml}")
    if packing in ("wrapped", "boundary") and name not in PLAIN:
        with pytest.raises(SystemExit):
            audit("rows.jsonl", [row] * 5, *given)
        assert f"dataset.packing={packing}\n    would separate prompts" in capsys.readouterr().err
        return
    samples, counts = audit("rows.jsonl", [row] * 5, *given)
    tokenizer = AutoTokenizer.from_pretrained(chatml) if name == "chatml" else TOKENIZER
    texts = [marked(sample, tokenizer) for sample in samples]
    joined = "w⟦ord\n" + "word\n" * 4 + "⟧" if name == "lines" else text * 5  # one document
    assert texts == ([text] * 5 if packing == "none" else [joined])
    assert counts["documents"] == 5
    require_counts(samples, counts, 5)


def test_the_tables_of_the_docs_are_these() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for name in [*FORMATS, *TEMPLATES, *PACKINGS]:
        assert f"| `{name.split(',')[0]}`" in page or f"`{name}`" in page, name
    for kind in KINDS:
        assert f"`.{kind}`" in page, kind
