"""What the audit and the preview add to the counts, through the command, with values by hand.

The tokenizer of model=tiny has one token for each byte; dataset=jsonl writes a prompt, a line end,
the completion and <|end|>, and trains the last two.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import TINY

from sft.data.__main__ import main

Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Said(dict[str, Any]):
    """What ``--json`` printed, and the text for people beside it."""

    text: str


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*words: str, code: int = 0) -> Said:
        capsys.readouterr()
        given = ["model=tiny", "dataset=jsonl", *words, "--json"]
        if not any(word.startswith("dataset.eval_fraction=") for word in words):
            given.append("dataset.eval_fraction=0")
        if code:
            with pytest.raises(SystemExit) as end:
                main(given)
            assert end.value.code == code
        else:
            main(given)
        printed = capsys.readouterr()
        found = Said(json.loads(printed.out))
        found.text = printed.err
        return found

    return run


def pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def write(name: str, *rows: dict[str, Any] | str) -> str:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    Path(name).write_text("".join(f"{line}\n" for line in lines))
    return f"dataset.path={name}"


def cells(text: str, label: str) -> list[str]:
    """Return the cells of a table's row."""
    [line] = [line for line in text.splitlines() if line.strip().startswith(label)]
    return line.strip().removeprefix(label).split()


# What follows from the counts

FIVE = [pair(letter, letter.upper()) for letter in "abcda"]  # of 4 tokens, of which 2 are trained


def test_tokens_per_epoch_and_in_all(said: Callable[..., Said]) -> None:
    path = write("rows.jsonl", *FIVE)
    batch = ("train.global_batch_size=2", "train.per_device_train_batch_size=2")
    found = said(path, *batch, "train.num_train_epochs=3")
    assert found["training"] == {
        **{"steps": 9, "epochs": 3.0, "tokens": 60},
        **{"trained_tokens_per_epoch": 10, "trained_tokens": 30},
        "distinct_trained_tokens": 8,  # the last row is a copy of the first
        # In each of 3 layers, r times the sum of both sizes of 7 linear layers:
        "adapter_parameters": 3 * 8 * (4 * (128 + 128) + 3 * (128 + 256)),
        "parameters_per_trained_token": 6528.0,
    }
    assert cells(found.text, "trained tokens, per epoch") == ["10"]
    assert cells(found.text, "in all, 3 epochs") == ["30"]
    assert cells(found.text, "adapter's parameters") == ["52,224"]
    assert "the adapter has" not in found.text
    # One epoch is 3 steps of 2, 2 and 1 samples; a fourth step has 2.
    found = said(path, *batch, "train.max_steps=4")["training"]
    assert (found["steps"], found["epochs"], found["tokens"], found["trained_tokens"]) == (
        *(4, 1.4, 28, 14),
    )
    found = said(path, *batch, "train.num_train_epochs=0.5")["training"]
    assert (found["steps"], found["epochs"], found["trained_tokens"]) == (2, 0.8, 8)


def test_an_adapter_with_fewer_parameters_than_trained_tokens(said: Callable[..., Said]) -> None:
    path = write("rows.jsonl", pair("a", "b" * 1535))
    words = (path, "dataset.max_length=2048", "lora.target_modules=[q_proj]")
    found = said(*words, "lora.r=1", "preview=1", "html=page.html")
    assert found["training"]["adapter_parameters"] == 3 * (128 + 128)
    assert found["training"]["parameters_per_trained_token"] == 0.5
    assert (
        "warning: the adapter has 768 parameters for 1,536 distinct trained tokens, 0.5 per token; "
        "with fewer than 1 it may learn less than full fine-tuning (Schulman et al. 2025, LoRA "
        "Without Regret, Thinking Machines)\n    fix: a higher lora.r (lora.r=2 has 1 per token)"
    ) in found.text
    assert ">parameters per trained token</th><td>0.5</td>" in Path("page.html").read_text()
    found = said(*words, "lora.r=2")
    assert found["training"]["parameters_per_trained_token"] == 1
    assert "warning" not in found.text
    # More epochs repeat tokens: the ratio stays.
    found = said(*words, "lora.r=2", "train.num_train_epochs=9")
    assert found["training"]["trained_tokens"] == 9 * 1536
    assert "warning" not in found.text


def test_the_page_is_written_beside_the_run(said: Callable[..., Said]) -> None:
    path = write("rows.jsonl", *FIVE)
    assert said(path, "preview=1", "output_dir=here/run/")["html"] == "here/run.data.html"
    assert Path("here/run.data.html").is_file() and not Path("here/run").exists()
    found = said(path, "preview=1", "run_name=mine")
    assert found["html"] == "outputs/mine.data.html" and Path(found["html"]).is_file()


