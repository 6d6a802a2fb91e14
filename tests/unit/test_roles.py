"""Messages whose keys and roles have other names: by the command, as if they had the usual ones."""

import json
from typing import Any

import pytest
from unit.test_checks import found
from unit.test_values import audit, refused  # noqa: F401

from sft.config.settings import DatasetConfig
from sft.data.audit import Counts, gate

SPOKEN = {
    "dialog": [
        {"speaker": "narrator", "text": "S"},
        {"speaker": "customer", "text": "one"},
        {"speaker": "agent", "text": "two"},
        {"speaker": "user", "text": "three"},
        {"speaker": "agent", "text": "four"},
    ]
}
NAMES = {
    "narrator": "system",
    "customer": "user",
    "agent": "assistant",
    "user": "user",
    "assistant": "assistant",
}
USUAL = {
    "messages": [
        {"role": NAMES[message["speaker"]], "content": message["text"]}
        for message in SPOKEN["dialog"]
    ]
}
ROLES = "dataset.roles={user: [customer], assistant: [agent], system: [narrator]}"
COLUMNS = "dataset.columns={messages: dialog, role: speaker, content: text}"
CHAT = "template=plain-chat"


def test_a_conversation_is_trained_as_with_the_usual_names(audit: Any) -> None:  # noqa: F811
    usual, _, _ = audit([USUAL], CHAT)
    assert usual[0].count("⟦") == 2
    texts, figures, _ = audit([SPOKEN], CHAT, COLUMNS, ROLES)
    assert texts == usual
    assert figures["unused_columns"] == {}
    assert figures["sources"]["data"]["roles"] == {"customer": 1, "agent": 2, "narrator": 1}
    # Both kinds of rows in one file: the built-in names stay.
    texts, figures, _ = audit([SPOKEN, USUAL], CHAT, COLUMNS, ROLES)
    assert texts == usual * 2
    # A table holds messages as JSON text.
    texts, _, _ = audit([{"dialog": json.dumps(SPOKEN["dialog"])}], CHAT, COLUMNS, ROLES)
    assert texts == usual
    # ShareGPT's column, whose names LLaMA-Factory's role_tag, content_tag and user_tag change.
    tags = "dataset.columns={role: speaker, content: text}"
    texts, _, _ = audit([{"conversations": SPOKEN["dialog"]}], CHAT, tags, ROLES)
    assert texts == usual


def test_prompt_completion_and_history_hold_messages_too(audit: Any) -> None:  # noqa: F811
    names = (CHAT, "dataset.columns={role: speaker, content: text}", ROLES)
    turns = SPOKEN["dialog"]
    texts, _, _ = audit([{"prompt": turns[:4], "completion": turns[4:]}], *names)
    expected, _, _ = audit(
        [{"prompt": USUAL["messages"][:4], "completion": USUAL["messages"][4:]}], CHAT
    )
    assert texts == expected
    rows = [{"history": turns[1:3], "prompt": "three", "completion": "four"}]
    usual = [{**rows[0], "history": USUAL["messages"][1:3]}]
    assert audit(rows, *names)[0] == audit(usual, CHAT)[0]


