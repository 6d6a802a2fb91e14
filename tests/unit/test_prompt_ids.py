"""What precedes an answer in training has the ids that Transformers gives the prompt of generation.

The tokenizers are trained here: SentencePiece's two ways of adding a space to the first word, which
Llama-2 and Mistral have, control tokens that take white space, as Phi-3's do, and byte-level BPE.
"""

import itertools
from typing import Any

import pytest
from made_tokenizers import BARE, MISTRAL, ZEPHYR, train_tokenizer

from sft.config.settings import TemplateConfig
from sft.data.row_encoder import IGNORE_INDEX, RowEncoder
from sft.data.rows import Row
from sft.data.template import Template

ANSWERS = ["the cat sat", "yes\nno", "\n\nwhy", " it was", "good </s> day <|user|>", "a\n"]


@pytest.mark.parametrize("template", [MISTRAL, ZEPHYR, BARE], ids=["mistral", "zephyr", "bare"])
@pytest.mark.parametrize("kind", ["bytes", "metaspace", "prepend", "rstrip"])
def test_prompts_of_all_turns(kind: str, template: str) -> None:
    tokenizer = train_tokenizer(kind, byte_fallback=kind != "bytes")
    config = TemplateConfig(kind="chat", chat_template=template)
    encoder = RowEncoder(Template(config, tokenizer))
    unrolled = 0
    for first, second, third in itertools.permutations(ANSWERS, 3):
        messages = [
            {"role": "user", "content": "how on mat"},
            {"role": "assistant", "content": first},
            {"role": "user", "content": "why"},
            {"role": "assistant", "content": second},
            {"role": "user", "content": "\nthe dog"},
            {"role": "assistant", "content": third},
        ]
        done = encoder([Row({"messages": messages}, "f", 1)])
        assert not done.bad, done.bad
        prompts = contexts_of(done)
        assert len(prompts) == 3
        unrolled += len(done.documents) > 1
        for index, prompt in zip((1, 3, 5), prompts, strict=True):
            ours = encoder.template.render_prompt({"messages": messages[:index]})
            assert encoder.encoder.prompt(ours, bos=False) == prompt
            if not any("<" in str(message["content"]) for message in messages[:index]):
                theirs: Any = tokenizer.apply_chat_template(
                    messages[:index], add_generation_prompt=True, return_dict=False
                )
                assert prompt == theirs, tokenizer.convert_ids_to_tokens(prompt)
    # Only a tokenizer that merges white space with an answer needs a sample for each turn.
    assert unrolled < 120


def contexts_of(done: Any) -> list[list[int]]:
    """Give the ids before each trained span."""
    found = []
    begin = 0
    for length in done.documents["length"].tolist():
        ids = done.ids[begin : begin + length].tolist()
        trained = (done.marks[begin : begin + length] & 1).tolist()
        places = range(1, length)
        found += [ids[:place] for place in places if trained[place] and not trained[place - 1]]
        begin += length
    assert IGNORE_INDEX == -100
    return found
