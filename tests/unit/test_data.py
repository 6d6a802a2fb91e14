"""Exactly which tokens are trained, and that no row is lost without being counted."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support import SHARED, TINY
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sft.config import DatasetConfig, TemplateConfig
from sft.data import samples, sources
from sft.data.template import Segment, Template
from sft.errors import DataError
from sft.train import main

CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Give the embedded one: a token for each byte, so that ids can be counted by hand."""
    return AutoTokenizer.from_pretrained(TINY)


def template(tokenizer: PreTrainedTokenizerBase, name: str, **fields: Any) -> Template:
    """Give a template of conf/, with some fields changed."""
    config = main.compose(["dataset=jsonl", "dataset.path=rows", f"template={name}"]).template
    for key, value in fields.items():
        setattr(config, key, value)
    return Template(config, tokenizer)


def build(rows: list[dict[str, Any]], made: Template, **fields: Any) -> samples.Samples:
    return samples.build(Dataset.from_list(rows), made, DatasetConfig(**fields), "train")


def trained_text(made: Template, sample: dict[str, list[int]]) -> str:
    kept = [label for label in sample["labels"] if label != samples.IGNORE_INDEX]
    return str(made.tokenizer.decode(kept))


def test_completion_trains_the_completion_and_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    made = template(tokenizer, "completion")
    built = build([{"prompt": "ab", "completion": "cd"}], made)
    sample = built.dataset[0]
    assert tokenizer.decode(sample["input_ids"]) == "ab\ncd<|end|>"
    assert sample["labels"] == [-100] * 3 + sample["input_ids"][3:]
    assert trained_text(made, sample) == "cd<|end|>"
    assert samples.marked(sample, tokenizer) == "ab\n⟦cd<|end|>⟧"
    assert vars(built.counts) == {
        **{"rows": 1, "samples": 1, "dropped": 0, "truncated": 0},
        **{"tokens": 6, "trained_tokens": 3, "longest": 6},
        "largest_id": tokenizer.eos_token_id,
    }


def test_empty_completions_and_blank_lines_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    counts = build(rows, template(tokenizer, "completion")).counts
    assert (counts.rows, counts.samples, counts.dropped) == (2, 1, 1)
    with pytest.raises(DataError, match="nothing is left of the train data: 1 rows, 1 dropped"):
        build(rows[1:], template(tokenizer, "completion"))
    lines = build([{"text": ""}, {"text": "ab\n"}, {"text": ""}], template(tokenizer, "lines"))
    assert (lines.counts.rows, lines.counts.dropped, lines.counts.tokens) == (3, 2, 3)


