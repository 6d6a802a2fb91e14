"""What public reports found wrong with chat templates is right, or refused: by the command."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from support import TINY
from transformers import AutoTokenizer

from sft.data.__main__ import main as data
from sft.data.preview import marked

CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<think>", "</think>", "<|endoftext2|>", "<tool_call>"),
    *("<|tool_call_start|>", "<|tool_call_end|>", "<｜Assistant｜>", "<｜User｜>"),  # noqa: RUF001
    *("<｜end▁of▁sentence｜>", "<|tool_list_start|>", "<|tool_list_end|>", "<table>"),  # noqa: RUF001
    *("<｜tool▁calls▁begin｜>", "<|channel|>", "<|constrain|>", "<start_of_turn>"),  # noqa: RUF001
    *("<end_of_turn>", "<|start|>", "<|message|>", "<|return|>", "<|call|>"),
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASK = {"role": "user", "content": "a"}
TURNS = [ASK, {"role": "assistant", "content": "b"}]
TOOL = {"name": "look", "description": "D", "parameters": {"type": "object", "properties": {}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the embedded model other names for its reserved tokens: some special, some not."""
    folder = tmp_path_factory.mktemp("model") / "named"
    shutil.copytree(TINY, folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        text = path.read_text(encoding="utf-8")
        for number, token in enumerate(CONTROL):
            text = text.replace(f"<|reserved_{number}|>", token)
        path.write_text(text, encoding="utf-8")
    made = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in made["added_tokens"]:
        token["special"] = token["content"] not in ("<think>", "</think>", "<tool_call>", "<table>")
    (folder / "tokenizer.json").write_text(json.dumps(made), encoding="utf-8")
    return folder


@pytest.fixture
def audit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Give the command ``sft data`` on rows: what is trained, and the figures or the error."""
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def run(rows: list[Any], *overrides: str, jinja: str | None = None) -> tuple[list[str], Any]:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = {"model": "tiny", "model.name_or_path": str(model), "dataset": "jsonl"}
        given |= {"dataset.path": "rows.jsonl", "dataset.eval_fraction": "0", "template": "chat"}
        if jinja is not None:
            Path("own.jinja").write_text(jinja)
            given["template.chat_template"] = "own.jinja"
        given |= dict(item.split("=", 1) for item in overrides)
        try:
            data(["--json", *(f"{key}={value}" for key, value in given.items())])
        except SystemExit:
            return [], json.loads(capsys.readouterr().out)["error"]
        result = json.loads(capsys.readouterr().out)
        figures = result["parts"]["train"]
        figures["checks"] = {name: c["documents"] for name, c in figures["checks"].items()}
        samples = Dataset.from_file(str(Path(result["folder"]) / "train.arrow"))
        return [marked(s, tokenizer) for s in samples], figures

    return run


def test_reasoning_in_the_content_is_dropped_by_no_template(audit: Any) -> None:
    """(DeepSeek-R1#633) The template keeps only what follows </think>."""
    answer = "<think>\nSeven and eight make fifteen.\n</think>\n\n15"
    inside = [ASK, {"role": "assistant", "content": answer}]
    apart = [ASK, {"role": "assistant", "content": "15", "reasoning_content": "Seven and eight."}]
    for messages in (inside, apart):
        for name in ("deepseek_r1_distill", "deepseekv3"):
            _, error = audit([{"messages": messages}], f"template.chat_template={name}")
            assert "does not write the reasoning of message 2, the assistant message" in error
    [text], _ = audit([{"messages": inside}], "template.chat_template=qwen3")
    assert text.endswith(f"assistant\n⟦{answer}<|im_end|>⟧\n")


@pytest.mark.parametrize("train_on", ["assistant", "last_assistant", "all"])
def test_tools_that_are_not_written_are_refused(audit: Any, train_on: str) -> None:
    """(trl#5517) The call holds the tool's name, but no template's text holds the tool."""
    jinja = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls | default('') }}")
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    row = {"messages": [ASK, call, {"role": "tool", "content": "seen"}, *TURNS], "tools": [TOOL]}
    _, error = audit([row], f"template.train_on={train_on}", jinja=jinja)
    assert "does not write the name of a tool" in error or "does not write" in error
    # A second call of the same message, and a tool's result, are parts too.
    _, error = audit(
        [{"messages": [ASK, {**call, "tool_calls": call["tool_calls"] * 2}], "tools": [TOOL]}],
        *("template.chat_template=gptoss", f"template.train_on={train_on}"),
    )
    assert "does not write" in error
    lost = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'tool' %}")
    calls = "{{ m.tool_calls | tojson if m.tool_calls else '' }}"
    lost = lost.replace("{{ m.content }}", "{{ m.content }}" + calls)
    lost = "{{ tools | tojson }}" + lost
    _, error = audit([row], f"template.train_on={train_on}", jinja=lost)
    assert "does not write the content of message 3, the tool message" in error


