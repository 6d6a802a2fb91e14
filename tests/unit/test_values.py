"""What is in a row is trained, counted or refused, whatever its columns hold: by the command."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support import TINY
from transformers import AutoTokenizer

from sft.data.__main__ import main as data
from sft.data.preview import marked

TOKENIZER = AutoTokenizer.from_pretrained(TINY)
ALWAYS = ("model=tiny", "dataset=jsonl", "dataset.max_bad_fraction=0.9")
UNSTOPPED = ("dataset.stop_above.never_stops=1", "dataset.stop_above.nothing_trained=1")
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}


@pytest.fixture
def audit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Give the command ``sft data`` on rows: what is trained, the figures, and the rows dropped."""
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(
        rows: list[Any] | str, *overrides: str, name: str = "rows.jsonl"
    ) -> tuple[list[str], dict[str, Any], list[dict[str, Any]]]:
        lines = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(lines)
        given = {"dataset.path": name, "dataset.eval_fraction": "0", "template": "completion"}
        given |= dict(item.split("=", 1) for item in [*ALWAYS, *overrides])
        data(["--json", *(f"{key}={value}" for key, value in given.items())])
        result = json.loads(capsys.readouterr().out)
        folder = Path(result["folder"])
        samples = Dataset.from_file(str(folder / "train.arrow"))
        dropped = [json.loads(line) for line in (folder / "dropped.jsonl").open()]
        dropped.sort(key=lambda row: int(row["line"]))
        return [marked(s, TOKENIZER) for s in samples], result["parts"]["train"], dropped

    return run


def refused(
    audit: Any, capsys: pytest.CaptureFixture[str], rows: list[Any], *overrides: str
) -> str:
    """Give the message with which the command refuses rows."""
    with pytest.raises(SystemExit):
        audit(rows, *overrides)
    return str(json.loads(capsys.readouterr().out)["error"])


GOOD = {"prompt": "p", "completion": "c"}


def test_a_template_writes_text_and_finite_numbers_only(audit: Any) -> None:
    values = [7, 2.5, 1e-07, "x", True, [1], {"a": 1}, float("inf"), float("nan"), None, ""]
    rows = [{"prompt": "p", "completion": value} for value in values]
    rows += [{"prompt": "p", "completion": "c", "messages": None}]
    texts, figures, dropped = audit(rows)
    written = ["7", "2.5", "1e-07", "x", "c"]
    assert texts == [f"p\n⟦{text}<|end|>⟧" for text in written]
    assert (figures["rows"], figures["bad"], figures["empty"]) == (12, 4, 3)
    assert [(row["line"], row["reason"].split(";")[0]) for row in dropped] == [
        (5, "the column completion holds the boolean true"),
        (
            6,
            "a message of the column completion holds the number 1, not an object with role and "
            "content",
        ),
        (7, 'the column completion holds the object {"a": 1}'),
        (8, "the column completion holds the number inf"),
        *((line, "there is nothing to train: the completion is empty") for line in (9, 10, 11)),
    ]
    assert all(row["file"] == "rows.jsonl" for row in dropped)