def test_a_call_and_its_result_have_names_too(audit: Any, tmp_path: Any) -> None:  # noqa: F811
    (tmp_path / "calls.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}{{ m.tool_calls | tojson }}"
        "{% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    call = json.dumps({"name": "f", "arguments": {"x": 1}})
    turns = [("human", "q"), ("function_call", call), ("observation", "7"), ("gpt", "a")]
    usual = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    named = {"human": "human", "function_call": "invokes", "observation": "env", "gpt": "gpt"}
    row = {"conversations": [{"from": named[role], "value": text} for role, text in turns]}
    roles = "dataset.roles={function_call: [invokes], tool: [env]}"
    chat = ("template=chat", "template.chat_template=calls.jinja")
    texts, figures, _ = audit([row], *chat, roles)
    assert texts == audit([usual], *chat)[0]
    assert len(texts) == 1 and "f" in texts[0]
    assert figures["sources"]["data"]["roles"] == {"invokes": 1, "env": 1}


def test_a_name_given_here_has_this_role_whatever_else_it_means(audit: Any) -> None:  # noqa: F811
    """To train what the human says."""
    swapped = {
        "messages": [
            {"role": {"user": "assistant", "assistant": "user"}[role], "content": text}
            for role, text in (("assistant", "hello"), ("user", "order"))
        ]
    }
    row = {
        "messages": [
            {"role": "assistant", "content": "hello"},
            {"role": "user", "content": "order"},
        ]
    }
    texts, _, _ = audit([row], CHAT, "dataset.roles={user: [assistant], assistant: [user]}")
    assert texts == audit([swapped], CHAT)[0]
    assert "⟦ order" in texts[0]


def test_each_source_of_a_mix_has_its_own_names(audit: Any, tmp_path: Any) -> None:  # noqa: F811
    usual, _, _ = audit([USUAL], CHAT)
    (tmp_path / "a.jsonl").write_text(json.dumps(SPOKEN) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(USUAL) + "\n")
    columns = "columns: {messages: dialog, role: speaker, content: text}"
    roles = "roles: {user: [customer], assistant: [agent], system: [narrator]}"
    mix = f"dataset.mix={{a: {{path: a.jsonl, {columns}, {roles}}}, b: {{path: b.jsonl}}}}"
    texts, figures, _ = audit([], CHAT, "dataset.path=null", mix)
    assert sorted(texts) == usual * 2
    assert "roles" not in figures["sources"]["b"]


def test_speakers_may_be_numbers(audit: Any) -> None:  # noqa: F811
    turns = [{"speaker": number % 2, "content": f"t{number}"} for number in range(4)]
    usual = [{"role": ("user", "assistant")[t["speaker"]], "content": t["content"]} for t in turns]
    roles = "dataset.roles={user: ['0'], assistant: ['1']}"
    texts, figures, _ = audit([{"messages": turns}], CHAT, "dataset.columns={role: speaker}", roles)
    assert texts == audit([{"messages": usual}], CHAT)[0]
    assert figures["sources"]["data"]["roles"] == {"0": 2, "1": 2}


def test_a_column_stays_one_where_no_message_has_the_key(audit: Any) -> None:  # noqa: F811
    row = {"prompt": "p", "body": "c"}
    template = ("template=completion", "template.completions=['{content}']")
    texts, _, _ = audit([row], *template, "dataset.columns={content: body}")
    assert texts == ["p\n⟦c<|end|>⟧"]
    # Both names are filled: the named one is read, and the other is listed.
    both = {"messages": [{"role": "user", "content": "old", "text": "q"}, USUAL["messages"][2]]}
    texts, figures, _ = audit([both], CHAT, "dataset.columns={content: text}")
    assert "q" in texts[0] and "old" not in texts[0]
    assert figures["unused_columns"] == {"messages.content, replaced by text": 1}


def test_names_that_do_not_occur_are_said(
    audit: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = ROLES.replace("[agent]", "[agent, clerk, seller]")
    _, figures, _ = audit([SPOKEN], CHAT, COLUMNS, more)
    counts = {"customer": 1, "agent": 2, "clerk": 0, "seller": 0, "narrator": 1}
    assert figures["sources"]["data"]["roles"] == counts
    others = {"roles": {"clerk": 2}}  # of a different source
    for sources, said in (({}, "clerk or seller"), ({"b": others}, "seller")):
        parts = {"train": Counts(rows=1, sources={**figures["sources"], **sources})}
        warnings = gate(parts, DatasetConfig(), "")
        assert warnings == [f"dataset.roles: no message has the role {said}"]
    message = refused(audit, capsys, [USUAL], CHAT, "dataset.columns={role: speaker}")
    assert "has no column speaker, and no message with such a key; it has messages" in message
    message = refused(audit, capsys, [SPOKEN], CHAT, "dataset.columns={messages: dialog}")
    assert "message 1 has no role; its keys are speaker, text" in message
    assert "fix: dataset.columns.role=KEY and dataset.columns.content=KEY" in message
    message = refused(audit, capsys, [SPOKEN], CHAT, COLUMNS)
    assert "has the role 'narrator'; the known roles are human" in message
    assert "fix: dataset.roles.user=[narrator], or assistant, system or tool in place" in message


def test_names_that_cannot_be_are_refused() -> None:
    known = "the roles are user, assistant, system, tool, function_call"
    for roles, problem in (
        ({"asistant": ["agent"]}, (".asistant=['agent']", known, "did you mean assistant?")),
        (
            {"user": ["a", "b"], "tool": ["b"]},
            (".tool=['b']", "gives b to two roles: user and tool", "leave it out of one of them"),
        ),
        ({"user": "a"}, (".user=a", "must be a list of names", "KEY.user=[a]")),
        ({"user": [1]}, (".user=[1]", "must be a list of names", "KEY.user=[NAME]")),
        ({"user": [""]}, (".user=['']", "must be a list of names", "KEY.user=[NAME]")),
    ):
        for key, settings in (
            ("dataset.roles", {"dataset__roles": roles}),
            (
                "dataset.mix.a.roles",
                {"dataset__path": None, "dataset__mix": {"a": {"path": "x", "roles": roles}}},
            ),
        ):
            setting, rule, fix = problem
            assert found(**settings) == [(key + setting, rule, fix.replace("KEY", key))]
    mix = {"dataset__path": None, "dataset__mix": {"a": {"path": "x", "roles": ["a"]}}}
    assert found(**mix)[0][1] == "must be a mapping of roles to names"


def test_the_flags_of_a_prompt_train_nothing(audit: Any) -> None:  # noqa: F811
    turns = USUAL["messages"]
    plain, _, _ = audit([{"prompt": turns[:4], "completion": "four"}], CHAT)
    assert plain[0].count("⟦") == 1
    for flag in ({"weight": 1}, {"train": True}, {"weight": 0.5, "loss": 0}):
        flagged = [{**turn, **flag} for turn in turns[:4]]
        texts, figures, _ = audit([{"prompt": flagged, "completion": "four"}], CHAT)
        assert texts == plain and figures["unused_columns"] == {}