def test_a_template_that_refuses_the_system_message_is_named_for_it(audit: Any) -> None:
    row = {"messages": [{"role": "system", "content": "S"}, *TURNS]}
    _, error = audit([row], "template.chat_template=gemma")
    assert "System role not supported" in error
    dropped = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    _, error = audit([row], jinja=dropped)
    assert "does not write the content of message 1, system" in error


@pytest.mark.parametrize("name", ["qwen3_training", "qwen2_5_training", "qwen3", "lfm2_v2"])
def test_the_end_of_a_turn_is_the_control_token(audit: Any, name: str) -> None:
    """(trl#5988) A newline after the end of a turn is neither trained nor the end."""
    row = {"messages": [ASK, {"role": "assistant", "content": "abc\nabc"}]}
    [text], figures = audit([row], f"template.chat_template={name}")
    assert text.endswith("abc\nabc<|im_end|>⟧\n")
    assert figures["checks"]["never_stops"] == 0


def test_a_call_ends_with_the_turn_not_with_the_call(audit: Any) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {}}}]}
    row = {"messages": [ASK, call], "tools": [TOOL]}
    [text], figures = audit([row], "template.chat_template=lfm2_v2")
    assert text.endswith("<|tool_call_end|><|im_end|>⟧\n")
    assert figures["checks"]["never_stops"] == 0


def test_every_trained_span_must_stop(audit: Any) -> None:
    """A template that marks the end of the turn for the last answer only."""
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{% if loop.last %}<|im_end|>{% endif %}{% endgeneration %}"
        "{% if not loop.last %}<|im_end|>{% endif %}{% else %}{{ m.content }}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [{"messages": [*TURNS, *TURNS]}, {"messages": TURNS}]
    texts, figures = audit(rows, "dataset.stop_above.never_stops=1", jinja=jinja)
    assert "⟦b⟧<|im_end|>" in texts[0] and texts[0].endswith("⟦b<|im_end|>⟧")
    assert figures["checks"]["never_stops"] == 1


def test_train_on_all_needs_the_end_of_turn_anywhere(audit: Any) -> None:
    texts, figures = audit([{"messages": TURNS}], "template.train_on=all", jinja=CHATML)
    assert texts == [
        "<|im_start|>⟦user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n⟧"
    ]  # nothing predicts the first token
    assert figures["checks"]["never_stops"] == 0


def test_phi3_is_one_sample(audit: Any) -> None:
    """EOS at the very end of a conversation rewrites nothing."""
    jinja = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
    )
    texts, figures = audit([{"messages": [*TURNS, *TURNS]}], jinja=jinja)
    assert [text.count("⟦b<|im_end|>⟧") for text in texts] == [2]
    assert (figures["unrolled"], texts[0][-8:]) == (0, "\n<|end|>")


def test_arguments_are_text_where_the_template_prints_them(audit: Any) -> None:
    """(oumi#2603) Python's text of a dict is never trained."""
    printed = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} "
        "{{ c.function.arguments }}{% endfor %}",
    )
    joined = printed.replace("c.function.arguments", "'args: ' + c.function.arguments")
    walked = printed.replace(
        "{{ c.function.arguments }}",
        "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}",
    )
    given = {"city": "Oslo", "now": True}
    for arguments in (given, json.dumps(given)):
        call = {"function": {"name": "look", "arguments": arguments}}
        row = {"messages": [ASK, {"role": "assistant", "tool_calls": [call]}]}
        for jinja, text in (
            (printed, 'look {"city": "Oslo", "now": true}'),
            (joined, 'look args: {"city": "Oslo", "now": true}'),
            (walked, "look city=Oslo;now=True;"),
        ):
            [found], _ = audit([row], jinja=jinja)
            assert f"⟦<tool_call>{text}<|im_end|>⟧" in found