def test_dates_and_bytes_of_a_table_are_refused(audit: Any, tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet

    day = datetime.datetime(2024, 1, 2)
    columns = {"prompt": ["p"] * 3, "completion": ["c"] * 3, "when": [day, None, None]}
    table = pa.table({**columns, "raw": [None, b"x", None]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    texts, figures, dropped = audit(
        [],
        *(
            "dataset.path=t.parquet",
            "template.prompts=['{prompt}{when}','{prompt}{raw}','{prompt}']",
        ),
    )
    assert texts == ["p⟦c<|end|>⟧"]
    assert [(row["line"], row["reason"].split(";")[0]) for row in dropped] == [
        (1, "the column when holds a value of type datetime"),
        (2, "the column raw holds a value of type bytes"),
    ]
    texts, figures, dropped = audit([], "dataset.path=t.parquet")
    assert (len(texts), dropped, figures["unused_columns"]) == (3, [], {"raw": 1, "when": 1})


def test_text_beside_messages_is_a_conversation(audit: Any) -> None:
    answer = [{"role": "assistant", "content": "c"}]
    context = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "r"},
        {"role": "user", "content": "p"},
    ]
    rows = [
        {"prompt": "p", "completion": answer},
        {"prompt": context, "completion": "c"},
        {"prompt": context, "completion": answer},
        {"prompt": context, "completion": None},
        {"prompt": "p", "completion": []},
    ]
    texts, figures, _ = audit(rows, "template=plain-chat")
    last = "USER: p\nASSISTANT:⟦ c<|end|>⟧\n"
    before = "USER: q\nASSISTANT: r<|end|>\n"
    assert texts == [last, before + last, before + last]
    assert (figures["bad"], figures["empty"]) == (0, 2)


def test_known_roles_parts_and_arguments(audit: Any) -> None:
    user = {"role": "user", "content": [{"type": "text", "value": "u"}]}
    result = {"role": "function", "name": "f", "content": "seen"}
    calls = [
        CALL,
        {"role": "assistant", "function_call": {"name": "f", "arguments": None}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
    ]
    rows = [
        {"messages": [user, call, result, {"role": "assistant", "content": "a"}]} for call in calls
    ]
    rows.append({"messages": [{"role": "user", "content": [{"type": "image"}]}, CALL]})
    rows.append({"messages": [{"content": "x"}, CALL]})
    texts, _, dropped = audit(rows, "template=plain-chat")
    call = '⟦ CALL {"name": "f", "arguments": {}}<|end|>⟧\nTOOL: seen\n'
    assert texts == [f"USER: u\nASSISTANT:{call}ASSISTANT:⟦ a<|end|>⟧\n"] * 3
    assert [row["reason"] for row in dropped] == [
        "message 1 has content other than text, which a text model cannot read: the object "
        '{"type": "image"}',
        "message 1 has no role; its keys are content",
    ]


def test_history_is_read_in_each_of_its_forms(audit: Any) -> None:
    forms: list[Any] = [
        [["q", "r"]],
        [{"user": "q", "assistant": "r"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}],
    ]
    pairs = [
        {"instruction": "i", "input": "j", "output": "o"},
        {"prompt": "i\n\nj", "completion": "o"},
        {"question": "i\n\nj", "answer": "o"},
    ]
    rows = [{**pair, "history": form, "system": "S"} for form in forms for pair in pairs]
    wrong: list[Any] = [[["q"]], ["q"], "text", [{"q": "a"}], [["q", True]]]
    rows += [{**pairs[0], "history": form} for form in wrong]
    texts, figures, dropped = audit(rows, "template=plain-chat")
    turn = "USER: q\nASSISTANT:⟦ r<|end|>⟧\nUSER: i\n\nj\nASSISTANT:⟦ o<|end|>⟧\n"
    assert texts == [f"S\n\n{turn}"] * 9
    assert (figures["bad"], figures["unused_columns"]) == (5, {})
    assert [row["line"] for row in dropped] == [10, 11, 12, 13, 14]
    assert dropped[0]["reason"].startswith('turn 1 of the column history holds the list ["q"]; ')
    assert dropped[2]["reason"].startswith("the column history is not valid JSON")
    assert dropped[4]["reason"].startswith("the content of message 2 holds the boolean true")


def test_an_empty_answer_is_not_trained(audit: Any) -> None:
    def chat(*answers: str) -> dict[str, Any]:
        turns = [("user", "u"), ("assistant", "")]
        return {
            "messages": [
                {"role": role, "content": content or answer}
                for answer in answers
                for role, content in turns
            ]
        }

    rows = [chat("a", ""), chat(""), chat(" ", "b"), chat("a", "b")]
    rows.append({"messages": [{"role": "user", "content": "u"}, CALL]})
    texts, figures, dropped = audit(rows, "template=plain-chat")
    turn = "USER: u\nASSISTANT:"
    assert texts == [
        f"{turn}⟦ a<|end|>⟧\n{turn}<|end|>\n",
        f"{turn}   <|end|>\n{turn}⟦ b<|end|>⟧\n".replace("   ", "  "),
        f"{turn}⟦ a<|end|>⟧\n{turn}⟦ b<|end|>⟧\n",
        f'{turn}⟦ CALL {{"name": "f", "arguments": {{}}}}<|end|>⟧\n',
    ]
    assert figures["checks"]["empty_answers"] == {
        **{"documents": 2, "share": 0.5, "verdict": "warn"}
    }
    assert (figures["bad"], figures["empty"]) == (0, 1)
    assert dropped[0]["reason"] == "there is nothing to train: the answer is empty"
    texts, figures, _ = audit(rows, "template=plain-chat", "template.train_on=last_assistant")
    assert (len(texts), figures["empty"], figures["checks"]["empty_answers"]["documents"]) == (
        *(3, 2, 0),
    )


def test_masks_of_tokenised_rows_are_obeyed(audit: Any) -> None:
    ids = TOKENIZER("abcd")["input_ids"]
    rows = [
        {"input_ids": ids},
        {"input_ids": ids, "completion_mask": [0, 0, 1, 1]},
        {"input_ids": ids, "assistant_masks": [0, 1, 0, 1], "labels": [-100, ids[1], -100, ids[3]]},
        {"input_ids": [0, *ids, 0, 0], "attention_mask": [0, 1, 1, 1, 1, 0, 0], "labels": [-100] * 3
         + ids[2:] + [-100] * 2},
        {"input_ids": [float(id) for id in ids], "attention_mask": [True, True, True, False]},
        {"input_ids": ids, "train": False},
        {"input_ids": [], "labels": []},
    ]  # fmt: skip
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"input_ids": [1, -1]},
            "input_ids has -1 at 1; the ids of the model's tokenizer are 0 to",
        ),
        ({"input_ids": [1, 320]}, "input_ids has 320 at 1; the ids of the model's tokenizer are 0"),
        ({"input_ids": [2.5]}, "input_ids has the number 2.5 at 0; it must be a whole number"),
        ({"input_ids": [1, True]}, "input_ids has the boolean true at 1; it must be a whole"),
        ({"input_ids": ["1"]}, 'input_ids has the text "1" at 0; it must be a whole number'),
        ({"input_ids": [float("inf")]}, "input_ids has the number inf at 0; it must be a whole"),
        ({"input_ids": 3}, "the column input_ids holds the number 3, not a list of numbers"),
        ({"input_ids": ids, "attention_mask": [1, 0, 1, 1]}, "attention_mask is 0 at 1, between"),
        ({"input_ids": ids, "attention_mask": [1]}, "the row has 4 input_ids but 1 attention_mask"),
        (
            {"input_ids": ids, "completion_mask": [0, 0, 1, 2]},
            "completion_mask has 2 at 3; it must",
        ),
        (
            {"input_ids": ids, "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 1]},
            "completion_mask and assistant_masks disagree at 1 on what is trained",
        ),
        ({"input_ids": ids, "images": ["x.png"]}, "does not use the column images, which the row"),
    ]
    texts, figures, dropped = audit([*rows, *(row for row, _ in wrong)], *UNSTOPPED)
    assert texts == ["a⟦bcd⟧", "ab⟦cd⟧", "a⟦b⟧c⟦d⟧", "ab⟦cd⟧", "a⟦bc⟧"]
    assert (figures["bad"], figures["empty"], figures["tokens"]) == (len(wrong), 2, 19)
    reasons = [row["reason"] for row in dropped if row["line"] > len(rows)]
    for (_, expected), reason in zip(wrong, reasons, strict=True):
        assert expected in reason
    assert [row["line"] for row in dropped if "nothing to train" in row["reason"]] == [6, 7]


