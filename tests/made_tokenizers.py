"""Tokenizers of each kind, made for tests: with the control tokens of a template, or trained."""

import functools
import itertools
import json
import re
from pathlib import Path

import trl
from support import TINY
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHAT_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
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


def with_tokens_of(source: str) -> PreTrainedTokenizerBase:
    """Give the embedded tokenizer the control tokens that a template's text writes."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TINY)
    found = re.findall(r"<[|\uff5c/a-zA-Z_][^<>\s{}'\"]{0,40}>|\[/?[A-Z_]{2,}\]", source)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(found))})
    tokenizer.bos_token, tokenizer.eos_token = "<BOS>", "<EOS>"
    return tokenizer


def train_tokenizer(kind: str, byte_fallback: bool = False) -> PreTrainedTokenizerFast:
    """Train a tokenizer of a kind.

    Args:
        kind: ``bytes`` (byte-level BPE), or one of SentencePiece's ways of adding a space:
            ``metaspace`` to the first word, ``prepend`` to each text between control tokens, and
            ``rstrip``, which also takes the white space after a control token.
        byte_fallback: Whether characters that are no tokens become bytes, as Llama's do, instead
            of unknown tokens.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(kind, byte_fallback)),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


@functools.cache
def _trained(kind: str, byte_fallback: bool) -> str:
    special = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet: list[str] = []
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "metaspace":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        made.decoder = decoders.Metaspace(prepend_scheme="first")
    else:
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        made.decoder = decoders.Replace("\u2581", " ")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    # SentencePiece writes a newline as a byte, which merges with nothing.
    lines = [line for text in TEXT for line in text.split("\n")] if byte_fallback else TEXT
    made.train_from_iterator(lines, trainer)
    if kind == "rstrip":
        made.add_special_tokens(
            [AddedToken(name, rstrip=True, special=True) for name in ("</s>", "<|assistant|>")]
        )
    state = json.loads(made.to_str())
    if byte_fallback:
        vocabulary = state["model"]["vocab"]
        state["model"]["byte_fallback"] = True
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        made = Tokenizer.from_str(json.dumps(state))
        made.decoder = decoders.Sequence(steps)
        return str(made.to_str())
    return json.dumps(state)
