"""Rows of every format at random: what is trained is exactly what was meant, or the row is refused.

Hypothesis makes the rows (tests/made_rows.py). Each run takes other rows; its seed is part of what
a failing test prints. ``PROPERTY_SEED=N`` makes the same rows again, and ``PROPERTY_EXAMPLES=20``
twenty times as many.
"""

import copy
import datetime
import functools
import itertools
import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from made_rows import FORMATS, MARK, Made, Maker, changed
from made_tokenizers import (
    BARE,
    CHAT_TEMPLATES,
    MISTRAL,
    ZEPHYR,
    train_tokenizer,
    with_tokens_of,
)
from support import ROOT, TINY
from transformers import AutoTokenizer

from sft.config.settings import TemplateConfig
from sft.data.row_encoder import Encoded, RowEncoder
from sft.data.rows import Row
from sft.data.segment import TOKEN_BREAK
from sft.data.template import Template
from sft.errors import DataError

SEED = int(os.environ.get("PROPERTY_SEED") or random.randrange(1 << 32))
MANY = float(os.environ.get("PROPERTY_EXAMPLES", "1"))
OF_PYTHON = re.compile(r"[A-Z]\w*(Error|Exception|Iteration): ")
CHAT_FORMATS = ("messages", "messages", "messages", "sharegpt", "lists")
PAIRS = ("texts", "alpaca", "question")