def test_flags_of_a_row_and_of_a_message(audit: Any) -> None:
    flags = [{"train": True}, {"weight": 1}, {"loss_weight": 1.0}, {"train": None}]
    off = [{"train": False}, {"weight": 0}, {"loss_weight": "0"}, {"training": "False"}]
    bad = [{"weight": 0.5}, {"train": "x"}, {"loss_weight": 2}, {"train": True, "weight": 0}]
    rows = [{**GOOD, **flag} for flag in [*flags, *off, *bad]]
    texts, figures, dropped = audit(rows)
    assert len(texts) == 4
    assert (figures["bad"], figures["empty"], figures["unused_columns"]) == (4, 4, {})
    assert dropped[0]["reason"] == "there is nothing to train: the row has train=False"
    reasons = [row["reason"] for row in dropped if row["line"] > 8]
    assert reasons[0].startswith("the row has weight=0.5: 1 or true trains it, 0 or false does not")
    assert reasons[3] == "the row has flags that disagree: train, weight"
    # A column that the template writes is text.
    texts, _, _ = audit([{**GOOD, "weight": 0.5}], "template.prompts=['{prompt} {weight}: ']")
    assert texts == ["p 0.5: ⟦c<|end|>⟧"]

    def chat(flag: dict[str, Any]) -> dict[str, Any]:
        turn = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        return {"messages": [*turn[:1], {**turn[1], **flag}, *turn]}

    bad[0] = {"weight": 1.5}
    rows = [chat(flag) for flag in [*flags, *off, *bad]]
    texts, figures, dropped = audit(rows, "template=plain-chat")
    turn = "USER: u\nASSISTANT:⟦ a<|end|>⟧\n"
    context = "USER: u\nASSISTANT: a<|end|>\n"
    assert texts == [turn + turn] * 4 + [context + turn] * 4
    assert [row["line"] for row in dropped] == [9, 10, 11, 12]
    reason = (
        "message 2 has weight=1.5: 1 or true trains it, 0 or false does not, and a fraction less"
    )
    assert dropped[0]["reason"].startswith(reason)