@pytest.mark.parametrize("setting", ["output", "html"])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    setting: str, said: Callable[..., Said]
) -> None:
    found = said(write("rows.jsonl", *FIVE), "preview=1", f"{setting}=/proc/m", code=1)
    assert f"{setting}=/proc/m cannot be written: " in found.text
    assert f"fix: {setting}=PATH" in found.text and "data.json" not in found.text


def test_an_error_names_the_setting_of_its_path(said: Callable[..., Said]) -> None:
    path = write("rows.jsonl", *FIVE)
    Path("empty.jsonl").touch()
    for setting, words in {
        "dataset.eval_path": [path, "dataset.eval_path=FILE"],
        "dataset.path": ["dataset.path=FILE"],
        "dataset.mix.b.path": [
            "dataset.path=null",
            "dataset.mix={a: {path: rows.jsonl}, b: {path: FILE}}",
        ],
    }.items():
        for file in ("empty.jsonl", "absent.jsonl"):
            given = [word.replace("FILE", file) for word in words]
            assert f"fix: {setting}=FILE" in said(*given, code=1).text, (setting, file)


def test_without_an_adapter_or_a_config_there_is_no_capacity(
    said: Callable[..., Said], folder: Path
) -> None:
    path = write("rows.jsonl", *FIVE)
    found = said(path, "lora=none", "train=full")
    assert "adapter_parameters" not in found["training"]
    assert "adapter's" not in found.text
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "bare").mkdir(exist_ok=True)
        shutil.copyfile(TINY / name, folder / "bare" / name)
    found = said(path, f"model.name_or_path={folder}/bare")
    assert found["training"]["trained_tokens_per_epoch"] == 10
    assert "adapter_parameters" not in found["training"]
    assert "the adapter's parameters are not counted: the config of" in found.text
    found = said(path, "lora.target_modules=[q_porj]")
    assert "adapter_parameters" not in found["training"]
    assert "the adapter's parameters are not counted" in found.text and "q_porj" in found.text
    found = said(path, "lora.extra.layers_pattern=layers")
    assert "not counted: 1 setting is refused" in found.text
    assert "`layers_to_transform` must also be specified" in found.text
    every = said(path)["training"]["adapter_parameters"]
    one = said(path, "lora.extra.layers_to_transform=[0]")["training"]["adapter_parameters"]
    assert 3 * one == every  # of three layers


def test_what_an_epoch_repeats_is_no_new_token(said: Callable[..., Said]) -> None:
    write("a.jsonl", *FIVE[:2])
    write("b.jsonl", *FIVE[2:4])
    mix = "dataset.mix={a: {path: a.jsonl, weight: 2.5}, b: {path: b.jsonl}}"
    found = said("dataset.path=null", mix)["training"]
    assert found["trained_tokens_per_epoch"] == 2 * (2.5 * 2 + 2)
    assert found["distinct_trained_tokens"] == 2 * 4
    # Windows of 8 tokens: "abc\ndefg", "defg\nhij", "hijk<|end|>"; the first token has no context.
    text = ("template=text", write("text.jsonl", {"text": "abc\ndefg\nhijk"}), "lora=none")
    cut = ("dataset.packing=boundary", "dataset.max_length=8", "train=full")
    for overlap, trained in (("context", 13), ("train", 7 + 7 + 4)):
        found = said(*text, *cut, f"dataset.boundary_overlap={overlap}")["training"]
        assert found["trained_tokens_per_epoch"] == trained
        assert found["distinct_trained_tokens"] == 13


# Near-duplicates


def test_copies_but_for_white_space_and_case(said: Callable[..., Said]) -> None:
    path = write(
        "rows.jsonl",
        pair("Who is it?", "Me"),
        pair("who is  it? ", "me\n"),  # nearly the first
        pair("Who is it?", "Me"),  # exactly the first
        pair("WHO\u00a0IS\u3000IT?", "ME"),  # nearly the first
        pair("Who is he?", "Me"),
        pair("ÄTNA", "Berg"),
    )
    held_out = write("eval.jsonl", pair("who is he?", "me"), pair("ätna", "berg"), FIVE[0])
    copy = write("copy.jsonl", pair("Who is he?", "Me")).partition("=")[2]
    found = said(path, f"dataset.eval_path={held_out.partition('=')[2]}")
    checks = {part: found["parts"][part]["checks"] for part in ("train", "eval")}
    assert checks["train"]["duplicates"]["documents"] == 1
    assert checks["train"]["near_duplicates"]["documents"] == 2
    assert checks["train"]["near_duplicates"]["verdict"] == "warn"
    assert checks["eval"]["eval_in_train"]["documents"] == 0
    assert checks["eval"]["eval_near_train"]["documents"] == 2
    assert (
        "warning: eval: 2 documents (66.7%) are held out and differ from a trained one only in "
        "white space and case"
    ) in found.text
    checks = said(path, f"dataset.eval_path={copy}")["parts"]["eval"]["checks"]
    assert checks["eval_in_train"]["documents"] == 1  # what is exact is not counted again
    assert checks["eval_near_train"]["documents"] == 0
    words = (f"dataset.eval_path={held_out.partition('=')[2]}",)
    error = said(path, *words, "dataset.stop_above.eval_near_train=0.5", code=1)["error"]
    assert "dataset.stop_above.eval_near_train=1" in error