def test_only_the_token_that_ends_the_turn_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template may write a newline and a second EOS after it, and an answer a special token."""
    tokenizer.chat_template = CHATML.replace("<|end|>\n", "<|end|>\n<|endoftext|>")
    made = template(tokenizer, "chat")
    answer = "one <|system|> two"
    row = {"prompt": "P", "completion": answer}
    assert made.render(row)[1] == Segment(f"{answer}<|end|>", True)
    assert made.stop_id() == tokenizer.convert_tokens_to_ids("<|end|>")
    assert template(tokenizer, "completion").stop_id() is None


def test_columns_are_renamed_all_at_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "C", "completion": "P", "answer": "A"}\n')
    swap = {"prompt": "completion", "completion": "prompt"}
    rows, _ = sources.load_rows(DatasetConfig(path=str(path), columns=swap), seed=0)
    assert rows[0] == {"prompt": "P", "completion": "C", "answer": "A"}
    rows, _ = sources.load_rows(
        DatasetConfig(path=str(path), columns={"completion": "answer"}), seed=0
    )
    assert rows[0] == {"prompt": "C", "completion": "A"}
    with pytest.raises(DataError, match="takes two fields from one column"):
        columns = {"completion": "answer", "prompt": "answer"}
        sources.load_rows(DatasetConfig(path=str(path), columns=columns), seed=0)


def test_eos_that_the_data_ends_with_is_not_doubled(tokenizer: PreTrainedTokenizerBase) -> None:
    made = template(tokenizer, "completion")
    sample = build([{"prompt": "a", "completion": "b<|end|>"}], made).dataset[0]
    assert sample["input_ids"].count(tokenizer.eos_token_id) == 1


def test_chat_trains_every_assistant_turn_with_its_end(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    made = template(tokenizer, "chat")
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"},
        {"role": "assistant", "content": "A2"},
    ]
    assert made.render({"messages": messages}) == [
        Segment("<|system|>\nS<|end|>\n<|user|>\nU1<|end|>\n<|assistant|>\n", False),
        Segment("A1<|end|>", True),
        Segment("\n<|user|>\nU2<|end|>\n<|assistant|>\n", False),
        Segment("A2<|end|>", True),
        Segment("\n", False),  # the template's own newline is nothing to learn
    ]
    sample = build([{"messages": messages}], made).dataset[0]
    assert trained_text(made, sample) == "A1<|end|>A2<|end|>"
    assert made.render_prompt({"messages": messages}).endswith("U2<|end|>\n<|assistant|>\n")


def test_prompt_is_the_same_text_in_training_and_generation(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = {"instruction": "I", "input": "X", "output": "Y", "prompt": "P", "completion": "C"}
    for name in ("alpaca", "chat", "completion"):
        made = template(tokenizer, name)
        segments = made.render(row)
        assert made.render_prompt(row) == segments[0].text
        unanswered = {key: row[key] for key in ("instruction", "input", "prompt")}
        assert made.render_prompt(unanswered) == segments[0].text
        assert made.answer(row) in segments[1].text


def test_system_message_is_added_once(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    made = template(tokenizer, "chat", system="S")
    assert made.render({"prompt": "P", "completion": "C"})[0].text.startswith("<|system|>\nS<")
    given = [{"role": "system", "content": "T"}, {"role": "assistant", "content": "A"}]
    assert made.render({"messages": given})[0].text.startswith("<|system|>\nT<")


def test_chat_template_that_rewrites_history_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
        "(dropped){% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turn = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    made = template(tokenizer, "chat")
    assert made.render({"messages": turn})[1] == Segment("A<|end|>", True)
    with pytest.raises(DataError, match="differently from the whole"):
        made.render({"messages": turn + turn})


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "ends an assistant turn with no"),
        ("{{ raise_exception('only Latin') }}", "refuses the conversation: only Latin"),
    ],
)
def test_chat_template_that_cannot_be_trained_is_refused(
    tokenizer: PreTrainedTokenizerBase, chat_template: str, message: str
) -> None:
    tokenizer.chat_template = chat_template
    with pytest.raises(DataError, match=message):
        template(tokenizer, "chat").render({"prompt": "P", "completion": "C"})


def test_tokenizer_without_chat_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template\n    fix: template=completion"):
        template(tokenizer, "chat")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "P"}, "makes no completion of this row"),
        ({"completion": "C"}, "makes no prompt of this row: it needs the columns prompt or"),
        ({"messages": [{"role": "user", "content": "U"}]}, "not the assistant's"),
    ],
)
def test_row_that_does_not_fit_is_named(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], message: str
) -> None:
    name = "chat" if "messages" in row else "completion"
    made = template(tokenizer, name)
    with pytest.raises(DataError, match=rf"(?s)train row 1, \{{.*{message}"):
        build([row], made)


def test_text_is_cut_into_blocks_without_losing_a_token(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": "abcdefghij"}, {"text": "klmno"}]
    built = build(rows, template(tokenizer, "text"), max_length=8)
    blocks = [tokenizer.decode(sample["input_ids"]) for sample in built.dataset]
    assert blocks == ["abcdefgh", "ij<|end|>klmno"]  # the last EOS alone has nothing before it
    assert built.counts.tokens == built.counts.trained_tokens == 16
    lines = build(rows, template(tokenizer, "lines"), max_length=8)
    assert [tokenizer.decode(s["input_ids"]) for s in lines.dataset] == ["abcdefgh", "ijklmno"]


def test_overlong_rows_are_counted_or_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    made = template(tokenizer, "completion")
    rows = [
        {"prompt": "a" * 20, "completion": "b"},
        {"prompt": "a", "completion": "b" * 20},
        {"prompt": "a", "completion": "b"},
    ]
    with pytest.raises(DataError, match=r"train row 1 has 23 tokens, dataset\.max_length=8"):
        build(rows, made, max_length=8)
    dropped = build(rows, made, max_length=8, overlong="drop").counts
    assert (dropped.samples, dropped.dropped, dropped.truncated) == (1, 2, 0)
    cut = build(rows, made, max_length=8, overlong="truncate").counts
    # Nothing of the first row's completion is left, so it would train nothing.
    assert (cut.samples, cut.dropped, cut.truncated, cut.longest) == (2, 1, 1, 8)
    with pytest.raises(DataError, match="nothing is left of the train data: 1 rows, 1 dropped"):
        build(rows[:1], made, max_length=8, overlong="drop")


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """Make a SentencePiece-like tokenizer: a BOS before, and a space before the first word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = ["<unk>", "<s>", "</s>", "\u2581", "\n", "\u2581a", "\u2581b", "a", "b", "\u2581ab"]
    vocab = {word: index for index, word in enumerate(words)}
    merges = [("\u2581", "a"), ("\u2581", "b"), ("\u2581a", "b")]
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def test_bos_comes_once_and_no_space_into_the_seam() -> None:
    """Whole, "ab" would be one token; cut at the seam it is the prompt's and the completion's."""
    tokenizer = spaced_tokenizer()
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab")["input_ids"]) == ["<s>", "\u2581ab"]
    made = Template(TemplateConfig(prompts=["{p}"], completions=["{c}"]), tokenizer)
    sample = build([{"p": "a", "c": "b"}], made).dataset[0]
    tokens = tokenizer.convert_ids_to_tokens(sample["input_ids"])
    assert tokens == ["<s>", "\u2581a", "b", "</s>"]
    assert sample["labels"] == [-100, -100, *sample["input_ids"][2:]]
    prompt = samples.Encoder(tokenizer).prompt("a", rendered=False)
    assert prompt == sample["input_ids"][:2]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real input: {SHARED} is absent")