def test_what_is_not_used_is_counted(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    turn = [{"role": "user", "content": "u", "id": 1}, {"role": "assistant", "content": "a"}]
    rows = [{"messages": turn, "source": "s", "id": n, "note": "" if n else "x"} for n in range(9)]
    overrides = ["template=plain-chat", "dataset.eval_fraction=0.34"]
    _, figures, _ = audit(rows, *overrides[:1])
    assert figures["unused_columns"] == {"id": 9, "messages.id": 9, "source": 9, "note": 1}
    _, split, _ = audit(rows, *overrides)
    assert split["unused_columns"]["id"] == split["rows"] == 6
    data(["dataset=jsonl", "dataset.path=rows.jsonl", "model=tiny", *overrides])
    table = capsys.readouterr().out
    assert "  column not used: messages.id" in table


@pytest.mark.parametrize(
    ("row", "template", "name"),
    [
        ({**GOOD, "context": "x"}, "completion", "context"),
        ({**GOOD, "history": [["q", "r"]]}, "completion", "history"),
        ({**GOOD, "system": "S"}, "completion", "system"),
        ({"instruction": "i", "output": "o", "system": "S"}, "alpaca", "system"),
        ({**GOOD, "tools": [{"name": "f"}]}, "completion", "tools"),
        ({**GOOD, "images": ["x.png"]}, "plain-chat", "images"),
        ({**GOOD, "audio": {"path": "x"}}, "plain-chat", "audio"),
        ({**GOOD, "labels": [1]}, "completion", "labels"),
        ({**GOOD, "completion_mask": [1]}, "completion", "completion_mask"),
        ({"text": "t", "attention_mask": [1]}, "text", "attention_mask"),
        (
            {"messages": [{"role": "user", "content": "<image>", "images": ["x"]}, CALL]},
            "plain-chat",
            "messages.images",
        ),
        (
            {"system": "S", "messages": [{"role": "system", "content": "T"}, CALL]},
            "plain-chat",
            "system",
        ),
    ],
)
def test_columns_of_known_meaning_are_used_or_named(
    audit: Any, capsys: pytest.CaptureFixture[str], row: dict[str, Any], template: str, name: str
) -> None:
    message = refused(audit, capsys, [row], f"template={template}")
    assert f"rows.jsonl:1: template={template} does not use the column {name}, which" in message
    assert f"dataset.ignore_columns=[{name}]" in message
    ignoring = (f"template={template}", f"dataset.ignore_columns=[{name}]")
    texts, figures, _ = audit([row], *ignoring)
    assert (len(texts), figures["unused_columns"]) == (1, {name: 1})
    empty = {key: type(value)() if key == name else value for key, value in row.items()}
    if name in row:
        assert audit([empty], f"template={template}")[0] == texts


def test_passages_and_system_messages_are_used(audit: Any) -> None:
    dolly = {"instruction": "i", "context": "x", "response": "r", "category": "k"}
    squad = {"context": "x", "question": "q", "answer": "a"}
    rows = [dolly, {**dolly, "context": ""}, squad, {**squad, "context": None}]
    texts, figures, _ = audit(rows, "template=completion")
    assert texts == [
        "i\n\nx\n⟦r<|end|>⟧",
        "i\n⟦r<|end|>⟧",
        "x\n\nq\n⟦a<|end|>⟧",
        "q\n⟦a<|end|>⟧",
    ]
    assert figures["unused_columns"] == {"category": 2}
    for template in ("chat", "plain-chat"):
        texts, _, _ = audit(rows, f"template={template}")
        prompts = ["i\n\nx", "i", "x\n\nq", "q"]
        assert all(prompt in text for prompt, text in zip(prompts, texts, strict=True))
    texts, _, _ = audit([{**GOOD, "system": "S"}], "template=chat")
    assert texts == ["<|system|>S<|end|><|user|>p<|end|><|assistant|>⟦c<|end|>⟧"]


def test_json_in_a_table_is_parsed(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import csv
    import io

    turn = [{"role": "user", "content": "u"}, CALL]
    said = [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]
    tools = [{"name": "f", "parameters": {}}]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(["messages", "conversations", "tools", "weight"])
    writer.writerow([json.dumps(turn), "", json.dumps(tools), ""])
    writer.writerow(["", json.dumps(said), "[]", "1"])
    writer.writerow(["", json.dumps(said), "", "0"])
    writer.writerow(["hello", "", "", ""])
    writer.writerow(['{"role": "user"}', "", "", ""])
    texts, figures, dropped = audit(file.getvalue(), "template=plain-chat", name="rows.csv")
    assert texts == [
        'TOOLS: [{"type": "function", "function": {"name": "f", "parameters": {}}}]\n\n'
        'USER: u\nASSISTANT:⟦ CALL {"name": "f", "arguments": {}}<|end|>⟧\n',
        "USER: u\nASSISTANT:⟦ a<|end|>⟧\n",
    ]
    assert (figures["bad"], figures["empty"]) == (2, 1)
    assert [row["reason"].split(":")[0] for row in dropped if "nothing" not in row["reason"]] == [
        "the column messages is not valid JSON",
        'the column messages holds the object {"role"',
    ]


def test_a_column_with_a_dot_is_a_column_and_no_attribute(audit: Any) -> None:
    rows = [{"prompt": "a", "prompt.__class__": "b", "answer key": "c"}]
    texts = ("template.prompts=['{prompt.__class__}:']", "template.completions=['{answer key}']")
    assert audit(rows, *texts)[0] == ["b:⟦c<|end|>⟧"]
    for field in ("{prompt!r}", "{prompt:>9}", "{prompt[0]}"):
        with pytest.raises(SystemExit) as refused:
            audit(rows, f"template.prompts=['{field}']")
        assert refused.value.code == 2


def test_arguments_of_calls_and_schemas_of_tools_have_other_names(audit: Any) -> None:
    for key in ("arguments", "parameters", "args", "input"):
        call = {"name": "f", key: {"city": "Oslo"}, "thought": "t"}
        turn = [{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [call]}]
        tool = {"name": "f", "input_schema": {"type": "object"}}
        texts, figures, _ = audit([{"messages": turn, "functions": [tool]}], "template=plain-chat")
        assert texts == [
            'TOOLS: [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"'
            "}}}]\n\nUSER: u\nASSISTANT:⟦ CALL "
            '{"name": "f", "arguments": {"city": "Oslo"}}<|end|>⟧\n'
        ]
        assert figures["unused_columns"] == {"messages.tool_calls.thought": 1}


def test_the_columns_of_a_format_are_preferred(audit: Any) -> None:
    """Some data has the whole text, answer included, in a column of its own."""
    rows = [
        {"instruction": "i", "input": "n", "output": "o", "prompt": "i n o"},
        {"question": "q", "answer": "a", "response": "r", "instruction": "i"},
    ]
    texts, figures, _ = audit(rows, "template=completion")
    assert texts == ["i\n\nn\n⟦o<|end|>⟧", "q\n⟦a<|end|>⟧"]
    assert figures["unused_columns"] == {"instruction": 1, "prompt": 1, "response": 1}
    texts, _, _ = audit(rows, "template=plain-chat")
    assert texts == [f"USER: {p}\nASSISTANT:⟦ {a}<|end|>⟧\n" for p, a in (("i\n\nn", "o"), "qa")]
    texts, _, _ = audit(rows[:1], "template=plain-chat", "dataset.format=alpaca")
    assert texts == ["USER: i\n\nn\nASSISTANT:⟦ o<|end|>⟧\n"]


def test_a_renamed_column_hides_no_other(audit: Any) -> None:
    rows = [
        {"instruction": "i", "response": "r"},
        {"instruction": "i", "context": "c", "response": "r"},
        {"instruction": "i", "input": "n", "response": "r", "context": None},
        {"instruction": "i", "input": "n", "context": "c", "response": "r"},
    ]
    texts, figures, _ = audit(
        rows, "template=completion", "dataset.columns={input: context, output: response}"
    )
    answer = "\n⟦r<|end|>⟧"
    assert texts == [f"i{given}{answer}" for given in ("", "\n\nc", "\n\nn", "\n\nc")]
    assert figures["unused_columns"] == {"input, replaced by context": 1}


@pytest.mark.parametrize("name", ["loss_mask", "response_mask", "assistant_mask", "label_mask"])
def test_masks_have_other_names(audit: Any, name: str) -> None:
    ids = [*TOKENIZER.encode("abcd", add_special_tokens=False), 258]
    row = {"input_ids": ids, name: [0, 0, 1, 1, 1]}
    assert audit([row], *UNSTOPPED)[0] == ["ab⟦cd<|end|>⟧"]
    assert audit([{**row, "position_ids": [0, 1, 2, 3, 4]}], *UNSTOPPED)[0] == ["ab⟦cd<|end|>⟧"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [97, 98, 97], "position_ids": [0, 1, 0]}, "position_ids begin again"),
        ({"input_ids": [97, 98, 97], "prompt_mask": [0, 1, 0]}, "the column prompt_mask, which"),
        ({**GOOD, "label": False}, "label=false: its completion is one not to learn"),
        ({**GOOD, "label": "False"}, "label=false: its completion is one not to learn"),
        ({"question": "q", "response": "r", "system_prompt": "S"}, "columns.system=system_prompt"),
        ({**GOOD, "reasoning_content": "R"}, "does not use the column reasoning_content"),
        ({**GOOD, "input": "x"}, "does not use the column input"),
        (
            {"prompt": "p", "completion": [{"role": "user", "content": "p"}, CALL]},
            "the completion begins with a message of role user",
        ),
        (
            {"prompt": "p", "completion": [{"from": "human", "value": "p"}, CALL]},
            "the completion begins with a message of role human",
        ),
        ({"messages": [{**CALL, "loss_scale": 0}]}, "does not use the column messages.loss_scale"),
    ],
)
def test_what_says_more_than_is_used_is_refused(
    audit: Any, capsys: pytest.CaptureFixture[str], row: dict[str, Any], message: str
) -> None:
    template = (
        "plain-chat" if "messages" in row or message.endswith(("user", "human")) else "completion"
    )
    assert message in refused(audit, capsys, [row], f"template={template}")


