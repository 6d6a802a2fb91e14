"""A training loop written by hand for this one task: the practical limit in ``step.py``.

It uses no trainer and no adapter library, and has no settings: documents joined into one row,
causal attention per document, the head over trained positions only, AdamW on LoRA's matrices. If
the CPU has no bf16, it uses sft's bf16 products, because PyTorch's would make the limit too slow.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

from sft.fast import cpu_products

RANK, ALPHA = 8, 16


class LoRA(torch.nn.Module):
    """A frozen linear layer plus (alpha / rank) B A."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        where = {"device": linear.weight.device, "dtype": torch.float32}
        self.a = torch.nn.Parameter(torch.randn(RANK, linear.in_features, **where) * 0.02)
        self.b = torch.nn.Parameter(torch.zeros(linear.out_features, RANK, **where))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = F.linear(x, self.a.to(x.dtype))
        return self.linear(x) + F.linear(low, self.b.to(x.dtype) * (ALPHA / RANK))


def attention(
    module: Any, q: Any, k: Any, v: Any, mask: Any, *, bounds: Any, scaling: Any, **_: Any
) -> Any:
    """Attend causally within each document of the row."""
    shared = q.shape[1] != k.shape[1]
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        places, longest = bounds
        q, k, v = (x.transpose(1, 2)[0] for x in (q, k, v))
        window = {"scale": scaling, "window_size": (-1, 0), "enable_gqa": shared}
        return varlen_attn(q, k, v, places, places, longest, longest, **window)[None], None
    parts = [
        F.scaled_dot_product_attention(
            *(x[:, :, begin:end] for x in (q, k, v)),
            is_causal=True,
            scale=scaling,
            enable_gqa=shared,
        )
        for begin, end in itertools.pairwise(bounds)
    ]
    return torch.cat(parts, 2).transpose(1, 2), None


def batches(given: argparse.Namespace, longest: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield all rows, ``--micro`` at a time and joined; the prompts' labels are -100."""
    tokenizer = AutoTokenizer.from_pretrained(given.folder)
    rows = [json.loads(line) for line in open(given.rows)]
    for begin in range(0, len(rows), given.micro):
        ids, labels, places = [], [], []
        for row in rows[begin : begin + given.micro]:
            prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
            answer = tokenizer(row["completion"], add_special_tokens=False).input_ids
            text = (prompt + answer + [tokenizer.eos_token_id])[:longest]
            ids += text
            labels += ([-100] * len(prompt) + text[len(prompt) :])[: len(text)]
            labels[-len(text)] = -100
            places.append(range(len(text)))
        yield {
            "input_ids": torch.tensor([ids]),
            "labels": torch.tensor(labels),
            "position_ids": torch.tensor([list(itertools.chain(*places))]),
            "lengths": torch.tensor([len(place) for place in places]),
        }


def train(given: argparse.Namespace, meter: Any, longest: int) -> None:
    """Train the steps."""
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    cpu_products.widen_products(dtype)
    AttentionInterface.register("by_hand", attention)
    model = AutoModelForCausalLM.from_pretrained(given.folder, dtype=dtype)
    model.to(given.device).train().set_attn_implementation("by_hand")
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    for name, linear in linears:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LoRA(linear))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    pad = AutoTokenizer.from_pretrained(given.folder).pad_token_id
    loss = torch.zeros(())
    for _ in range(meter.warmup + 1):
        meter.begin_epoch()
        for batch in batches(given, longest):
            meter.see(batch, pad)
            places = torch.nn.functional.pad(batch["lengths"].cumsum(0), (1, 0)).int()
            bounds: Any = places.tolist()
            if given.device == "cuda":
                bounds = (places.cuda(), int(batch["lengths"].max()))
            labels = batch["labels"].to(given.device)
            ids, positions = (batch[key].to(given.device) for key in ("input_ids", "position_ids"))
            states = model.base_model(ids, position_ids=positions, bounds=bounds, use_cache=False)
            counted = labels[1:] != -100
            logits = head(states.last_hidden_state[0, :-1][counted]).float()
            loss = F.cross_entropy(logits, labels[1:][counted])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        meter.end_epoch()
    assert float(loss.detach()) < 20, "it does not train"
