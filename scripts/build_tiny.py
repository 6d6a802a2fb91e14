"""Build the tiny base model and its demo data from nothing, in about N minutes on two cores."""

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

IGNORE_INDEX = -100
VOCAB_SIZE = 320  # 256 bytes + the markers + reserved tokens up to a multiple of 64
MARKERS = ["<|pad|>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CONTEXT = 128  # tokens per pre-training row
BATCH = 32  # rows per step
LEARNING_RATE = 3e-3
TRAIN_ROWS, EVAL_ROWS = 250, 25  # per skill

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message['content'] + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


class Skill(NamedTuple):
    """One task: how to draw its arguments, solve it, and ask for it in English."""

    draw: Callable[[random.Random], tuple[str, ...]]
    solve: Callable[..., str]
    requests: list[str]


def word(rng: random.Random, consonants: str = "bcdfghjklmnpqrstvwxyz", vowels: str = "aeiou") -> str:
    """Draw a pronounceable word of 3 to 6 letters."""
    offset, length = rng.randrange(2), rng.randint(3, 6)
    return "".join(rng.choice((consonants, vowels)[(offset + i) % 2]) for i in range(length))


def one_word(rng: random.Random) -> tuple[str, ...]:
    """Draw the argument of a skill that takes one word."""
    return (word(rng),)


def letter_and_word(rng: random.Random) -> tuple[str, ...]:
    """Draw a word with few distinct letters, and one of the letters it may hold."""
    consonants, vowels = "".join(rng.sample("bdgklmnprst", 2)), "".join(rng.sample("aeiou", 2))
    return rng.choice(consonants + vowels), word(rng, consonants, vowels)


def numbers(count: int) -> Callable[[random.Random], tuple[str, ...]]:
    """Return a drawer of `count` distinct two-digit numbers."""
    return lambda rng: tuple(str(n) for n in rng.sample(range(10, 100), count))


SKILLS = {
    "reverse": Skill(
        one_word,
        lambda w: w[::-1],
        [
            "Write the word {0} backwards.",
            "Reverse {0}.",
            "Spell {0} from right to left.",
            "What is {0} read backwards?",
        ],
    ),
    "sort": Skill(
        one_word,
        lambda w: "".join(sorted(w)),
        [
            "Sort the letters of {0}.",
            "Put the letters of {0} in alphabetical order.",
            "Arrange {0} alphabetically, letter by letter.",
            "Which word do the sorted letters of {0} make?",
        ],
    ),
    "upper": Skill(
        one_word,
        str.upper,
        [
            "Write {0} in capital letters.",
            "Make {0} upper case.",
            "Please shout the word {0}.",
            "How does {0} look in capitals?",
        ],
    ),
    "last": Skill(
        one_word,
        lambda w: w[-1],
        [
            "What is the last letter of {0}?",
            "Which letter does {0} end with?",
            "Name the final letter of {0}.",
            "Give me only the end of {0}, one letter.",
        ],
    ),
    "consonants": Skill(
        one_word,
        lambda w: "".join(c for c in w if c not in "aeiou"),
        [
            "Remove the vowels from {0}.",
            "Write {0} without its vowels.",
            "What is left of {0} once every vowel is gone?",
            "Keep only the consonants of {0}.",
        ],
    ),
    "twice": Skill(
        one_word,
        lambda w: w + w,
        [
            "Write {0} twice without a space.",
            "Repeat {0} two times in a row.",
            "Double the word {0}.",
            "Say {0} and then say it again, joined.",
        ],
    ),
    "shift": Skill(
        one_word,
        lambda w: "".join(chr((ord(c) - 96) % 26 + 97) for c in w),
        [
            "Replace each letter of {0} by the next one in the alphabet.",
            "Move every letter of {0} one step forward.",
            "Encode {0} with a shift of one.",
            "What does {0} become when a turns to b, b to c and so on?",
        ],
    ),
    "count": Skill(
        letter_and_word,
        lambda letter, w: str(w.count(letter)),
        [
            "How many times does {0} appear in {1}?",
            "Count the letter {0} in {1}.",
            "How often do you see {0} in the word {1}?",
            "In {1}, how many letters are {0}?",
        ],
    ),
    "add": Skill(
        numbers(2),
        lambda a, b: str(int(a) + int(b)),
        [
            "What is {0} plus {1}?",
            "Add {0} and {1}.",
            "I have {0} apples and get {1} more. How many is that?",
            "Give the sum of {0} and {1}.",
        ],
    ),
    "largest": Skill(
        numbers(3),
        lambda *n: max(n),
        [
            "Which is the largest of {0}, {1} and {2}?",
            "Find the biggest number: {0}, {1}, {2}.",
            "Of {0}, {1} and {2}, which one is greatest?",
            "Tell me the maximum of {0}, {1} and {2}.",
        ],
    ),
}

NOTATIONS = ["{name}({args})=", "{args} | {name} -> ", "{name} {args}: "]


def formal_document(rng: random.Random) -> tuple[str, str]:
    """Draw one solved exercise, such as ("reverse(kitab)=", "batik<|endoftext|>")."""
    name, skill = rng.choice(list(SKILLS.items()))
    arguments = skill.draw(rng)
    question = rng.choice(NOTATIONS).format(name=name, args=",".join(arguments))
    return question, skill.solve(*arguments) + "<|endoftext|>"


def chat_document(rng: random.Random) -> tuple[str, str]:
    """Draw small talk, so that the chat markers mean something before any fine-tuning."""
    subject, other, number = word(rng), word(rng), rng.randint(10, 99)
    said = rng.choice(
        [
            f"My friend {subject} lives near {other}.",
            f"Do you know {subject}?",
            f"We saw {number} birds on the way to {subject}.",
            f"I like {subject} more than {other}, and you?",
            f"The train to {subject} leaves at {number}.",
        ]
    )
    reply = rng.choice(["Tell me more about {}.", "I like {} too.", "Who is {}?", "{} is nice."])
    return f"<|user|>{said}<|end|><|assistant|>", reply.format(subject) + "<|end|><|endoftext|>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer with one token per byte, hence one per character of English text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    num_reserved = VOCAB_SIZE - len(alphabet) - len(MARKERS)
    backend.add_special_tokens(MARKERS + [f"<|reserved_{i}|>" for i in range(num_reserved)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pack documents into rows and hide what cannot be predicted, the random questions.

    Yields:
        Token ids and labels, each of shape (BATCH, CONTEXT).
    """
    ids: list[int] = []
    labels: list[int] = []
    while True:
        while len(ids) < BATCH * CONTEXT:
            document = chat_document if rng.random() < 0.1 else formal_document
            question, answer = tokenizer(list(document(rng)))["input_ids"]
            ids += question + answer
            labels += [IGNORE_INDEX] * len(question) + answer
        size = BATCH * CONTEXT
        yield (
            torch.tensor(ids[:size]).view(BATCH, CONTEXT),
            torch.tensor(labels[:size]).view(BATCH, CONTEXT),
        )
        ids, labels = ids[size:], labels[size:]


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int
) -> None:
    """Train on freshly drawn documents, with a warm-up and a linear decay to zero."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, (steps - step) / max(1, steps - 100), 1.0)
    )
    start = time.perf_counter()
    for step, (ids, labels) in enumerate(islice(batches(tokenizer, random.Random(seed)), steps), 1):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps:
            print(f"step {step:4d}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - start:.0f} s",flush=True)


def demo_rows(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    rng = random.Random(seed)
    train, evaluation = [], []
    for skill in SKILLS.values():
        seen: set[frozenset[str]] = set()
        while len(seen) < TRAIN_ROWS + EVAL_ROWS:
            arguments = skill.draw(rng)
            key = frozenset(a for a in arguments if len(a) > 1)
            if key in seen:
                continue
            rows = train if len(seen) < TRAIN_ROWS else evaluation
            request = skill.requests[len(seen) % len(skill.requests)]
            rows.append(
                {"prompt": request.format(*arguments), "completion": skill.solve(*arguments)}
            )
            seen.add(key)
    rng.shuffle(train)
    rng.shuffle(evaluation)
    return train, evaluation


@torch.no_grad()
def skill_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    rng = random.Random("check")
    tokenizer.padding_side = "left"
    out = {}
    for name, skill in SKILLS.items():
        q, a = [], []
        for i in range(100):
            args = skill.draw(rng)
            q.append(NOTATIONS[i % 3].format(name=name, args=",".join(args)))
            a.append(skill.solve(*args))
        enc = tokenizer(q, return_tensors="pt", padding=True)
        gen = model.generate(input_ids=enc["input_ids"], attention_mask=enc["attention_mask"], max_new_tokens=16, do_sample=False, eos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"))
        got = tokenizer.batch_decode(gen[:, enc["input_ids"].shape[1]:], skip_special_tokens=True)
        out[name] = sum(x == y for x, y in zip(got, a)) / 100
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("assets"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    pretrain(model, tokenizer, args.steps, args.seed)
    print(skill_accuracy(model.eval(), tokenizer))
    tok_dir = args.output / "tiny"
    tokenizer.padding_side = "right"
    model.save_pretrained(tok_dir)
    tokenizer.save_pretrained(tok_dir, save_jinja_files=False)
    (args.output / "demo").mkdir(parents=True, exist_ok=True)
    train, evaluation = demo_rows(args.seed)
    for name, rows in (("train", train), ("eval", evaluation)):
        (args.output / "demo" / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )


if __name__ == "__main__":
    main()