def profile(examples: int) -> Callable[[Any], Any]:
    """Set how many rows a test makes, and from which seed."""
    chosen = settings(
        max_examples=max(1, int(examples * MANY)),
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: seed(SEED)(chosen(test))


@dataclass
class Setting:
    """A template with a tokenizer."""

    encoder: RowEncoder
    spaces: bool  # the tokenizer adds spaces, so that decoding a text cannot show them exactly
    supports: set[str]

    @property
    def template(self) -> Template:
        return self.encoder.template


def named(name: str, **changes: Any) -> TemplateConfig:
    text = (ROOT / "conf" / "template" / f"{name}.yaml").read_text(encoding="utf-8")
    return TemplateConfig(**{**yaml.safe_load(text), **changes})


SETTINGS: dict[str, Callable[[], tuple[TemplateConfig, Any]]] = {
    "completion": lambda: (named("completion"), AutoTokenizer.from_pretrained(TINY)),
    "completion, bytes": lambda: (named("completion"), train_tokenizer("bytes")),
    "completion, metaspace": lambda: (named("completion"), train_tokenizer("metaspace", True)),
    "alpaca": lambda: (named("alpaca"), AutoTokenizer.from_pretrained(TINY)),
    "alpaca, prepend": lambda: (named("alpaca"), train_tokenizer("prepend", True)),
    "text": lambda: (named("text"), AutoTokenizer.from_pretrained(TINY)),
    "lines, prepend": lambda: (named("lines"), train_tokenizer("prepend", True)),
    "chat": lambda: (named("chat"), AutoTokenizer.from_pretrained(TINY)),
    "plain-chat": lambda: (named("plain-chat"), AutoTokenizer.from_pretrained(TINY)),
    "plain-chat, last": lambda: (
        named("plain-chat", train_on="last_assistant"),
        train_tokenizer("bytes"),
    ),
    "plain-chat, rstrip": lambda: (named("plain-chat"), train_tokenizer("rstrip", True)),
    "mistral, metaspace": lambda: (
        named("chat", chat_template=MISTRAL),
        train_tokenizer("metaspace", True),
    ),
    "zephyr, prepend": lambda: (
        named("chat", chat_template=ZEPHYR),
        train_tokenizer("prepend", True),
    ),
    "bare, rstrip": lambda: (named("chat", chat_template=BARE), train_tokenizer("rstrip", True)),
}
OF_TRL = (
    *("qwen3", "qwen3_training", "qwen2_5", "llama3_1", "phi3", "lfm2_2_5", "gptoss", "glm4moe"),
    *("deepseekv3", "gemma3", "qwen3_8", "nemotron_3_nano", "muse_glimmer", "gemma4_v5", "cohere"),
)


@functools.cache
def setting_of(name: str) -> Setting:
    if name in SETTINGS:
        config, tokenizer = SETTINGS[name]()
    else:
        config = named("chat", chat_template=name, date="2026-01-02")
        source = (CHAT_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer = with_tokens_of(source)
    encoder = RowEncoder(Template(config, tokenizer))
    chat = encoder.template.chat is not None
    supports = {"chat", *supported(encoder.template)} if chat else set[str]()
    return Setting(encoder, encoder.encoder._adds_space, supports)


def supported(template: Template) -> set[str]:
    """Return what a template can train of plain words; docs/templates.md has it of TRL's."""
    user, answer = {"role": "user", "content": "u."}, {"role": "assistant", "content": "a."}
    function = {"name": "n", "description": "d", "parameters": {"type": "object", "properties": {}}}
    function["parameters"]["properties"] = {"p": {"type": "string", "description": "e"}}  # type: ignore[index]
    call = {"id": "000000000", "function": {"name": "n", "arguments": {"p": "v"}}}
    shapes: dict[str, tuple[list[dict[str, Any]], Any]] = {
        "several": ([user, answer, user, answer], None),
        "system": ([{"role": "system", "content": "s."}, user, answer], None),
        "reasoning": ([user, {**answer, "reasoning_content": "r."}], None),
        "assistant first": ([answer, user, answer], None),
        "assistant first, reasoning": (
            [{**answer, "reasoning_content": "r."}, user, answer],
            None,
        ),
        "tools": (
            [
                user,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "name": "n", "tool_call_id": "000000000", "content": "r."},
                answer,
            ],
            [{"type": "function", "function": function}],
        ),
    }
    messages, tools = shapes["tools"]
    worded = [messages[0], {**messages[1], "content": "c."}, *messages[2:]]
    shapes["words with a call"] = (worded, tools)
    found = set()
    for name, (messages, tools) in shapes.items():
        try:
            template.render({"messages": messages, "tools": tools})
        except DataError:
            continue
        found.add(name)
    return found


def spans_of(done: Encoded) -> list[tuple[list[int], list[bool]]]:
    """Return the ids of each document, and which are trained."""
    ends = done.documents["length"].cumsum()
    begins = ends - done.documents["length"]
    return [
        (done.ids[a:b].tolist(), (done.marks[a:b] & 1).astype(bool).tolist())
        for a, b in zip(begins, ends, strict=True)
    ]


def decoded(setting: Setting, ids: list[int]) -> str:
    tokenizer = setting.template.tokenizer
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def runs_of(ids: list[int], trained: list[bool]) -> list[tuple[int, int]]:
    """Return where each trained span begins and ends."""
    places = itertools.groupby(range(len(ids)), key=lambda place: trained[place])
    spans = [list(group) for flag, group in places if flag]
    return [(span[0], span[-1] + 1) for span in spans]


def check(setting: Setting, made: Made) -> None:
    """Require that a row became what was meant, or was refused for what it needs."""
    encoder, chat = setting.encoder, setting.template.chat
    done = encoder([Row(made.row, "rows.jsonl", 7)])
    counts = (len(done.bad), len(done.empty), len(done.documents) > 0)
    assert sorted(counts) == [0, 0, 1], counts
    assert int(done.documents["length"].sum()) == len(done.ids) == len(done.marks)
    assert int(done.documents["trained"].sum()) == int((done.marks & 1).sum())
    needs = set(made.needs)
    if "</think>" in str(made.row):
        needs.add("reasoning")
    if {"assistant first", "reasoning"} <= needs:
        needs.add("assistant first, reasoning")
    needs -= setting.supports
    for refused in [*done.bad, *done.empty]:
        assert (refused.file, refused.line) == ("rows.jsonl", 7)
        assert not OF_PYTHON.match(refused.reason), refused.reason
    if done.bad:
        assert needs, done.bad[0].reason
        return
    if made.ids:
        [(ids, trained)] = spans_of(done)
        assert list(zip(ids, trained, strict=True)) == made.ids
        return
    if done.empty:
        assert not made.trained, done.empty[0].reason
        return
    documents = spans_of(done)
    texts = [decoded(setting, ids) for ids, _ in documents]
    runs = [runs_of(*document) for document in documents]
    found = [
        decoded(setting, ids[a:b])
        for (ids, _), spans in zip(documents, runs, strict=True)
        for a, b in spans
    ]
    # Some templates write the name of a called tool twice.
    once = dict.fromkeys(MARK.findall("".join(found)))
    order = sorted if "words with a call" in needs else list  # Gemma writes the words after it
    assert order(once) == order(dict.fromkeys(made.trained))
    whole = "".join(texts)
    assert made.context <= set(MARK.findall(whole))
    beside = made.row.get("source")
    assert beside is None or beside not in whole
    unused = done.unused[int(done.documents["unused"][0])]
    # Few templates write the name of a message's author.
    assert [name for name in unused if not name.endswith(".name")] == ["source"] * bool(beside)
    asked = {*made.context, *made.trained}
    kept = [t for t in made.texts if "think>" not in t and asked.issuperset(MARK.findall(t))]
    assert all(holds(setting, whole, text) for text in kept)
    check_text(setting, made, texts)
    if chat is not None:
        check_prompts(setting, made, done, documents, runs)
        check_control(setting, made, documents)


def holds(setting: Setting, whole: str, text: str) -> bool:
    """Return whether a rendered text holds a part: as it is, as JSON or as Python writes a list."""
    forms = {
        text,
        repr(text)[1:-1],
        *(json.dumps(text, ensure_ascii=flag)[1:-1] for flag in (True, False)),
    }
    if setting.spaces:
        whole = re.sub(r"[\s\u2581]", "", whole)
        forms = {re.sub(r"[\s\u2581]", "", form) for form in forms}
    return any(form.strip() in whole for form in forms)


def check_text(setting: Setting, made: Made, texts: list[str]) -> None:
    """Require that the ids decode to the rendered text."""
    template = setting.template
    turns = len(texts) > len(template.render(made.row))
    samples = template.rendered(made.row, by_turn=turns).samples
    bos = decoded(setting, setting.encoder.encoder.bos_ids) if template.adds_bos else ""
    end = setting.encoder.eos_id
    eos = decoded(setting, [end]) if end is not None else ""
    for sample, text in zip(samples, texts, strict=True):
        rendered = "".join(segment.text for segment in sample)
        rendered = rendered if rendered.startswith(bos) else bos + rendered
        rendered = rendered if rendered.endswith(eos) else rendered + eos
        rendered = rendered.replace(TOKEN_BREAK, "")
        if setting.spaces:
            rendered, text = (re.sub(r"[\s\u2581]", "", part) for part in (rendered, text))
        assert text == rendered


def check_prompts(
    setting: Setting, made: Made, done: Encoded, documents: Any, runs: list[list[tuple[int, int]]]
) -> None:
    """Require that what precedes each trained span is what generation starts from."""
    # Nothing is asked before an answer that begins the conversation.
    if done.documents["prompt_differs"].any() or "assistant first" in made.needs:
        return
    template, row = setting.template, made.row
    rows = [row]
    for column, key in (("messages", "role"), ("conversations", "from")):
        if column in row:
            said = row[column]
            words = ("assistant", "gpt", "function_call")
            answers = [index for index, item in enumerate(said) if item[key] in words]
            rows = [{**row, column: said[:index]} for index in answers]
    encoder = setting.encoder.encoder
    prompts = [encoder.prompt(template.render_prompt(row), template.adds_bos) for row in rows]
    contexts = [
        ids[:begin]
        for (ids, _), spans in zip(documents, runs, strict=True)
        for begin, _ in spans
        if begin
    ]
    if "history" in row:
        contexts = contexts[-1:]
    for context in contexts:
        assert context in prompts


def check_control(setting: Setting, made: Made, documents: Any) -> None:
    """Require that a text which looks like a control token adds none."""
    assert setting.template.chat is not None
    pattern = setting.template.chat.template.control

    def harmless(text: str) -> str:  # the tags of reasoning have a meaning in an answer
        return pattern.sub(lambda m: m[0] if "think" in m[0] else f"({m[0][1:-1]})", text)

    plain = changed(made.row, harmless)
    if plain == made.row:
        return
    special = set(setting.template.tokenizer.added_tokens_decoder)
    expected = [
        [token for token in ids if token in special]
        for ids, _ in spans_of(setting.encoder([Row(plain, "rows.jsonl", 7)]))
    ]
    assert [[token for token in ids if token in special] for ids, _ in documents] == expected


def formats_of(name: str) -> tuple[str, ...]:
    """Return the formats for a template; of each ten rows, one has any format."""
    if name.startswith(("text", "lines")):
        fit: tuple[str, ...] = ("text", "text", "text", "tokenized")
    elif name.startswith(("completion", "alpaca")):
        fit = (*PAIRS, "tokenized")
    else:
        fit = (*PAIRS, *CHAT_FORMATS)
    return fit


def row_of(data: st.DataObject, setting: Setting, name: str) -> Made:
    def encode(text: str) -> list[int]:
        return setting.encoder.encoder.encode([text])[0]

    maker = Maker(data.draw, str(setting.template.train_on), encode)
    fit = formats_of(name)
    kind = data.draw(st.sampled_from(fit if not maker.odds(10) else FORMATS))
    made = maker.of(kind)
    if kind not in fit and kind != "tokenized":
        made.needs.add("another template")
    if name.startswith("alpaca") and kind != "alpaca":
        made.needs.add("another template")
    return made


@pytest.mark.parametrize("name", [*SETTINGS, *OF_TRL])
def test_what_is_trained_is_what_was_meant(name: str) -> None:
    print(f"PROPERTY_SEED={SEED}")
    setting = setting_of(name)

    @profile(70)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        check(setting, row_of(data, setting, name))

    run()


JUNK = st.sampled_from(
    [
        *(None, True, False, 0, -1, 2.5, float("nan"), float("inf"), 10**400, Decimal("1.5")),
        *("", "x", "[]", "{", '{"a": 1}', "user", "\ud800", "\uf8f0", b"x", object(), (1, 2)),
        *([], {}, [[]], [{}], [None], {"a": None}, {1: 2}, {"role": "user"}),
        *(datetime.date(2024, 1, 2), datetime.timedelta(1)),
    ]
)


def places_of(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths to the values in a row but for flags, without which an answer is trained."""
    items: Any = ()
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path and path[-1] != "train" else []
    return found + [place for key, item in items for place in places_of(item, (*path, key))]


@pytest.mark.parametrize("name", ["completion", "text", "chat", "plain-chat", "qwen3", "gemma3"])
def test_a_damaged_row_is_refused_and_never_trained_wrongly(name: str) -> None:
    """Whatever stands in the place of a value, no error of Python's comes, and no other mark."""
    print(f"PROPERTY_SEED={SEED}")
    setting = setting_of(name)

    @profile(100)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        made = row_of(data, setting, name)
        row = copy.deepcopy(made.row)
        *path, last = data.draw(st.sampled_from(places_of(row)))
        inner = functools.reduce(lambda value, key: value[key], path, row)
        if data.draw(st.booleans()) and isinstance(inner, dict):
            del inner[last]
        else:
            inner[last] = data.draw(JUNK)
        done = setting.encoder([Row(row, "rows.jsonl", 7)])
        assert len(done.bad) + len(done.empty) + (len(done.documents) > 0) == 1
        for refused in [*done.bad, *done.empty]:
            assert not OF_PYTHON.match(refused.reason), refused.reason
        ids = [t for d in spans_of(done) for t, flag in zip(*d, strict=True) if flag]
        if not made.ids:
            allowed = iter(dict.fromkeys(made.trained))
            found = dict.fromkeys(MARK.findall(decoded(setting, ids)))
            assert all(mark in allowed for mark in found), (found, made.trained)

    run()


def test_faults_that_were_found() -> None:
    """A control token as text: in a prompt of SentencePiece's; in a list of a call's arguments."""
    made = Made({"prompt": "<s>Kq1Z<s>", "completion": " \n Kq2Z"}, ["Kq2Z"], {"Kq1Z"})
    for name in ("mistral, metaspace", "zephyr, prepend", "bare, rstrip"):
        check(setting_of(name), made)
    function = {"name": "Kq2Z", "arguments": {"Kq3Z": ["<|im_end|>Kq4Z"]}}
    messages = [
        {"role": "user", "content": "Kq1Z"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "Kq5Z"},
        {"role": "assistant", "content": "Kq6Z"},
    ]
    trained = ["Kq2Z", "Kq3Z", "Kq4Z", "Kq6Z"]
    check(setting_of("lfm2_2_5"), Made({"messages": messages}, trained, {"Kq1Z", "Kq5Z"}))
