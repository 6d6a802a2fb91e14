"""Every chat template that TRL ships: what it can train, and that this is trained exactly.

``WRITE_TEMPLATES=1`` writes docs/templates.md, the table that the tests hold.
"""

import functools
import itertools
import os
import re
from typing import Any

import pytest
from made_tokenizers import CHAT_TEMPLATES as FOLDER
from made_tokenizers import with_tokens_of
from support import ROOT
from transformers import PreTrainedTokenizerBase

from sft.config.settings import TemplateConfig
from sft.data.segment import Sample
from sft.data.template import Template
from sft.data.text_encoder import Encoder
from sft.errors import DataError

PAGE = ROOT / "docs" / "templates.md"
SYSTEM = {"role": "system", "content": "Sw1 s."}
USER, USER_2 = {"role": "user", "content": "Uw1 u?"}, {"role": "user", "content": "Uw2 u?"}
ANSWER = {"role": "assistant", "content": "Aw1 a."}
ANSWER_2 = {"role": "assistant", "content": "Aw2 a."}
TOOL = {
    "type": "function",
    "function": {
        "name": "Nw1",
        "description": "Dw1 d.",
        "parameters": {
            "type": "object",
            "properties": {"Pw1": {"type": "string", "description": "Ew1 e."}},
            "required": ["Pw1"],
        },
    },
}
FUNCTION = {"name": "Nw1", "arguments": {"Pw1": "Vw1 v"}}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "id": "Nw1call00", "function": FUNCTION}],
}
RESULT = {"role": "tool", "name": "Nw1", "tool_call_id": "Nw1call00", "content": "Rw1 r."}
THOUGHT = {**ANSWER, "reasoning_content": "Tw1 t."}
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "one turn": ([USER, ANSWER], None),
    "several": ([USER, ANSWER, USER_2, ANSWER_2], None),
    "system": ([SYSTEM, USER, ANSWER], None),
    "tools": ([USER, CALL, RESULT, ANSWER], [TOOL]),
    "reasoning": ([USER, THOUGHT], None),
    "assistant first": ([ANSWER, USER_2, ANSWER_2], None),
}
WORD = re.compile(r"\b[A-Z]w\d\b")
# Which of the words the model has to write, by case; all others are context.
TRAINED = {
    "one turn": {"Aw1"},
    "several": {"Aw1", "Aw2"},
    "system": {"Aw1"},
    "tools": {"Nw1", "Pw1", "Vw1", "Aw1"},
    "reasoning": {"Tw1", "Aw1"},
    "assistant first": {"Aw1", "Aw2"},
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja"))


@functools.cache
def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """Give the embedded tokenizer the control tokens that a template writes."""
    return with_tokens_of((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))


@functools.cache
def template_of(name: str) -> Template:
    config = TemplateConfig(kind="chat", chat_template=name, date="2026-01-02")
    return Template(config, tokenizer_of(name))


@functools.cache
def samples_of(name: str, case: str) -> list[Sample] | str:
    """Give a case's samples, or why the template cannot train it."""
    messages, tools = CASES[case]
    try:
        return template_of(name).render({"messages": messages, "tools": tools})
    except DataError as error:
        return str(error).splitlines()[0]


def verdict(name: str, case: str) -> str:
    """Give the cell of the table."""
    samples = samples_of(name, case)
    if isinstance(samples, str):
        return samples.removeprefix("the chat template ").partition(": ")[0]
    by_turn = "by turn" if len(samples) > 1 else "yes"
    return by_turn + "*" * any(sample.prompt_differs for sample in samples)


def test_table_in_the_docs() -> None:
    rows = []
    for name in NAMES:
        cells = [verdict(name, case) for case in CASES]
        notes = [cell for cell in cells if not cell.startswith(("yes", "by turn"))]
        short = ["no" if cell in notes else cell for cell in cells]
        template = template_of(name)
        stops = " ".join(
            f"`{token.replace('|', chr(92) + '|')}`"
            for token in template.tokenizer.convert_ids_to_tokens(template.stop_ids)
        )
        rows.append(f"| `{name}` | {' | '.join(short)} | {stops} |")
    head = "| `template.chat_template=` | " + " | ".join(CASES) + " | ends an answer |"
    table = "\n".join([head, "|---" * (len(CASES) + 2) + "|", *rows]) + "\n"
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- end of table -->\n")
    page = f"{before}<!-- table -->\n{table}<!-- end of table -->\n{after}"
    if os.environ.get("WRITE_TEMPLATES"):
        PAGE.write_text(page, encoding="utf-8")
    assert PAGE.read_text(encoding="utf-8") == page, "WRITE_TEMPLATES=1 writes docs/templates.md"
    assert len(NAMES) >= 72


@pytest.mark.parametrize("name", NAMES)
def test_what_a_template_can_render_is_trained_exactly(name: str) -> None:
    """One turn and several are trained with every template; the rest, or it is refused."""
    template = template_of(name)
    stops = {str(token) for token in template.tokenizer.convert_ids_to_tokens(template.stop_ids)}
    stop = re.compile("|".join(map(re.escape, stops)))
    for case, (messages, tools) in CASES.items():
        samples = samples_of(name, case)
        if isinstance(samples, str):
            assert case not in ("one turn", "several"), samples
            assert samples.startswith("the chat template "), samples
            continue
        words: set[str] = set()
        for sample in samples:
            text = "".join(segment.text for segment in sample)
            runs = [
                "".join(segment.text for segment in group)
                for trained, group in itertools.groupby(sample, key=lambda part: part.trained)
                if trained
            ]
            found = [set(WORD.findall(run)) for run in runs]
            assert all(found), (case, runs)
            words = words.union(*found)
            for run in runs:
                ends = [match.end() for match in stop.finditer(run)]
                # diffusion_gemma's own marks leave out the token that ends a call.
                if "call" not in run or "diffusion_gemma_training" not in name:
                    assert ends[:1] == [len(run)], (case, run)
            assert (
                len(runs) == len(set(re.findall(r"Aw\d", text))) + ("Vw1" in text)
                or len(samples) > 1
            )
            # Nothing but white space, or another EOS, follows the last answer.
            rest = text.rpartition(runs[-1])[2].replace("<EOS>", "")
            assert not rest.strip() or "diffusion_gemma_training" in name, (case, rest)
        assert words == TRAINED[case], case
        # The last sample is the text that Transformers renders, GLM's last token apart.
        text = "".join(segment.text for segment in samples[-1])
        shown = plain(template, messages, tools)
        assert text == shown or (text.startswith(shown) and text[len(shown) :] in stops), case


def plain(template: Template, messages: list[dict[str, Any]], tools: Any) -> str:
    """Render a conversation without our code, in the form that the template reads."""
    assert template.chat is not None
    given = template.chat.template
    compiled_date = given.rendered([USER], None, False)  # sets the date
    assert compiled_date.text
    kinds = {
        "text": messages,
        "parts": [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if m["content"] else m
            for m in messages
        ],
    }
    for form in kinds.values():
        try:
            text = template.tokenizer.apply_chat_template(form, tools=tools, tokenize=False)
        except Exception:
            continue
        if "Aw1" in text or "Aw2" in text:
            return str(text)
    raise AssertionError("Transformers cannot render what we can")


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_the_same_ids_in_training_and_generation(name: str) -> None:
    """Of every trained turn, what precedes it is what generation makes of its messages."""
    template = template_of(name)
    encoder = Encoder(template.tokenizer)
    for case, (messages, tools) in CASES.items():
        samples = samples_of(name, case)
        if isinstance(samples, str) or case == "assistant first":
            continue
        prompts = [
            encoder.prompt(
                template.render_prompt({"messages": messages[:index], "tools": tools}), bos=False
            )
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        contexts: list[list[int]] = []
        for sample, spans in zip(samples, encoder.samples(samples, False, None), strict=True):
            assert spans is not None
            if sample.prompt_differs:
                continue
            before: list[int] = []
            inside = False
            for ids, trained, _ in spans:
                if trained and not inside:
                    contexts.append(list(before))
                before, inside = before + ids, trained
        if not any(sample.prompt_differs for sample in samples):
            found = [context for context in contexts if context in prompts]
            # The marks of a template may begin behind the generation prompt.
            if "_training" not in name:
                assert contexts == prompts, case
            assert len(contexts) >= len(prompts) and (found or "_training" in name), case
