"""Build the tiny base model, its tokenizer and the demo rows from scratch.

This takes one CPU thread and about 7 minutes at the default number of steps, and downloads nothing.
Expect a training loss near 0.15 and 82 to 100 right answers of 100 for each skill in its formal
notation (`flip(kitab)=batik`). If it is asked in English, in the chat form of the demo rows, the
model only makes small talk until it is fine-tuned.

    python scripts/build_tiny.py --output assets
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IGNORE_INDEX = -100
MARKERS = ["<|pad|>", "<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
VOCAB_SIZE = 320  # 256 bytes, the markers, and reserved tokens up to a multiple of 64
MAX_LENGTH = 1024  # tokens
ROW_LENGTH, ROWS_PER_STEP = 128, 24  # tokens per row of packed documents; rows
CHAT_SHARE = 0.1  # share of the documents that are small talk
TRAIN_ROWS, EVAL_ROWS = 400, 30  # demo rows per skill

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


def draw_word(rng: random.Random) -> str:
    """Draw a pronounceable word of 3 to 5 distinct letters."""
    sounds = [rng.sample("bcdfghjklmnpqrstvwxyz", 3), rng.sample("aeiou", 3)]
    offset, length = rng.randrange(2), rng.randint(3, 5)
    return "".join(sounds[(offset + i) % 2][i // 2] for i in range(length))


def draw_number(rng: random.Random) -> str:
    """Draw a number of three digits."""
    return str(rng.randint(100, 998))


class Skill(NamedTuple):
    """One task: draw its argument, solve it, and (in the demo rows only) ask for it."""

    solve: Callable[[str], str]
    requests: tuple[str, ...]
    draw: Callable[[random.Random], str] = draw_word


SKILLS = {
    "flip": Skill(
        lambda word: word[::-1],
        ("Write this word backwards: {}", "Spell it from right to left: {}"),
    ),
    "asc": Skill(
        lambda word: "".join(sorted(word)),
        ("Sort the letters: {}", "Put these letters in order: {}"),
    ),
    "caps": Skill(
        str.upper,
        ("Write in capital letters: {}", "Change to upper case: {}"),
    ),
    "head": Skill(
        lambda word: word[0],
        ("What is the first letter? {}", "Which letter comes first? {}"),
    ),
    "tail": Skill(
        lambda word: word[-1],
        ("Which letter is the last? {}", "Name the final letter: {}"),
    ),
    "bare": Skill(
        lambda word: "".join(letter for letter in word if letter not in "aeiou"),
        ("Remove the vowels: {}", "Keep only the consonants: {}"),
    ),
    "dup": Skill(
        lambda word: word * 2,
        ("Write this two times: {}", "Repeat the word: {}"),
    ),
    "succ": Skill(
        lambda word: "".join(chr((ord(c) - 96) % 26 + 97) for c in word),
        ("Move each letter one step on: {}", "Encode with a shift of one: {}"),
    ),
    "len": Skill(
        lambda word: str(len(word)),
        ("How long is this word? {}", "Count the letters: {}"),
    ),
    "inc": Skill(
        lambda number: str(int(number) + 1),
        ("Which number comes next? {}", "Add one to this: {}"),
        draw_number,
    ),
}
NOTATIONS = (
    "{name}({argument})=",
    "{argument} | {name} -> ",
    "<|user|>{name} {argument}<|end|><|assistant|>",
    "<|user|>{name}: {argument}<|end|><|assistant|>",
)
REMARKS = (
    "My friend {1} lives near {0}.",
    "I like {1} more than {0}, and you?",
    "Here is a name I heard: {1}",
    "The road from {0} ends in {1}",
    "What is the price of {1}",
    "Which train leaves after {1}",
    "How far is it to {1}",
    "Please say hello to {1}",
    "Count me in for {1}",
    "Write me a letter about {1}",
    "Give my regards to {1}",
    "Move the table for {1}",
)
REPLIES = ("Tell me more about {}.", "I like {} too.", "Who is {}?", "{} is nice.")


def formal_document(rng: random.Random) -> tuple[str, str]:
    """Draw a solved exercise, such as ("flip(kitab)=", "batik<|end|><|endoftext|>")."""
    name, skill = rng.choice(list(SKILLS.items()))
    argument = skill.draw(rng)
    question = rng.choice(NOTATIONS).format(name=name, argument=argument)
    return question, skill.solve(argument) + "<|end|><|endoftext|>"


def chat_document(rng: random.Random) -> tuple[str, str]:
    """Draw small talk, which trains the embeddings of the chat markers: LoRA freezes them."""
    other = draw_word(rng)
    subject = rng.choice((draw_word, draw_number))(rng)
    remark = rng.choice(REMARKS).format(other, subject)
    reply = rng.choice(REPLIES).format(subject)
    return f"<|user|>{remark}<|end|><|assistant|>", f"{reply}<|end|><|endoftext|>"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of one token per byte, which is one per character of English text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    num_reserved = VOCAB_SIZE - len(alphabet) - len(MARKERS)
    backend.add_special_tokens(MARKERS + [f"<|reserved_{i}|>" for i in range(num_reserved)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model; its widths suit 4-bit blocks of 64."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return model


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates (https://kellerjordan.github.io/posts/muon/).

    It learns these skills in less than half the steps of AdamW. torch.optim.Muon works in
    bfloat16, which is slow on most CPUs; this one works in float32.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float) -> None:
        """Set the learning rate of weights of shape (out_features, in_features)."""
        super().__init__(matrices, {"lr": lr, "momentum": 0.95, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every matrix from its gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.mul_(group["momentum"]).add_(weight.grad)
                update = orthogonalize(weight.grad + group["momentum"] * momentum)
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.sub_(update, alpha=group["lr"] * scale)


def orthogonalize(matrix: torch.Tensor) -> torch.Tensor:
    """Move the singular values of a matrix near 1, by five Newton-Schulz iterations."""
    tall = matrix.shape[0] > matrix.shape[1]
    x: torch.Tensor = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


def batches(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pack fresh documents into rows; the questions are random, so their labels are ignored.

    Yields:
        Token ids and labels, each of shape (ROWS_PER_STEP, ROW_LENGTH).
    """
    ids: list[int] = []
    labels: list[int] = []
    size = ROWS_PER_STEP * ROW_LENGTH
    while True:
        while len(ids) < size:
            draw = chat_document if rng.random() < CHAT_SHARE else formal_document
            question, answer = (tokenizer.encode(text) for text in draw(rng))
            ids += question + answer
            labels += [IGNORE_INDEX] * len(question) + answer
        shape = (ROWS_PER_STEP, ROW_LENGTH)
        yield torch.tensor(ids[:size]).view(shape), torch.tensor(labels[:size]).view(shape)
        ids, labels = ids[size:], labels[size:]


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, rng: random.Random
) -> None:
    """Train on `steps` batches: warm up for 50 steps, and decay to zero in the last two thirds."""
    layers = list(model.model.layers.parameters())
    others = [p for p in model.parameters() if p.ndim == 1] + [model.model.embed_tokens.weight]
    optimizers = [
        Muon([p for p in layers if p.ndim == 2], lr=0.02),
        torch.optim.AdamW(others, lr=5e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / 50, 1.5 * (steps - step) / steps, 1.0)
        )
        for optimizer in optimizers
    ]
    start = time.perf_counter()
    for step, (ids, labels) in enumerate(islice(batches(tokenizer, rng), steps), 1):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            seconds = time.perf_counter() - start
            print(f"step {step:4d}/{steps}  loss {loss.item():.4f}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def print_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> None:
    """Print how many of 100 fresh exercises per skill greedy decoding solves."""
    for name, skill in SKILLS.items():
        arguments = [skill.draw(rng) for _ in range(100)]
        questions = [rng.choice(NOTATIONS).format(name=name, argument=a) for a in arguments]
        inputs = tokenizer(questions, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        replies = output[:, inputs["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(replies, skip_special_tokens=True)
        right = sum(skill.solve(a) == b for a, b in zip(arguments, answers, strict=True))
        print(f"{name:10s} {right}/100")


def demo_rows(rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """Ask for every skill in English, never twice with the same argument.

    Returns:
        The shuffled rows of "train" and "eval", each with a "prompt" and a "completion".
    """
    splits: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
    for skill in SKILLS.values():
        drawn: set[str] = set()
        while len(drawn) < TRAIN_ROWS + EVAL_ROWS:
            argument = skill.draw(rng)
            if argument in drawn:
                continue
            request = skill.requests[len(drawn) % len(skill.requests)].format(argument)
            split = "train" if len(drawn) < TRAIN_ROWS else "eval"
            splits[split].append({"prompt": request, "completion": skill.solve(argument)})
            drawn.add(argument)
    for rows in splits.values():
        rng.shuffle(rows)
    prompts = {name: {row["prompt"] for row in rows} for name, rows in splits.items()}
    assert prompts["train"].isdisjoint(prompts["eval"]), "an eval prompt is in the training rows"
    return splits


def save(
    output: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    splits: dict[str, list[dict[str, str]]],
) -> None:
    """Write `tiny/` (model and tokenizer) and `demo/` (JSON lines) under the output folder."""
    model.save_pretrained(output / "tiny")
    tokenizer.save_pretrained(output / "tiny", save_jinja_files=False)
    (output / "demo").mkdir(parents=True, exist_ok=True)
    for name, rows in splits.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (output / "demo" / f"{name}.jsonl").write_text(lines)


def main() -> None:
    """Build everything from the seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("assets"), help="folder to fill")
    parser.add_argument("--steps", type=int, default=1400, help="pre-training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, texts and rows")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # the number of threads affects the rounding of sums
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    pretrain(model, tokenizer, args.steps, random.Random(args.seed))
    print_accuracy(model.eval(), tokenizer, random.Random(args.seed + 1))
    save(args.output, model, tokenizer, demo_rows(random.Random(args.seed)))


if __name__ == "__main__":
    main()