def test_near_copies_of_conversations_and_of_token_ids(said: Callable[..., Said]) -> None:
    def talk(asked: str, answer: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return {"messages": turns}

    rows = [talk("Hi <|end|>", "Yes."), talk("hi <|END|>", "yes. "), talk("Hi", "No.")]
    train = said(write("chat.jsonl", *rows), "template=chat")["parts"]["train"]["checks"]
    assert (train["duplicates"]["documents"], train["near_duplicates"]["documents"]) == (0, 1)
    # Bytes are tokens in the order of GPT-2's: "A" is 32, "a" 64, "b" 65, a space 220.
    ids = [
        {"input_ids": [32, 65, 258]},
        {"input_ids": [64, 220, 65, 258]},
        {"input_ids": [64, 258]},
    ]
    train = said(write("ids.jsonl", *ids))["parts"]["train"]["checks"]
    assert (train["duplicates"]["documents"], train["near_duplicates"]["documents"]) == (0, 1)


# Rows that are cut most


def test_the_rows_whose_answers_lose_most_are_listed(said: Callable[..., Said]) -> None:
    path = write(
        "rows.jsonl",
        pair("a", "bcdefghij"),  # 12 tokens, of which 10 are trained; 8 stay
        pair("a", "b"),
        "",
        pair("a", "b" * 20),  # 23 tokens, of which 21 are trained
        pair("a" * 10, "bb"),  # the answer begins after 11 tokens
        *[pair("a", "b" * n) for n in (6, 7, 8)],  # 9, 10 and 11 tokens
    )
    words = ("dataset.max_length=8", "dataset.stop_above.nothing_trained=1")
    found = said(path, *words, "dataset.overlong=truncate", "preview=1", "html=page.html")
    train = found["parts"]["train"]
    assert train["most_cut"] == {
        "rows.jsonl:4": {"cut_off": 15, "trained_tokens": 21},
        "rows.jsonl:1": {"cut_off": 4, "trained_tokens": 10},
        "rows.jsonl:5": {"cut_off": 3, "trained_tokens": 3},
        "rows.jsonl:8": {"cut_off": 3, "trained_tokens": 9},
        "rows.jsonl:7": {"cut_off": 2, "trained_tokens": 8},
    }
    assert list(train["most_cut"])[:2] == ["rows.jsonl:4", "rows.jsonl:1"]
    assert train["cut_tokens"] == 15 + 4 + 3 + 1 + 2 + 3
    assert cells(found.text, "trained tokens cut off") == ["28"]
    assert "\ntrain: rows.jsonl:4 loses 15 of 21 trained tokens\n" in found.text
    page = Path("page.html").read_text()
    assert ">rows.jsonl:4</th><td>15</td><td>21</td></tr>" in page
    found = said(path, *words, "dataset.overlong=drop")
    assert (found["parts"]["train"]["most_cut"], found["parts"]["train"]["cut_tokens"]) == ({}, 0)


# The generation prompt in the preview


def shown(text: str) -> list[str]:
    """Return the lines of the preview."""
    return text[text.index("\nsample 1") + 1 : text.index("preview written")].splitlines()


def test_the_preview_shows_what_generation_sees(said: Callable[..., Said]) -> None:
    path = write("rows.jsonl", "{not json", pair("a\nb", "c"), pair("d", "e"))
    found = said(path, "preview=2", "html=page.html", "dataset.max_bad_fraction=0.5")
    assert shown(found.text) == [
        "sample 1  6 tokens, 2 trained (33 %)",
        *("a↵", "b↵", "⟦c<|end|>⟧"),
        "generation prompt: 4 tokens, as in training",
        *("a↵", "b↵", ""),
        "",
        "sample 2  4 tokens, 2 trained (50 %)",
        *("d↵", "⟦e<|end|>⟧"),
        "generation prompt: 2 tokens, as in training",
        *("d↵", ""),
    ]
    page = Path("page.html").read_text()
    heading = "generation prompt <small>2 tokens, as in training</small></h3>\n"
    assert f'{heading}<pre class="text">d<span class="esc">↵</span>\n</pre>' in page
    lines = shown(said(path, "preview=1", "tokens=true", "dataset.max_bad_fraction=0.5").text)
    assert lines[-2:] == ["·b ·↵  ·", " 65 198"]


def test_every_document_has_the_prompt_of_its_own_row(said: Callable[..., Said]) -> None:
    write("a.jsonl", *(pair(f"a{n}", str(n)) for n in range(6)))
    write("b.jsonl", *(pair(f"b{n}", str(n)) for n in range(6)))
    mix = "dataset.mix={a: {path: a.jsonl}, b: {path: b.jsonl, weight: 2}}"
    cut = ("dataset.packing=bfd", "dataset.max_length=32", "dataset.eval_fraction=0.25")
    lines = shown(said("dataset.path=null", mix, *cut, "preview=99").text)
    asked = [i for i, line in enumerate(lines) if line.startswith("generation prompt: 3 tokens, ")]
    # Nine rows are trained, of which those of b are in twice.
    assert 9 < len(asked) <= 18 and lines.count("generation prompt: 3 tokens, as in training") > 9
    assert all(lines[i + 1] == lines[i - 2] and lines[i + 1][0] in "ab" for i in asked)


THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content and loop.last %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def test_where_generation_differs_is_said(said: Callable[..., Said]) -> None:
    def asked(*words: str) -> list[str]:
        lines = shown(said(*words, "preview=9", "dataset.stop_above={never_stops: 1}").text)
        return [line for line in lines if line.startswith("generation prompt")]

    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    chat = (write("chat.jsonl", {"messages": [user, answer]}), "template=chat")
    Path("open.jinja").write_text(f"{THINKS}{{% if add_generation_prompt %}}>>{{% endif %}}")
    assert asked(*chat, "template.chat_template=open.jinja") == [
        "generation prompt: 6 tokens; after 4 of them training goes on with 'a' instead of '>'"
    ]
    # A template that drops earlier reasoning makes a sample of each answer.
    Path("drop.jinja").write_text(THINKS)
    turns = [user, {**answer, "reasoning_content": "r"}, user, {**answer, "reasoning_content": "s"}]
    write("chat.jsonl", {"messages": turns})
    assert asked(*chat, "template.chat_template=drop.jinja") == [
        "generation prompt: that of the row's last answer, which is a sample of its own",
        "generation prompt: 10 tokens, as in training",
    ]
    # An answer that is not trained, and one that has been cut off with a part of its prompt.
    write("chat.jsonl", {"messages": [user, answer, user, {**answer, "train": False}]})
    assert asked(*chat, "template.chat_template=drop.jinja") == [
        "generation prompt: 10 tokens, as in training, where nothing after them is trained"
    ]
    write("chat.jsonl", {"messages": [user, answer, user, answer]})
    cut = ("dataset.max_length=8", "dataset.overlong=truncate")
    assert asked(*chat, "template.chat_template=drop.jinja", *cut) == [
        "generation prompt: 10 tokens, of which the sample has the first 8"
    ]
    # Later parts of a document, token ids and plain text have none.
    split = ("dataset.max_length=8", "dataset.overlong=split")
    assert asked(write("rows.jsonl", pair("a", "b" * 12)), *split) == [
        "generation prompt: 2 tokens, as in training"
    ]
    assert asked(write("rows.jsonl", {"input_ids": [1, 2]})) == []
    assert asked(write("rows.jsonl", {"text": "abc"}), "template=text") == []


def test_prepared_data_has_the_audit_of_its_rows_but_no_prompts(said: Callable[..., Said]) -> None:
    words = ("dataset.max_length=8", "dataset.overlong=truncate")
    path = write("rows.jsonl", pair("a", "b" * 9), pair("c", "d"))
    made = said(path, *words, "output=prepared")
    found = said("dataset.path=prepared", *words, "preview=1")
    assert found["training"] == made["training"]
    assert found["training"]["distinct_trained_tokens"] == 6 + 2
    assert found["parts"]["train"]["most_cut"] == {
        "rows.jsonl:1": {"cut_off": 4, "trained_tokens": 10}
    }
    assert shown(found.text) == ["sample 1  8 tokens, 6 trained (75 %)", "a↵", "⟦bbbbbb⟧"]
