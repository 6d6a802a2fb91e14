"""Stages of ``gpu.py``: the fast implementations compute the same as the plain ones.

Each stage computes a reference in float32 and two results in 16 bits (on a CPU: float64 and
float32). The error of the fast result may be at most twice that of the model's own plain
computation, which rounding explains on any hardware. Errors are relative, in the Euclidean norm.
"""

from pathlib import Path
from typing import Any

from gpu_parts import TINY, WORK, Clock, batch, clean, device, has_gpu, is_tiny, needs_gpu, train

SHARED: dict[str, Any] = {"intermediate_size": 1024, "num_key_value_heads": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHARED,
    "opt": {"ffn_dim": 1024, "word_embed_proj_dim": 512, "dropout": 0.0},
    "qwen3": {**SHARED, "head_dim": 64},
    "mistral": {**SHARED, "sliding_window": 64},
    "gemma3_text": {
        **SHARED,
        "head_dim": 256,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
DOCUMENTS = [37, 300, 5, 129, 1, 64, 200]  # tokens; some are beyond the window of 64
VOCABULARY = 1024
TIMES_WORSE = 2


def precisions() -> tuple[Any, Any]:
    """Return the precision of a training step, and that of the reference."""
    import torch

    return (torch.bfloat16, torch.float32) if has_gpu() else (torch.float32, torch.float64)


def models(family: str, kernel: str) -> tuple[Any, Any]:
    """Make a model twice: the reference (sdpa, full precision), and one with a kernel."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    width = 64 if is_tiny() else 512
    fields = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 8}
    fields |= {"vocab_size": VOCABULARY, "max_position_embeddings": 1024, "pad_token_id": None}
    fields |= {"initializer_range": 0.1, **FAMILIES[family]}
    if family == "opt":
        fields["word_embed_proj_dim"] = width
    if is_tiny():
        small = {"sliding_window": 16, "head_dim": 16, "intermediate_size": 128, "ffn_dim": 128}
        fields |= {name: value for name, value in small.items() if name in fields}
    made = []
    coarse, fine = precisions()
    torch.manual_seed(0)
    for dtype, used in ((fine, "sdpa"), (coarse, kernel)):
        config = AutoConfig.for_model(family, **fields)
        with torch.device(device()):
            made.append(
                AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=used)
            )
    made[1].load_state_dict(made[0].state_dict())
    made[0].load_state_dict(made[1].state_dict())  # the same numbers, rounded
    return made[0].train(), made[1].train()


def documents(changed: bool = False) -> list[Any]:
    """Return the token ids of the documents; with ``changed``, the second has different ones."""
    import torch

    draw = torch.Generator().manual_seed(1)
    sizes = [-(-size // 4) for size in DOCUMENTS] if is_tiny() else DOCUMENTS
    made = [torch.randint(VOCABULARY, (size,), generator=draw) for size in sizes]
    if changed:
        made[1] = (made[1] + 1) % VOCABULARY
    return [ids.to(device()) for ids in made]


def gradients(model: Any) -> Any:
    """Return all gradients as one vector, and reset them."""
    import torch

    found = [p.grad.flatten().double() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return torch.cat(found)


def scored(logits: list[Any], texts: list[Any]) -> Any:
    """Return the log-probabilities of each document's tokens except the first."""
    import torch

    upcast = [one.double() if one.dtype == torch.float64 else one.float() for one in logits]
    return torch.cat(
        [
            each[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            for each, ids in zip(upcast, texts, strict=True)
        ]
    )


def one_by_one(model: Any, texts: list[Any]) -> list[Any]:
    """Return the logits of documents, each computed in a separate batch."""
    return [model(input_ids=ids[None], use_cache=False).logits[0] for ids in texts]


def in_a_row(model: Any, texts: list[Any]) -> list[Any]:
    """Return the logits of documents that are joined into a row as training does it."""
    import torch

    from sft.data.collator import Collator

    collator = Collator(0, padding_free=True, documents=True)
    row = collator([{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in texts])
    del row["labels"]
    inputs = {k: v.to(device()) if isinstance(v, torch.Tensor) else v for k, v in row.items()}
    return list(model(**inputs, use_cache=False).logits[0].split([len(ids) for ids in texts]))


def apart(found: Any, reference: Any) -> float:
    return float((found.double() - reference.double()).norm() / reference.double().norm())


def verdict(found: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Compare our errors with the plain way's, by the name of the quantity."""
    row: dict[str, Any] = {}
    wrong = []
    for name, (ours, plain) in found.items():
        row |= {f"{name}_error": ours, f"{name}_error_plain": plain}
        if not ours <= TIMES_WORSE * plain:
            wrong.append(
                f"{name}: error {ours:.3g}, over {TIMES_WORSE} times the plain {plain:.3g}"
            )
    return {**row, "wrong": wrong}


def attention(family: str) -> dict[str, Any]:
    """Compare documents in one row (varlen_attn on a GPU) with each document alone."""
    import torch

    from sft.fast import attention as ours

    ours.register()
    texts = documents()
    fine, coarse = models(family, "sdpa")
    results = []
    for model, way in ((fine, one_by_one), (coarse, one_by_one), (coarse, in_a_row)):
        if way is in_a_row:
            model.set_attn_implementation(ours.NAME)
        log_probs = scored(way(model, texts), texts)
        (-log_probs.mean()).backward()
        results.append((log_probs.detach(), gradients(model)))
    reference, plain, packed = results
    row = verdict(
        {
            name: (apart(packed[i], reference[i]), apart(plain[i], reference[i]))
            for i, name in enumerate(("log_prob", "gradient"))
        }
    )
    row["loss"] = float(-packed[0].mean())
    row["loss_apart"] = abs(float(packed[0].mean() - reference[0].mean()))
    (-scored(in_a_row(coarse, texts), texts).mean()).backward()
    # Not required here; a resumed run is the same to the last bit only if this is.
    row["gradient_repeatable"] = bool(torch.equal(gradients(coarse), packed[1]))
    with torch.no_grad():
        one, other = (in_a_row(coarse, documents(changed)) for changed in (False, True))
    same = [bool(torch.equal(a, b)) for a, b in zip(one, other, strict=True)]
    row["others_bit_identical"] = all(same[:1] + same[2:])
    if not row["others_bit_identical"] or same[1]:
        row["wrong"].append(f"documents that changed when the second did: {same}")
    return row


def head(kind: str) -> dict[str, Any]:
    """Compare a fused LM head with the loss from the model's own logits."""

    from sft.fast import head as heads

    texts = documents()[1:2]
    fine, coarse = models("llama", "sdpa")
    labels = texts[0].clone()
    labels[:20] = -100
    results = []
    for model in (fine, coarse):
        log_probs = scored(one_by_one(model, texts), texts)[19:]
        (-log_probs.sum()).backward()
        results.append((log_probs.detach(), gradients(model)))
    heads.install(coarse, kind)
    output = coarse(
        input_ids=texts[0][None], labels=labels[None], use_cache=False, fused_lm_head=True
    )
    output.loss.backward()
    found, (reference, plain) = (output.log_probs, gradients(coarse)), results
    row = verdict(
        {
            name: (apart(found[i], reference[i]), apart(plain[i], reference[i]))
            for i, name in enumerate(("log_prob", "gradient"))
        }
    )
    total = float(-reference[0].sum())
    row["loss_apart"] = abs(float(output.loss) - total) / total
    return row


def small_base() -> Path:
    """Write a small Llama with weights and the embedded tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    folder = WORK / "small"
    if folder.is_dir():
        return folder
    width = 64 if is_tiny() else 256
    fields = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    fields |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320}
    fields |= {"bos_token_id": None, "eos_token_id": 258, "pad_token_id": 256}
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", max_position_embeddings=512, **fields)
    partial = WORK / "small.partial"
    # In 16 bits, as base models are stored.
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(partial)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(partial)
    return partial.rename(folder)


# How far a loss may be from float32's: at the first step, of rounded weights alone; at any.
BOUNDS = {"bf16": (2**-7, 0.05), "fp16": (2**-9, 0.05)}


def precision(kind: str, quantization: str = "none") -> dict[str, Any]:
    """Train a few steps in a 16-bit precision, and in float32."""
    if kind == "fp16":
        needs_gpu()
    losses: dict[str, list[float]] = {}
    row: dict[str, Any] = {}
    settings = ["dataset=demo", "dataset.exact_match=0", "train.learning_rate=1e-3"]
    settings += ["dataset.max_rows=64", "dataset.max_eval_rows=8", "train.logging_steps=1"]
    settings += [*batch(8), f"quantization={quantization}"]
    for used in ("fp32", kind):
        clock = Clock(steps=2 if is_tiny() else 12, warmup=1)
        train("", clock, *settings, f"precision={used}", base=small_base())
        losses[used] = [float(loss) for loss in clock.losses]
        scaler = clock.trainer.accelerator.scaler
        if scaler is not None:
            row |= {"loss_scale": scaler.get_scale(), "scales": type(scaler).__name__}
        del clock
    clean()
    ratios = [abs(a / b - 1) for a, b in zip(losses[kind], losses["fp32"], strict=True)]
    first, largest = ratios[0], max(ratios)
    row |= {"loss": losses[kind][-1], "first_apart": first, "largest_apart": largest, "wrong": []}
    if not (first <= BOUNDS[kind][0] and largest <= BOUNDS[kind][1]):
        row["wrong"].append(
            f"losses are {first:.2g} and at most {largest:.2g} from float32's, "
            f"allowed {BOUNDS[kind]}"
        )
    if kind == "fp16" and not row.get("loss_scale", 0) > 1:
        row["wrong"].append("the loss is not scaled")
    return row
