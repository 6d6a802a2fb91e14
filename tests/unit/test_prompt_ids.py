"""What precedes an answer in training has the ids that Transformers gives the prompt of generation.

The tokenizers are trained here: SentencePiece's two ways of adding a space to the first word, which
Llama-2 and Mistral have, control tokens that take white space, as Phi-3's do, and byte-level BPE.
"""

import itertools
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from sft.config.settings import TemplateConfig
from sft.data.row_encoder import IGNORE_INDEX, RowEncoder
from sft.data.rows import Row
from sft.data.template import Template

WORDS = "the a cat dog sat on mat and ran to house in sun it was good day yes no why how"
TEXT = [" ".join(words) for words in itertools.permutations(WORDS.split()[:6])]
TEXT += [f"{word}, {word}.\n\n{word}\n{word}: {word}!" for word in WORDS.split() * 20]
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
BARE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer of a kind."""
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet: list[str] = []
    # SentencePiece writes a newline as a byte, which merges with nothing.
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind != "bytes"))
    if kind != "bytes":
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Metaspace(prepend_scheme="first")
    else:  # prepend: to each text between control tokens
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        made.decoder = decoders.Replace("\u2581", " ")
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special, initial_alphabet=alphabet)
    text = TEXT if kind == "bytes" else [line for text in TEXT for line in text.split("\n")]
    made.train_from_iterator(text, trainer)
    if kind == "rstrip":
        made.add_special_tokens(
            [AddedToken(name, rstrip=True, special=True) for name in ("</s>", "<|assistant|>")]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


ANSWERS = ["the cat sat", "yes\nno", "\n\nwhy", " it was", "good </s> day <|user|>", "a\n"]


@pytest.mark.parametrize("template", [MISTRAL, ZEPHYR, BARE], ids=["mistral", "zephyr", "bare"])
@pytest.mark.parametrize("kind", ["bytes", "metaspace", "prepend", "rstrip"])
def test_prompts_of_all_turns(kind: str, template: str) -> None:
    tokenizer = tokenizer_of(kind)
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
