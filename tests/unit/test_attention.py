"""Packed documents are trained exactly as they would be alone."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import build_model
from transformers import AutoModelForCausalLM

from sft.data.collator import Collator
from sft.errors import ConfigError, ModelError
from sft.fast import attention, isolation
from sft.fast.probe import Probe
from sft.plan import kernel as kernels

LENGTHS = [[9, 4, 1, 7], [5, 12]]
# Family, what is changed of it, and the kernels that are allowed with packing on a CPU.
CASES = [
    ("opt", {}, ("packed",)),
    ("llama", {}, ("packed", "sdpa", "eager")),
    ("gpt_neox", {}, ("packed", "sdpa", "eager")),
    ("qwen3", {}, ("packed", "sdpa", "eager")),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
        ("packed",),
    ),
    ("gpt2", {}, ("packed", "sdpa")),
    ("gptj", {}, ("eager",)),
]


def model_of(tmp_path: Path, family: str, changed: dict[str, Any], kernel: str | None) -> Any:
    folder = build_model(tmp_path / family, family, tied=False, **changed)
    attention.register()
    options = {} if kernel is None else {"attn_implementation": kernel}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def probe_of(model: Any, collator: Collator, **changed: Any) -> Probe:
    return Probe(model, collator, torch.device("cpu"), 256, **changed)


def samples(seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for lengths in LENGTHS:
        ids = torch.randint(0, 256, (sum(lengths),), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": list(ids), "seq_lengths": lengths})
    return made


def documents(packs: list[dict[str, Any]]) -> list[list[int]]:
    found = []
    for pack in packs:
        start = 0
        for length in pack["seq_lengths"]:
            found.append(pack["input_ids"][start : start + length])
            start += length
    return found


def loss_and_gradients(
    model: Any, batches: list[dict[str, Any]]
) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    total = 0.0
    for batch in batches:
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
        loss.backward()
        total += loss.item()
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("family", "changed", "kernels"), CASES, ids=lambda v: str(v)[:20])
def test_a_pack_is_the_same_as_its_documents(
    tmp_path: Path, family: str, changed: dict[str, Any], kernels: tuple[str, ...]
) -> None:
    packs = samples()
    alone = model_of(tmp_path, family, changed, None)
    one_by_one = [Collator(0)([{"input_ids": ids, "labels": ids}]) for ids in documents(packs)]
    expected, gradients = loss_and_gradients(alone, one_by_one)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    for kernel in kernels:
        model = model_of(tmp_path, family, changed, kernel)
        ours = kernel == attention.NAME
        for padding_free in (False, True):
            collate = Collator(0, padding_free, pad_to_multiple_of=8, documents=ours)
            loss, found = loss_and_gradients(model, [collate(packs)])
            assert loss == pytest.approx(expected, rel=2e-6), kernel
            for a, b in zip(gradients, found, strict=True):
                torch.testing.assert_close(b, a, rtol=1e-4, atol=largest * 1e-6)
            # One document changes; every other one's logits stay, to the last bit.
            collate = Collator(0, padding_free, documents=ours)
            changed_packs = samples()
            changed_packs[0]["input_ids"][10] ^= 1  # in the second document of the first pack
            with torch.no_grad():
                batches = [collate(packs), collate(changed_packs)]
                for batch in batches:
                    batch.pop("labels")
                before, after = (model(**b, use_cache=False).logits for b in batches)
            same = torch.ones(before.shape[:2], dtype=torch.bool)
            same[0, 9:13] = False
            assert torch.equal(before[same], after[same]), kernel
            assert not torch.equal(before[~same], after[~same])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_opt_leaks_with_stock_kernels_and_is_refused(tmp_path: Path, kernel: str) -> None:
    model = model_of(tmp_path, "opt", {}, kernel)
    with pytest.raises(
        ModelError, match=rf"attn_implementation={kernel}, documents .* attend to each"
    ):
        isolation.require_isolation(probe_of(model, Collator(0)))
    with pytest.raises(ConfigError, match=rf"attn_implementation={kernel}\n.*in opt\n.*=packed"):
        kernels.resolve(model, kernel, several=True)
    assert kernels.resolve(model, kernel, several=False) == kernel
    with pytest.raises(ConfigError, match=r"attn_implementation=null\n"):
        kernels.resolve(model, None, several=True)
    assert kernels.resolve(model, "auto", several=True) == "packed"
    assert kernels.resolve(model, "auto", several=False) is None


def test_proof_holds_with_our_kernel_and_restores_the_mode(tmp_path: Path) -> None:
    model = model_of(tmp_path, "opt", {}, "packed").train()
    isolation.require_isolation(probe_of(model, Collator(0, documents=True)))
    assert model.training


def test_kernels_that_cannot_be(tmp_path: Path) -> None:
    gptj = model_of(tmp_path, "gptj", {}, None)
    assert kernels.resolve(gptj, "auto", several=True) is None
    assert kernels.unjoinable(gptj, "auto", "fp32").startswith("gptj has its own attention")
    assert kernels.unjoinable(gptj, "flash_attention_2", "bf16") == ""
    llama = model_of(tmp_path, "llama", {}, None)
    assert kernels.unjoinable(llama, "auto", "fp32") == ""
    assert kernels.unjoinable(llama, "sdpa", "fp32").startswith("model.attn_implementation=sdpa")
    assert kernels.unjoinable(llama, None, "fp32").startswith("model.attn_implementation=null")
    llama.config.attn_logit_softcapping = 50.0  # as Gemma 2's
    assert kernels.unjoinable(llama, "auto", "fp32").startswith("llama has its own attention")
    with pytest.raises(ConfigError, match="gptj has its own attention"):
        kernels.resolve(gptj, "packed", several=False)
    q = torch.zeros(1, 1, 2, 8)
    with pytest.raises(ModelError, match="has no softcap"):
        attention.packed_attention(torch.nn.Identity(), q, q, q, None, softcap=30.0)


def test_generation_with_our_kernel_is_sdpas(tmp_path: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8], [0, 9, 10, 11]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    for family in ("opt", "llama"):
        texts = []
        for kernel in ("sdpa", "packed"):
            model = model_of(tmp_path, family, {}, kernel)
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
            texts.append(model.generate(ids, attention_mask=mask, **options))
        assert torch.equal(*texts)


def plain_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    max_q: int,
    scale: float | None,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """Compute in float32 what the CUDA kernel does: each document, causal, in a window."""
    assert window_size[1] == 0
    parts = []
    for begin, end in itertools.pairwise(cu_seq_q.tolist()):
        assert 0 < end - begin <= max_q
        place = torch.arange(end - begin)
        distance = place[:, None] - place[None, :]
        sees = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] == -1))
        q, k, v = (x[begin:end].transpose(0, 1) for x in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, sees, scale=scale).transpose(0, 1))
    return torch.cat(parts)


def as_in_2_11(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> torch.Tensor:
    assert query.shape[1] == key.shape[1] == value.shape[1]
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
    return plain_varlen(query, key, value, cu_seq_q, max_q, scale, window_size)


def as_in_2_13(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Any = None,
    block_table: Any = None,
    num_splits: int | None = None,
) -> torch.Tensor:
    assert num_splits == 1  # else the longest document would decide the rounding
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k
    if enable_gqa:
        times = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    return plain_varlen(query, key, value, cu_seq_q, max_q, scale, window_size)


@pytest.mark.parametrize("stand_in", [as_in_2_11, as_in_2_13])
@pytest.mark.parametrize("family", ["llama", "opt", "qwen3"])
def test_variable_lengths_with_the_arguments_that_pytorch_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Any, family: str
) -> None:
    """Shared heads (Llama), none (OPT), and a window (Qwen3), beside documents one by one."""
    from torch.nn.attention import varlen

    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    changed = window if family == "qwen3" else {}
    packs = samples()
    alone = model_of(tmp_path, family, changed, None)
    one_by_one = [Collator(0)([{"input_ids": ids, "labels": ids}]) for ids in documents(packs)]
    expected, gradients = loss_and_gradients(alone, one_by_one)
    largest = max(float(gradient.abs().max()) for gradient in gradients)
    calls = []

    @functools.wraps(stand_in)
    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(stand_in)
        return stand_in(*args, **kwargs)

    monkeypatch.setattr(varlen, "varlen_attn", counted)
    monkeypatch.setattr(attention, "_has_varlen", lambda query, value: True)
    model = model_of(tmp_path, family, changed, "packed")
    batch = Collator(0, padding_free=True, documents=True)(packs)
    loss, found = loss_and_gradients(model, [batch])
    assert len(calls) == 2  # layers
    assert loss == pytest.approx(expected, rel=2e-6)
    for a, b in zip(gradients, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=largest * 1e-6)