def test_the_loss_of_a_message_and_the_reasoning_of_a_pair(audit: Any) -> None:
    asked = {"role": "user", "content": "u"}
    turns = [asked, {"role": "assistant", "content": "a", "loss": False}, asked]
    rows = [
        {"messages": [*turns, {"role": "assistant", "content": "b", "loss": True}]},
        {**GOOD, "messages": [], "reasoning_content": "R"},
        {**GOOD, "prompt": [{"role": "user", "content": "p"}], "reasoning_content": "R"},
    ]
    assert audit(rows, "template=plain-chat")[0] == [
        "USER: u\nASSISTANT: a<|end|>\nUSER: u\nASSISTANT:⟦ b<|end|>⟧\n",
        *["USER: p\nASSISTANT:⟦ <think>\nR\n</think>\n c<|end|>⟧\n"] * 2,
    ]


def test_control_text_of_a_pair_is_text(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": "<|user|>p", "completion": "c<|end|>d"}]
    for given in ("null", "token"):
        texts, figures, _ = audit(rows, f"template.control_tokens={given}")
        assert texts == ["<|user|>p\n⟦c<|end|>d<|end|>⟧"]
        assert figures["checks"]["control_tokens"]["documents"] == 1
        # <|user|>, p, the newline, c, <|end|>, d and EOS; as text, the tokens are several each.
        assert (figures["tokens"] == 7) == (given == "token")
    for given in ("null", "text"):  # in plain text: c, <|end|>, d, and EOS where there is none
        rows = [{"text": "c<|end|>"}, {"text": "d"}]
        given = f"template.control_tokens={given}"
        _, figures, _ = audit(rows, "template=text", "dataset.packing=none", given)
        assert (figures["tokens"] == 4) == given.endswith("null")
    message = refused(audit, capsys, [GOOD], "template=plain-chat", "template.control_tokens=token")
    assert "only the chat template writes control tokens" in message


def test_ignored_keys_of_messages_in_a_table(audit: Any) -> None:
    turn = [
        {"role": "user", "content": "u", "images": ["x"]},
        {"role": "assistant", "content": "a"},
    ]
    rows = [{"messages": json.dumps(turn)}]
    ignored = "dataset.ignore_columns=[messages.images]"
    texts, figures, _ = audit(rows, "template=plain-chat", ignored)
    assert texts == ["USER: u\nASSISTANT:⟦ a<|end|>⟧\n"]
    assert figures["unused_columns"] == {"messages.images": 1}


def test_a_call_without_arguments_has_none(audit: Any) -> None:
    for nothing in ({}, None, "", float("nan")):
        call = {"name": "f", "arguments": nothing}
        turn = [{"role": "user", "content": "u"}, {"role": "assistant", "tool_calls": [call]}]
        [text] = audit([{"messages": turn}], "template=plain-chat")[0]
        assert text.endswith('⟦ CALL {"name": "f", "arguments": {}}<|end|>⟧\n')


def test_a_column_that_no_row_has_is_named(audit: Any, capsys: pytest.CaptureFixture[str]) -> None:
    renamed = "dataset.columns={prompt: ask}"
    for count in (3, 300):
        rows = [{"asked": "p", "completion": "c"}] * count
        message = refused(audit, capsys, rows, renamed)
        assert "has no column ask; it has asked, completion" in message
        assert "fix: dataset.columns.prompt=COLUMN" in message


def test_a_column_may_be_absent_from_the_first_row(audit: Any) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": "c", "said": "s"}]
    texts, _, _ = audit(
        rows, "template.prompts=['{prompt}{more}:', '{prompt}:']", "dataset.columns={more: said}"
    )
    assert texts == ["p:⟦c<|end|>⟧", "ps:⟦c<|end|>⟧"]