def test_alpaca_prompt_is_the_published_one(tokenizer: PreTrainedTokenizerBase) -> None:
    vectors = json.loads((SHARED / "facts" / "chat_template_vectors.json").read_text())
    made = template(tokenizer, "alpaca")
    row = {"instruction": "Do it.", "input": "with this", "output": "Y"}
    expected = vectors["alpaca_prompt"]["with_input"].format(**row)
    assert made.render(row) == [Segment(expected, False), Segment("Y", True)]
    without = vectors["alpaca_prompt"]["without_input"].format(**row)
    assert made.render({**row, "input": ""})[0].text == without


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real input: {SHARED} is absent")
@pytest.mark.parametrize(
    ("name", "bos"), [("opt", 1), ("gpt2", 0), ("gptj", 0), ("gpt-neox-20b", 0)]
)
def test_real_tokenizers_train_the_answer_and_one_eos(name: str, bos: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    made = template(tokenizer, "completion")
    rows = sources.load_rows(
        DatasetConfig(
            path=str(SHARED / "data" / "gsm8k" / "test.jsonl"),
            columns={"prompt": "question", "completion": "answer"},
        ),
        seed=0,
    )[0].select(range(200))
    built = samples.build(rows, made, DatasetConfig(max_length=2048), "train")
    assert built.counts.samples == 200
    eos = tokenizer.eos_token_id
    for row, sample in zip(rows, built.dataset, strict=True):
        assert sample["input_ids"].count(eos) == 1 + bos  # OPT's BOS is its EOS
        assert sample["labels"][-1] == eos
        assert trained_text(made, sample) == row["completion"] + tokenizer.eos_token
        hidden = sample["labels"].count(samples.IGNORE_INDEX)
        assert tokenizer.decode(sample["input_ids"][bos:hidden]) == row["prompt"] + "\n"


def test_rows_are_held_out_by_seed_and_a_single_text_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": i}) + "\n" for i in range(10)))
    config = DatasetConfig(path=str(path), eval_fraction=0.2)
    train, held_out = sources.load_rows(config, seed=1)
    assert held_out is not None and (len(train), len(held_out)) == (8, 2)
    assert sorted([*train["prompt"], *held_out["prompt"]]) == list(range(10))
    again = sources.load_rows(config, seed=1)[1]
    other = sources.load_rows(config, seed=2)[1]
    assert again is not None and again[:] == held_out[:]
    assert other is not None and other[:] != held_out[:]

    text = tmp_path / "one.txt"
    text.write_text("".join(f"line {i}\n" for i in range(10)))
    train, held_out = sources.load_rows(DatasetConfig(path=str(text), eval_fraction=0.2), seed=1)
    assert held_out is not None
    assert train[0]["text"] + held_out[0]["text"] == text.read_text()
    assert held_out[0]["text"] == "line 8\nline 9\n"


def test_a_folder_is_read_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b [1].txt", "a.md", "deep/c.txt"):
        (tmp_path / name).write_text(f"{name}\nsecond line")
    (tmp_path / "ignored.bin").write_bytes(b"\x00")
    rows, _ = sources.load_rows(DatasetConfig(path=str(tmp_path)), seed=0)
    assert [text.splitlines()[0] for text in rows["text"]] == ["a.md", "b [1].txt", "deep/c.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", "{]\n", "cannot be read as json"),
        ("data.xml", "<a/>", "is of no known kind"),
        ("folder", None, "holds no .txt or .md file"),
        ("short.jsonl", '{"prompt": 1}\n', "leave none to train on"),
    ],
)
def test_source_that_cannot_be_read(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        sources.load_rows(DatasetConfig(path=str(path), eval_fraction=0.5), seed=0)