def test_control_text_is_text_in_every_part(audit: Any, model: Path) -> None:
    """(transformers#47853) Also in tools and arguments, and of tokens not flagged special."""
    tool = {**TOOL, "description": "D <|im_end|>"}
    arguments = {"where<|im_end|>": "here<|im_end|><tool_call>"}
    call = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "look", "arguments": arguments}}],
    }
    row = {"messages": [ASK, call], "tools": [tool]}
    [text], figures = audit([row], "template.chat_template=qwen3_instruct_2507")
    assert "here<|im_end|><tool_call>" in text and "D <|im_end|>" in text
    assert figures["checks"]["control_tokens"] == 1
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = Dataset.from_file(str(next(Path("cache").rglob("train.arrow"))))[0]["input_ids"]
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 3  # system, user, assistant
    # The template itself writes <tool_call> twice in its instructions, and before the call.
    assert ids.count(tokenizer.convert_tokens_to_ids("<tool_call>")) == 3
    # An added token that no template writes is text as the tokenizer reads it: HTML is one token.
    [text], figures = audit(
        [{"messages": [ASK, {"role": "assistant", "content": "<table>"}]}], jinja=CHATML
    )
    assert figures["checks"]["control_tokens"] == 0 and figures["trained_tokens"] == 2


def test_dates_switches_and_bos_are_settings(audit: Any) -> None:
    jinja = "{{ strftime_now('%d %b %Y') }}{% if loud %}!{% endif %}" + CHATML
    rows = [{"messages": TURNS}]
    [text], _ = audit(rows, "template.date=2024-07-26", jinja=jinja)
    assert text.startswith("26 Jul 2024<|im_start|>")
    [text], _ = audit(rows, "template.date=2025-01-02", "template.kwargs={loud: true}", jinja=jinja)
    assert text.startswith("02 Jan 2025!<|im_start|>")
    _, error = audit(rows, "template.kwargs={quiet: true}", jinja=jinja)
    assert "template.kwargs.quiet: the chat template reads no variable quiet" in error
    _, error = audit(rows, "template.date=26.7.2024", jinja=jinja)
    assert "must be a day, written as YYYY-MM-DD" in error


def test_a_folder_without_tokenizer_files_is_refused(audit: Any, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}'
    )
    _, error = audit([{"messages": TURNS}], f"model.name_or_path={folder}")
    assert "has no tokenizer: none of the files" in error


def test_a_tag_within_an_answer_is_text(audit: Any) -> None:
    """Only reasoning at the beginning of an answer keeps its tags as control tokens."""
    answer = {"role": "assistant", "content": "The tag </think> ends it, <think> begins it."}
    [text], figures = audit([{"messages": [ASK, answer]}], "template.chat_template=qwen3")
    assert text.endswith(f"<think>\n\n</think>\n\n{answer['content']}<|im_end|>⟧\n")
    assert figures["checks"]["control_tokens"] == 1
    opened = {"role": "assistant", "content": "R\n</think>\n\nA"}  # the prompt had the first tag
    [text], figures = audit([{"messages": [ASK, opened]}], "template.chat_template=qwen3")
    assert text.endswith("⟦<think>\nR\n</think>\n\nA<|im_end|>⟧\n")
    assert figures["checks"]["control_tokens"] == 0


def test_an_answer_begins_with_a_whole_control_token(audit: Any) -> None:
    """DeepSeek-V3's generation prompt goes on with <think>, an answer with another token."""
    call = {"id": "call12345", "type": "function", "function": {"name": "f", "arguments": {}}}
    turn = [ASK, {"role": "assistant", "content": "", "tool_calls": [call]}]
    [text], figures = audit([{"messages": turn}], "template.chat_template=deepseekv3")
    begin = "<｜Assistant｜>⟦<｜tool▁calls▁begin｜>"  # noqa: RUF001
    assert begin in text and figures["checks"]["prompt_differs"] == 1


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_only_reasoning_at_the_beginning_is_reasoning(audit: Any, name: str) -> None:
    said = "Example:\n<think>\nfoo\n</think>\nThat is it."
    turn = [ASK, {"role": "assistant", "content": said}]
    [text], figures = audit([{"messages": turn}], f"template.chat_template={name}")
    assert said in text and text.count("Example:") == 1
    assert figures["checks"]["control_tokens"] == (name == "qwen3")


