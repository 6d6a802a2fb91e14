"""Verify a merge: compare the logits and answers of base + adapter and of the merged model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sft.data.row_encoder import IGNORE_INDEX
from sft.merge import metadata, probes
from sft.merge.compared import base_and_adapter, reference, written
from sft.merge.probes import Probes
from sft.progress import Progress, beat, progress

if TYPE_CHECKING:
    from sft.merge.prepare import PreparedMerge

# Largest logit difference that rounding explains, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
RESIDENT = 1 << 30  # bytes in float32; larger models are read layer by layer
GREEDY_PROMPTS = 4
GREEDY_TOKENS, GREEDY_TOKENS_STREAMED = 32, 8  # streamed, each token reads all weights again


def samples_of(prepared: PreparedMerge) -> Probes:
    """Read or draw the samples to compare on.

    Raises:
        MergeError: The run's file of them is damaged.
    """
    rows = _rows(prepared)
    return probes.load(prepared.sources.adapters[0], min(len(prepared.tokenizer), rows), rows)


def _rows(prepared: PreparedMerge) -> int:
    return int(prepared.model.get_input_embeddings().weight.shape[0])


def verify(
    prepared: PreparedMerge, samples: Probes, folder: Path, dtype: torch.dtype
) -> dict[str, Any]:
    """Compare base + adapter with the merged model.

    Both compute in float32, so that only the weights differ. Base + adapter generates greedy texts.
    The merged model runs once over these texts: if each next token is its top token, its own greedy
    texts are the same.

    Args:
        prepared: The merge.
        samples: What is compared on.
        folder: The merged model.
        dtype: The precision of its weights.

    Returns:
        The figures, ``passed``, and ``reason`` if that is false.

    Raises:
        MergeError: The written tokenizer or config differs, or a file cannot be read.
    """
    metadata.check(prepared, folder)
    resident = prepared.must_be_resident or 4 * prepared.layout.numbers <= RESIDENT
    passes = 3 + (GREEDY_TOKENS if resident else GREEDY_TOKENS_STREAMED)  # or fewer: answers end
    with progress("verifying", passes, "forward passes") as shown:
        report = _compared(prepared, samples, folder, dtype, resident, shown)
    return report


def _compared(
    prepared: PreparedMerge,
    samples: Probes,
    folder: Path,
    dtype: torch.dtype,
    resident: bool,
    shown: Progress,
) -> dict[str, Any]:
    """Do what ``verify`` does, with the progress shown."""
    chosen = samples.positions(_rows(prepared))
    with base_and_adapter(prepared, resident) as model:
        _count_passes(model, shown)
        with model.disable_adapter():
            base = _logits(model, samples, chosen)
        wanted = _logits(model, samples, chosen)
        effect = _differences(base, wanted)
        answers = _greedy(model, prepared, samples, resident)
    del base, model
    greedy = samples.answered(answers)
    together = samples + greedy
    columns = together.ids.shape[1]
    foretold = greedy.labels != IGNORE_INDEX
    wide = [F.pad(mask, (0, columns - mask.shape[1])) for mask in (chosen, foretold)]
    with written(folder, resident, prepared.sources.base.trust_remote_code) as model:
        _count_passes(model, shown)
        logits = _logits(model, together, torch.cat(wide))
    got, said = logits[: len(wanted)], logits[len(wanted) :].argmax(-1)
    right = torch.ones_like(greedy.labels, dtype=torch.bool)
    right[foretold] = said == greedy.labels[foretold]
    report = {
        "compared_on": f"{samples.origin}, {len(wanted)} positions",
        "weights_loaded": "whole" if resident else "layer by layer",
        "allowed_difference": TOLERANCE.get(dtype, 1e-4) * wanted.abs().max().item(),
        "adapter_effect": effect,
        **_differences(got, wanted),
        "greedy_texts": {"equal": int(right.all(1).sum()), "of": len(answers)},
        "eval_loss": {
            "base_and_adapter": _loss(wanted, samples.labels[chosen]),
            "merged": _loss(got, samples.labels[chosen]),
        },
    }
    reason = _why_not(report, bool(got.isfinite().all()))
    return {"passed": reason is None, "reason": reason, **report}


def _count_passes(model: Any, shown: Progress) -> None:
    """Count each forward pass of a model, and draw the bar again after each of its layers."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    inner.register_forward_hook(lambda *_: shown.update(1))
    for module in inner.modules():
        if isinstance(module, torch.nn.ModuleList):
            for layer in module:
                layer.register_forward_hook(beat)


