"""Chat templates: the published strings, and exactly what is trained of them."""

import json
from typing import Any

import pytest
from support import SHARED, TINY
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sft.config.settings import TemplateConfig
from sft.data.named_template import named_template
from sft.data.readers import Row
from sft.data.row_encoder import RowEncoder
from sft.data.segment import TOKEN_BREAK
from sft.data.template import Template
from sft.errors import DataError
from sft.train import main

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real input: {SHARED} is absent")
CONTROL = [
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"),
    *("<s>", "</s>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
]
VECTORS: dict[str, Any] = (
    json.loads((SHARED / "facts" / "chat_template_vectors.json").read_text())
    if SHARED.is_dir()
    else {"rendered": [], "published": []}
)


def chat(template: str, bos: str = "<s>", eos: str = "</s>", **fields: Any) -> Template:
    """Give a chat template on a tokenizer that has everybody's control tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    tokenizer.bos_token, tokenizer.eos_token = bos or None, eos
    prompts, completions = ["{prompt}"], ["{completion}"]
    config = TemplateConfig("chat", "chat", None, template, None, prompts, completions)
    for key, value in fields.items():
        setattr(config, key, value)
    return Template(config, tokenizer)


def joined(template: Template, row: dict[str, Any]) -> tuple[str, list[str]]:
    """Give the whole text, and each trained stretch."""
    [segments] = template.render(row)
    return (
        "".join(segment.text for segment in segments),
        [segment.text for segment in segments if segment.trained],
    )


KNOWN = ("trl_llama3", "trl_qwen2_5", "trl_gemma")


@needs_shared
@pytest.mark.parametrize(
    "vector",
    [v for v in VECTORS["rendered"] if v["template"].startswith("trl_")],
    ids=lambda v: f"{v['template']}-{v['conversation']}-{v['add_generation_prompt']}",
)
def test_published_renderings(vector: dict[str, Any]) -> None:
    name = vector["template"].removeprefix("trl_")
    template = chat(name, vector["bos_token"], vector["eos_token"])
    messages = VECTORS["conversations"][vector["conversation"]]
    tools = VECTORS["tools"] if vector["conversation"] == "tools" else None
    row = {"messages": messages, "tools": tools}
    if "error" in vector:
        with pytest.raises(DataError, match="System role not supported"):
            template.render(row)
        return
    if vector["add_generation_prompt"]:
        assert template.render_prompt(row) == vector["expected"]
        return
    if messages[-1]["role"] != "assistant":
        with pytest.raises(DataError, match="the last message is not the assistant's"):
            template.render(row)
        return
    text, trained = joined(template, row)
    assert text == vector["expected"]
    if "assistant_text" in vector:
        # The template's own {% generation %} marks are kept, without the newlines around an answer:
        # the generation prompt has the first, and nothing generates the last.
        assert trained == [text.strip("\n") for text in vector["assistant_text"]]
    else:
        answers = [m["content"] for m in messages if m["role"] == "assistant" and m["content"]]
        found = [text for text in trained if "<tool_call>" not in text]
        assert [text.rpartition("<")[0] for text in found] == answers
        assert all(text.endswith(">") for text in trained)  # and with the end of the turn


@needs_shared
@pytest.mark.parametrize("name", ["llama3 multi-turn", "qwen3, no thought in the data"])
def test_published_answers(name: str) -> None:
    """Other toolkits also train the newline after the end of a turn; nothing generates it."""
    vector = next(v for v in VECTORS["published"] if v["name"] == name)
    template = chat(
        vector["jinja"].removeprefix("trl_"),
        "<|begin_of_text|>",
        "<|eot_id|>",
        train_on="last_assistant" if len(vector["pairs"]) == 1 else "assistant",
    )
    text, trained = joined(template, {"messages": vector["messages"]})
    assert text == vector["expected"]
    assert trained == [pair["answer"].rstrip("\n") for pair in vector["pairs"]]
    prompt = template.render_prompt({"messages": vector["messages"][:-1]})
    assert text.startswith(prompt) and prompt.endswith(vector["pairs"][-1]["prompt"])


@needs_shared
def test_published_phi3_prompt() -> None:
    vector = next(v for v in VECTORS["published"] if v["name"].startswith("phi-3"))
    template = chat("phi3_5", "<s>", "<|endoftext|>")
    assert template.render_prompt({"messages": vector["messages"]}) == vector["expected"]


def test_train_false_and_last_assistant() -> None:
    messages = [
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1", "train": False},
        {"role": "user", "content": "U2"},
        {"role": "assistant", "content": "A2"},
    ]
    template = chat("llama3")
    assert joined(template, {"messages": messages})[1] == ["A2<|eot_id|>"]
    messages[1]["train"], messages[3]["train"] = True, False
    assert joined(template, {"messages": messages})[1] == ["A1<|eot_id|>"]
    assert joined(chat("llama3_training"), {"messages": messages})[1] == ["A1<|eot_id|>"]
    with pytest.raises(DataError, match="no message is trained"):
        chat("llama3", train_on="last_assistant").render({"messages": messages})
    with pytest.raises(DataError, match=r"template\.train_on=all trains every token"):
        chat("llama3", train_on="all").render({"messages": messages})
    messages[3].pop("train")
    text, trained = joined(chat("llama3", train_on="all"), {"messages": messages})
    assert trained == [text]


def test_what_a_template_leaves_out_is_refused() -> None:
    bare = (
        "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turn = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]
    call = {"name": "look", "arguments": {"where": "here"}}
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"messages": [{"role": "system", "content": "S"}, *turn]},
            "not write the content of message 1, system",
        ),
        ({"messages": turn, "tools": [{"name": "look"}]}, "not write the name of a tool"),
        (
            {"messages": [*turn[:1], {**turn[1], "tool_calls": [call]}]},
            "not write the tool calls of an answer",
        ),
        (
            {"messages": [*turn[:1], {**turn[1], "reasoning": "R"}]},
            "not write the reasoning of message 2, the assistant",
        ),
    ]
    template = chat(bare)
    assert joined(template, {"messages": turn})[1] == ["A<|im_end|>"]
    for row, message in cases:
        with pytest.raises(DataError, match=message):
            template.render(row)
    _, trained = joined(chat("qwen3"), cases[3][0])
    assert trained == ["<think>\nR\n</think>\n\nA<|im_end|>"]


@pytest.mark.parametrize("format", ["sharegpt", "auto"])
def test_sharegpt_tool_calls_are_openais(format: str) -> None:
    tools = [{"name": "look", "description": "D", "parameters": {"type": "object"}}]
    row = {
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "U"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"n": 1}}'},
            {"from": "observation", "value": "seen"},
            {"from": "gpt", "value": "A"},
        ],
        "tools": json.dumps(tools),
    }
    template = chat("qwen2_5")
    template.format = format
    text, trained = joined(template, row)
    assert trained == [
        '<tool_call>\n{"name": "look", "arguments": {"n": 1}}\n</tool_call><|im_end|>',
        "A<|im_end|>",
    ]
    assert '{"type": "function", "function": {"name": "look"' in text
    assert "<tool_response>\nseen\n</tool_response>" in text
    for key, value, message in (
        ("value", "{", "tool call of message 3 is not valid JSON"),
        ("from", "alien", "has the role 'alien'; the known roles are human"),
    ):
        broken = json.loads(json.dumps(row))
        broken["conversations"][2][key] = value
        with pytest.raises(DataError, match=message):
            template.render(broken)


def test_plain_chat_works_without_a_chat_template() -> None:
    config = main.compose(["dataset=jsonl", "dataset.path=rows", "template=plain-chat"]).template
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = None
    template = Template(config, tokenizer)
    row = {"instruction": "I", "input": "X", "output": "Y", "history": [["Q", "R"]], "system": "S"}
    assert joined(template, row) == (
        "S\n\nUSER: Q\nASSISTANT: R<|end|>\nUSER: I\n\nX\nASSISTANT: Y<|end|>\n",
        [" R<|end|>", " Y<|end|>"],
    )
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    messages = [{"role": "user", "content": "U"}, {**call, "thinking": "T"}]
    _, trained = joined(template, {"messages": messages, "tools": [{"name": "f"}]})
    assert trained == [' <think>\nT\n</think>\n CALL {"name": "f", "arguments": {}}<|end|>']


def test_what_data_writes_begins_no_turn() -> None:
    template = chat("llama3")
    row = {"prompt": "x<|eot_id|><|start_header_id|>y", "completion": "z"}
    encoder = RowEncoder(template)
    done = encoder([Row(row, "f", 1)])
    ids = done.ids.tolist()
    eot = template.tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert ids.count(eot) == 2  # the template's own, one a turn
    assert template.tokenizer.decode(ids).count("<|eot_id|>") == 3
    assert done.documents["control"].tolist() == [True]
    prompt = encoder.encoder.prompt(template.render_prompt(row), bos=False)
    assert ids[: len(prompt)] == prompt
    for kind in (
        template,
        Template(TemplateConfig(prompts=["{prompt}"], completions=["c"]), template.tokenizer),
    ):
        with pytest.raises(DataError, match="private-use character"):
            kind.render({"prompt": TOKEN_BREAK, "completion": "z"})


def test_named_templates(tmp_path: Any) -> None:
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    assert named_template(str(tmp_path / "own.jinja")) == "{{ messages[0].content }}"
    assert "im_start" in named_template("qwen3")
    with pytest.raises(DataError, match="there is no chat template qwen33; there are cohere"):
        named_template("qwen33")
    with pytest.raises(DataError, match="there is no file"):
        named_template("absent.jinja")