def test_no_reasoning_is_written_as_the_template_does(audit: Any) -> None:
    turn = [ASK, {"role": "assistant", "content": "<think>\n\n</think>\n\nb"}]
    [text], _ = audit([{"messages": turn}], "template.chat_template=gptoss")
    assert text.endswith("⟦<|channel|>final<|message|>b<|return|>⟧")
    [text], _ = audit([{"messages": turn}], "template.chat_template=qwen3")
    assert text.endswith("<|im_start|>assistant\n⟦<think>\n\n</think>\n\nb<|im_end|>⟧\n")


def test_the_first_answer_is_not_looked_for_in_a_later_one(audit: Any) -> None:
    """The second answer begins as the generation prompt ends, the first one does not."""
    answer = {"role": "assistant", "content": "a"}
    messages = [answer, ASK, {"role": "assistant", "content": "b", "reasoning_content": "R"}]
    [text], _ = audit([{"messages": messages}], "template.chat_template=nemotron_3_nano")
    assert "<|im_start|>assistant\n<think>⟦</think>a<|im_end|>⟧\n" in text
    assert text.endswith("<|im_start|>assistant\n<think>\n⟦R\n</think>\nb<|im_end|>⟧\n")


def test_an_answer_after_reasoning_calls_and_results(audit: Any) -> None:
    """gpt-oss drops the reasoning before a call once the final answer follows it."""
    call = {"function": {"name": "look", "arguments": {}}}
    messages = [
        ASK,
        {"role": "assistant", "content": "", "reasoning_content": "R", "tool_calls": [call]},
        {"role": "tool", "name": "look", "content": "sun"},
        {"role": "assistant", "content": "b", "reasoning_content": "S"},
    ]
    row = {"messages": messages, "tools": [TOOL]}
    texts, figures = audit([row], "template.chat_template=gptoss")
    assert len(texts) == 2 and figures["checks"]["prompt_differs"] == 0
    thought = "<|start|>assistant{}<|channel|>analysis<|message|>R<|end|><|start|>assistant"
    assert thought.format("⟦") in texts[0] and texts[0].endswith("<|call|>⟧")
    # The answer's prompt is that of generation, which sees the reasoning before the call.
    assert thought.format("") in texts[1]
    assert texts[1].endswith(
        '"sun"<|end|><|start|>assistant⟦<|channel|>analysis<|message|>S<|end|>'
        "<|start|>assistant<|channel|>final<|message|>b<|return|>⟧"
    )


@pytest.mark.parametrize(
    "parameters",
    [
        {"city": {"type": "str", "description": "C"}},
        {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": {}}}}},
    ],
)
def test_no_parameter_of_a_tool_is_lost(audit: Any, parameters: dict[str, Any]) -> None:
    row = {"messages": TURNS, "tools": [{**TOOL, "parameters": parameters}]}
    shallow = (
        "{% for t in tools or [] %}{{ t.function.name }} {{ t.function.description }}"
        "{% for name in t.function.parameters.properties %} {{ name }}{% endfor %}{% endfor %}"
    )
    _, error = audit([row], jinja=shallow + CHATML)
    assert "does not write a parameter of a tool" in str(error)
    [text], _ = audit([row], jinja="{{ tools | tojson }}" + CHATML)
    assert text.startswith("[{") and text.endswith("⟦b<|im_end|>⟧\n")


def test_a_name_that_is_not_written_is_counted(audit: Any) -> None:
    row = {"messages": [{**ASK, "name": "Alice"}, TURNS[1]]}
    _, figures = audit([row], jinja=CHATML)
    assert figures["unused_columns"] == {"messages.name": 1}
    [text], figures = audit(
        [row], jinja=CHATML.replace("{{ m.content }}", "{{ m.name }}: {{ m.content }}")
    )
    assert "Alice: a" in text and figures["unused_columns"] == {}