def _greedy(
    model: Any, prepared: PreparedMerge, samples: Probes, resident: bool
) -> list[list[int]]:
    """Continue the first prompts greedily; an answer includes the token that stopped it."""
    from sft.inference.answers import continuations
    from sft.inference.stops import all_stop_ids

    tokenizer = prepared.tokenizer
    stop_ids = metadata.stop_ids(prepared)
    length = GREEDY_TOKENS if resident else GREEDY_TOKENS_STREAMED
    prompts = samples.prompts[:GREEDY_PROMPTS]
    ids = continuations(model, tokenizer, prompts, length, model.device, stop_ids)
    stops = all_stop_ids(model.generation_config, tokenizer, stop_ids)
    answers = []
    for row in ids.tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
        answers.append(row[: end + 1])
    return answers


def verify_against_training(
    prepared: PreparedMerge, samples: Probes, folder: Path
) -> dict[str, Any]:
    """Measure how far the merged model is from base + adapter as training computed them.

    They differ with quantized_base=original, and with an 8-bit base, whose forward pass also rounds
    the input of each layer.
    """
    chosen = samples.positions(_rows(prepared))
    wanted = _logits(reference(prepared, prepared.sources.quantization), samples, chosen)
    trust = prepared.sources.base.trust_remote_code
    with written(folder, resident=True, trust=trust) as model:
        got = _logits(model, samples, chosen)
    return _differences(got, wanted)


def _why_not(report: dict[str, Any], finite: bool) -> str | None:
    if not finite:
        return "its logits are not finite"
    if report["max_difference"] > report["allowed_difference"]:
        return (
            f"logits differ by {report['max_difference']:.3g}, and rounding explains only "
            f"{report['allowed_difference']:.3g}"
        )
    if report["adapter_effect"]["max_difference"] == 0:
        return "the adapter does not change the base's logits"
    if report["mean_difference"] > report["adapter_effect"]["mean_difference"] / 2:
        return "rounding removes more than half of the adapter's change"
    return None


def _logits(model: Any, samples: Probes, chosen: torch.Tensor) -> torch.Tensor:
    """Run a model over the samples; shape (chosen positions, vocabulary), on the CPU."""
    with torch.no_grad(), _only(model.get_output_embeddings(), chosen.to(model.device)):
        output = model(
            input_ids=samples.ids.to(model.device),
            attention_mask=samples.mask.to(model.device),
            use_cache=False,
        )
    logits: torch.Tensor = output.logits[0].float().cpu()
    return logits


@contextlib.contextmanager
def _only(head: torch.nn.Module, chosen: torch.Tensor) -> Iterator[None]:
    """Restrict the head to the chosen positions: all logits would be the largest tensor of all."""
    handle = head.register_forward_pre_hook(lambda _, given: (given[0][chosen][None], *given[1:]))
    try:
        yield
    finally:
        handle.remove()


def _differences(got: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """Compare two sets of logits; the KL divergence is in nats, a mean over positions."""
    most = total = divergence = 0.0
    for one, other in zip(torch.split(wanted, 16), torch.split(got, 16), strict=True):
        p, q = one.double(), other.double()
        difference = (q - p).abs()
        most = max(most, difference.max().item())
        total += difference.sum().item()
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
    return {
        "max_difference": most,
        "mean_difference": total / wanted.numel(),
        "kl": divergence / len(wanted),
        "top1_agreement": (wanted.argmax(-1) == got.argmax(-1)).float().mean().item(),
    }


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> float | None:
    """Return the mean loss on trained tokens; None if there are none."""
    trained = labels != IGNORE_INDEX
    return F.cross_entropy(logits[trained], labels[trained]).item() if trained.any() else None
