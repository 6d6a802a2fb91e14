"""Exactly which tokens are trained, and that no row is lost without being counted."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support import SHARED, TINY
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sft.config.settings import DatasetConfig, TemplateConfig
from sft.data.prepare import prepare
from sft.data.prepared import Samples
from sft.data.preview import marked
from sft.data.row_encoder import IGNORE_INDEX
from sft.data.segment import Segment
from sft.data.template import Template
from sft.data.text_encoder import Encoder
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


def build(rows: list[dict[str, Any]], made: Template, **fields: Any) -> Samples:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return prepare(DatasetConfig(path=str(path), **fields), made, seed=0).train


def trained_text(made: Template, sample: dict[str, list[int]]) -> str:
    kept = [label for label in sample["labels"] if label != IGNORE_INDEX]
    return str(made.tokenizer.decode(kept))


def test_completion_trains_the_completion_and_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    made = template(tokenizer, "completion")
    built = build([{"prompt": "ab", "completion": "cd"}], made)
    sample = built.dataset[0]
    assert tokenizer.decode(sample["input_ids"]) == "ab\ncd<|end|>"
    assert sample["labels"] == [-100] * 3 + sample["input_ids"][3:]
    assert trained_text(made, sample) == "cd<|end|>"
    assert marked(sample, tokenizer) == "ab\n⟦cd<|end|>⟧"
    counts = built.counts
    assert (counts.rows, counts.samples, counts.dropped, counts.truncated) == (1, 1, 0, 0)
    assert (counts.tokens, counts.trained_tokens, counts.longest) == (6, 3, 6)
    assert counts.largest_id == tokenizer.eos_token_id
    assert counts.roles == {
        "prompt": {"tokens": 3, "trained": 0},
        "completion": {"tokens": 3, "trained": 3},
    }


def test_empty_completions_and_blank_lines_are_dropped_and_counted(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}]
    counts = build(rows, template(tokenizer, "completion")).counts
    assert (counts.rows, counts.samples, counts.dropped) == (2, 1, 1)
    with pytest.raises(DataError, match=r"none of the 1 rows is left: .*the completion is empty"):
        build(rows[1:], template(tokenizer, "completion"))
    lines = build([{"text": ""}, {"text": "ab\n"}, {"text": ""}], template(tokenizer, "lines"))
    assert (lines.counts.rows, lines.counts.dropped, lines.counts.tokens) == (3, 2, 3)


def test_only_the_token_that_ends_the_turn_is_trained(tokenizer: PreTrainedTokenizerBase) -> None:
    """A template may write a newline and a second EOS after it, and an answer a special token."""
    tokenizer.chat_template = CHATML.replace("<|end|>\n", "<|end|>\n<|endoftext|>")
    made = template(tokenizer, "chat")
    answer = "one <|system|> two"
    sample = build([{"prompt": "P", "completion": answer}], made).dataset[0]
    assert marked(sample, tokenizer).endswith(f"⟦{answer}<|end|>⟧\n<|endoftext|>")
    # What the data writes is text, and begins no turn.
    assert tokenizer.convert_tokens_to_ids("<|system|>") not in sample["input_ids"]
    assert made.stop_ids == [tokenizer.convert_tokens_to_ids("<|end|>")]
    assert template(tokenizer, "completion").stop_ids == [tokenizer.eos_token_id]


def test_columns_are_renamed_all_at_once(tokenizer: PreTrainedTokenizerBase) -> None:
    made = template(tokenizer, "completion")
    row = {"prompt": "C", "completion": "P", "answer": "A"}
    swap = {"prompt": "completion", "completion": "prompt"}
    assert marked(build([row], made, columns=swap).dataset[0], tokenizer) == "P\n⟦C<|end|>⟧"
    other = build([row], made, columns={"completion": "answer"}).dataset[0]
    assert marked(other, tokenizer) == "C\n⟦A<|end|>⟧"
    with pytest.raises(DataError, match="maps two fields to one column"):
        build([row], made, columns={"completion": "answer", "prompt": "answer"})
    with pytest.raises(DataError, match="has no column x; it has prompt, completion, answer"):
        build([row], made, columns={"completion": "x"})


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
        [
            Segment("<|system|>\nS<|end|>\n", False, "system"),
            Segment("<|user|>\nU1<|end|>\n", False, "user"),
            Segment("<|assistant|>\n", False, "assistant"),
            Segment("A1<|end|>", True, "assistant"),
            Segment("\n", False, "assistant"),  # the template's own newline is nothing to learn
            Segment("<|user|>\nU2<|end|>\n", False, "user"),
            Segment("<|assistant|>\n", False, "assistant"),
            Segment("A2<|end|>", True, "assistant"),
            Segment("\n", False, "assistant"),
        ]
    ]
    sample = build([{"messages": messages}], made).dataset[0]
    assert trained_text(made, sample) == "A1<|end|>A2<|end|>"
    assert made.render_prompt({"messages": messages}).endswith("U2<|end|>\n<|assistant|>\n")


def test_prompt_is_the_same_text_in_training_and_generation(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = {"instruction": "I", "output": "Y", "prompt": "P", "completion": "C"}
    for name in ("alpaca", "chat", "completion"):
        made = template(tokenizer, name)
        [segments] = made.render(row)
        prompt = "".join(segment.text for segment in segments if not segment.trained)
        assert made.render_prompt(row) == prompt
        unanswered = {key: row[key] for key in ("instruction", "prompt")}
        assert made.render_prompt(unanswered) == prompt


def test_generation_uses_all_that_training_uses(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    context = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "R"}]
    question = {"role": "user", "content": "P"}
    rows: list[tuple[dict[str, Any], str]] = [
        ({"prompt": "P", "completion": "C", "history": [["Q", "R"]], "system": "S"}, "completion"),
        ({"question": "P", "answer": "C", "context": "X", "system": "S"}, "answer"),
        ({"prompt": [*context, question], "completion": "C", "system": "S"}, "completion"),
        ({"prompt": "P", "completion": [{"role": "assistant", "content": "C"}]}, "completion"),
    ]
    made = template(tokenizer, "chat")
    for row, answer in rows:
        text = "".join(segment.text for segment in made.render(row)[0])
        prompt = made.render_prompt(row)
        assert text == prompt + "C<|end|>\n"
        assert made.render_prompt({key: row[key] for key in row if key != answer}) == prompt


def test_system_message_is_added_once(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHATML
    made = template(tokenizer, "chat", system="S")
    assert made.render({"prompt": "P", "completion": "C"})[0][0].text.startswith("<|system|>\nS<")
    given = [{"role": "system", "content": "T"}, {"role": "assistant", "content": "A"}]
    assert made.render({"messages": given})[0][0].text.startswith("<|system|>\nT<")


def test_rewritten_history_makes_a_sample_of_each_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    """Each turn is trained in the very context in which it would be generated."""
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' and not loop.last %}"
        "(dropped){% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    turn = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    made = template(tokenizer, "chat")
    assert len(made.render({"messages": turn})) == 1
    built = build([{"messages": turn + turn}], made)
    assert [marked(sample, tokenizer) for sample in built.dataset] == [
        "<|user|>U<|end|><|assistant|>⟦A<|end|>⟧",
        "<|user|>U<|end|><|assistant|>(dropped)<|end|><|user|>U<|end|><|assistant|>⟦A<|end|>⟧",
    ]
    assert (built.counts.rows, built.counts.unrolled, built.counts.samples) == (1, 1, 2)
    last = template(tokenizer, "chat", train_on="last_assistant")
    assert len(last.render({"messages": turn + turn})) == 1


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
    with pytest.raises(DataError, match="has no chat template\n    fix: template=plain-chat"):
        template(tokenizer, "chat")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "P"}, "cannot render a completion of this row"),
        ({"completion": "C"}, "cannot render a prompt of this row: it needs the columns prompt or"),
        ({"messages": [{"role": "user", "content": "U"}]}, "not the assistant's"),
    ],
)
def test_row_that_does_not_fit_is_named(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], message: str
) -> None:
    name = "chat" if "messages" in row else "completion"
    made = template(tokenizer, name)
    with pytest.raises(
        DataError, match=rf"(?s)none of the first 1 rows of .*rows.jsonl:1: .*{message}"
    ):
        build([row], made)


def test_overlong_rows_are_counted_or_stop(tokenizer: PreTrainedTokenizerBase) -> None:
    made = template(tokenizer, "completion")
    rows = [
        {"prompt": "a" * 20, "completion": "b"},
        {"prompt": "a", "completion": "b" * 20},
        {"prompt": "a", "completion": "b"},
    ]
    fields: dict[str, Any] = {"max_length": 8, "stop_above": {}}
    with pytest.raises(DataError, match=r"2 train .* first with 23 tokens at .*rows\.jsonl:1"):
        build(rows, made, max_length=8)
    dropped = build(rows, made, overlong="drop", **fields).counts
    assert (dropped.samples, dropped.dropped, dropped.truncated) == (1, 2, 0)
    cut = build(rows, made, overlong="truncate", **fields).counts
    # Nothing of the first row's completion is left, so it would train nothing.
    assert (cut.samples, cut.dropped, cut.truncated, cut.longest) == (2, 1, 1, 8)
    assert (cut.checks["nothing_trained"], cut.checks["answer_cut"]) == (1, 1)
    with pytest.raises(
        DataError, match=r"1 documents \(33.3%\) have no trained token.*\n.*stop_above.nothing"
    ):
        build(rows, made, max_length=8, overlong="truncate")
    with pytest.raises(DataError, match="the train data has no trained token: 1 rows"):
        build(rows[:1], made, overlong="drop", **fields)


def test_split_trains_every_token_once(tokenizer: PreTrainedTokenizerBase) -> None:
    made = template(tokenizer, "completion")
    rows = [{"prompt": "p" * 12, "completion": "abcdefghijklmno"}]
    built = build(rows, made, max_length=8, overlong="split")
    assert [marked(sample, tokenizer) for sample in built.dataset] == [
        "ppppp\n⟦ab⟧",  # the piece before it held only a prompt
        "b⟦cdefghi⟧",
        "i⟦jklmno<|end|>⟧",
    ]


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
    prompt = Encoder(tokenizer).prompt("a", bos=True)
    assert prompt == sample["input_ids"][:2]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real input: {SHARED} is absent")
def test_alpaca_prompt_is_the_published_one(tokenizer: PreTrainedTokenizerBase) -> None:
    vectors = json.loads((SHARED / "facts" / "chat_template_vectors.json").read_text())
    made = template(tokenizer, "alpaca")
    row = {"instruction": "Do it.", "input": "with this", "output": "Y"}
    expected = vectors["alpaca_prompt"]["with_input"].format(**row)
    prompt, completion = made.render(row)[0]
    assert prompt == Segment(expected, False, "prompt")
    assert completion == Segment("Y", True, "completion")
    without = vectors["alpaca_prompt"]["without_input"].format(**row)
    assert made.render({**row, "input": ""})[0][0].text == without


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real input: {SHARED} is absent")
@pytest.mark.parametrize(
    ("name", "bos"), [("opt", 1), ("gpt2", 0), ("gptj", 0), ("gpt-neox-20b", 0)]
)
def test_real_tokenizers_train_the_answer_and_one_eos(name: str, bos: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "tokenizers" / name)
    made = template(tokenizer, "completion")
    path = SHARED / "data" / "gsm8k" / "test.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()[:200]]
    built = build(rows, made, max_length=2048)
    assert built.counts.samples == 200
    eos = tokenizer.eos_token_id
    for row, sample in zip(rows, built.dataset, strict=True):
        assert sample["input_ids"].count(eos) == 1 + bos  # OPT's BOS is its EOS
        assert sample["labels"][-1] == eos
        assert trained_text(made, sample) == row["answer"] + tokenizer.eos_token
        hidden = sample["labels"].count(IGNORE_INDEX)
        assert tokenizer.decode(sample["input_ids"][bos:hidden]) == row["question"] + "\n"


def test_rows_are_held_out_by_seed_and_a_single_text_at_its_end(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": "p", "completion": str(i)}) + "\n" for i in range(10))
    )
    made = template(tokenizer, "completion")

    def parts(seed: int) -> tuple[list[str], list[str]]:
        prepared = prepare(DatasetConfig(path=str(path), eval_fraction=0.2), made, seed)
        assert prepared.eval is not None
        return tuple(
            [trained_text(made, sample)[0] for sample in part.dataset]
            for part in (prepared.train, prepared.eval)
        )  # type: ignore[return-value]

    train, held_out = parts(1)
    assert (len(train), len(held_out)) == (8, 2)
    assert sorted([*train, *held_out]) == list("0123456789")
    assert parts(1) == (train, held_out)
    assert parts(2) != (train, held_out)

    text = tmp_path / "one.txt"
    text.write_text("".join(f"line {i}\n" for i in range(10)))
    config = DatasetConfig(path=str(text), eval_fraction=0.2, packing="wrapped")
    prepared = prepare(config, template(tokenizer, "text"), seed=1)
    assert prepared.eval is not None
    assert tokenizer.decode(prepared.eval.dataset[0]["input_ids"]) == "line 8\nline 9\n<|end|>"
    assert tokenizer.decode(prepared.train.dataset[0]["input_ids"]).endswith("line 7\n<|end|>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "bad.jsonl",
            "{]\n",
            "(?s)none of the first 1 rows.*bad.jsonl:1: the line is not valid JSON",
        ),
        ("data.xml", "<a/>", "has an unknown file ending"),
        ("folder", None, "holds no file of a known kind"),
        ("empty.jsonl", "", "is empty"),
        ("blank.jsonl", "\n\n", "holds no rows"),
        ("short.jsonl", '{"prompt": 1, "completion": 2}\n', "of 1 row leaves none to train on"),
        ("lines.txt", "one line", "cannot be split between lines"),
    ],
)
def test_source_that_cannot_be_read(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    content: str | None,
    message: str,
) -> None:
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_text(content)
    made = template(tokenizer, "text" if name.endswith(".txt") else "completion")
    with pytest.raises(DataError, match=message):
        prepare(DatasetConfig(path=str(path), eval_fraction=0.5), made, seed=0)
