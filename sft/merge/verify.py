"""Verify a merge: compare the logits and answers of base + adapter and of the merged model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from sft.config.settings import ModelConfig, QuantizationConfig
from sft.data.row_encoder import IGNORE_INDEX
from sft.merge import adapters as adapters
from sft.merge import metadata, probes
from sft.merge.base_files import Base, shards
from sft.merge.probes import Probes
from sft.merge.stream import Weights, streamed
from sft.model.base import load_architecture, load_frozen
from sft.model.quantization import keep_training_layout

if TYPE_CHECKING:
    from sft.merge.prepare import Prepared

# Largest logit difference that rounding explains, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
RESIDENT = 1 << 30  # bytes in float32; larger models are read layer by layer
GREEDY_PROMPTS = 4
GREEDY_TOKENS, GREEDY_TOKENS_STREAMED = 32, 8  # streamed, each token reads all weights again


def verify(prepared: Prepared, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Compare base + adapter with the merged model.

    Both compute in float32, so that only the weights differ. Base + adapter generates greedy texts.
    The merged model runs once over these texts: if each next token is its top token, its own greedy
    texts are the same.

    Args:
        prepared: The merge.
        folder: The merged model.
        dtype: The precision of its weights.

    Returns:
        The figures, ``passed``, and ``reason`` if that is false.

    Raises:
        MergeError: The written tokenizer or config differs, or a file cannot be read.
    """
    metadata.check(prepared, folder)
    tokenizer = prepared.tokenizer
    rows = prepared.model.get_input_embeddings().weight.shape[0]
    samples = probes.load(prepared.sources.adapters[0], min(len(tokenizer), rows))
    chosen = samples.positions(rows)
    resident = prepared.must_be_resident or 4 * prepared.layout.numbers <= RESIDENT
    with _base_and_adapter(prepared, resident) as model:
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
    with _written(folder, resident) as model:
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


def _greedy(model: Any, prepared: Prepared, samples: Probes, resident: bool) -> list[list[int]]:
    """Continue the first prompts greedily; an answer includes the token that stopped it."""
    from sft.inference.answers import continuations, stop_ids

    tokenizer = prepared.tokenizer
    stop_id = metadata.stop_id(prepared)
    length = GREEDY_TOKENS if resident else GREEDY_TOKENS_STREAMED
    prompts = samples.prompts[:GREEDY_PROMPTS]
    ids = continuations(model, tokenizer, prompts, length, model.device, stop_id)
    stops = stop_ids(model.generation_config, tokenizer, stop_id)
    answers = []
    for row in ids.tolist():
        end = next((i for i, token in enumerate(row) if token in stops), len(row) - 1)
        answers.append(row[: end + 1])
    return answers


def verify_against_training(prepared: Prepared, folder: Path) -> dict[str, Any]:
    """Measure how far the merged model is from base + adapter as training computed them.

    They differ with quantized_base=original, and with an 8-bit base, whose forward pass also rounds
    the input of each layer.
    """
    rows = prepared.model.get_input_embeddings().weight.shape[0]
    samples = probes.load(prepared.sources.adapters[0], rows)
    chosen = samples.positions(rows)
    wanted = _logits(_reference(prepared, prepared.sources.quantization), samples, chosen)
    with _written(folder, resident=True) as model:
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


def _reference(
    prepared: Prepared, quantization: QuantizationConfig, weights_only: bool = False
) -> Any:
    """Load base and adapters as a whole, with Transformers and PEFT only.

    Args:
        prepared: The merge.
        quantization: How the base is stored.
        weights_only: Dequantise the weights, to avoid what the forward pass of quantised layers
            adds: an 8-bit layer rounds its inputs; a 4-bit layer without gradients does not round
            its weights to the precision of training.
    """
    from peft import PeftModel

    sources = prepared.sources
    quantized = quantization.load_in_4bit or quantization.load_in_8bit
    # Quantisation and PiSSA's initialisation start from the weights in the precision of training.
    derived = quantized or bool(prepared.wholes)
    base = load_frozen(sources.base, quantization, sources.dtype if derived else torch.float32)
    if quantized and weights_only:
        base = base.dequantize(torch.float32).float()
    elif quantized:
        _compute_in_float32(base)
    if weights_only and derived and sources.dtype != sources.stored_dtype:
        _restore_others(base, prepared)
    if prepared.resized:
        base.resize_token_embeddings(prepared.resized, mean_resizing=False)
    model = PeftModel.from_pretrained(
        base, str(sources.adapters[0]), adapter_name=adapters.name_of(0)
    )
    for index, folder in enumerate(sources.adapters[1:], 1):
        model.load_adapter(str(folder), adapter_name=adapters.name_of(index))
    return _weighed(model if quantized else model.float(), prepared)


def _weighed(model: Any, prepared: Prepared) -> Any:
    """Activate all adapters, and multiply the scaling of each by its factor."""
    from peft.tuners.lora.layer import LoraLayer

    names = [adapters.name_of(index) for index in range(len(prepared.sources.adapters))]
    if len(names) > 1:
        model.base_model.set_adapter(names)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, weight in zip(names, prepared.sources.weights, strict=True):
                if name in module.scaling:
                    module.scaling[name] *= weight
    return model.eval()


@torch.no_grad()
def _restore_others(model: Any, prepared: Prepared) -> None:
    """Set the weights outside of ``prepared.wholes`` to the values in the base's files.

    The merge reads these from the files, whose precision may be higher than training's.
    """
    stored = load_frozen(prepared.sources.base, QuantizationConfig(), torch.float32)
    values = dict(stored.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in prepared.wholes:
            parameter.data = values[name].data


def _compute_in_float32(model: Any) -> None:
    """Compute everything in float32, and leave the quantised weights unchanged."""
    import bitsandbytes

    stored = (bitsandbytes.nn.Params4bit, bitsandbytes.nn.Int8Params)
    for parameter in model.parameters():
        if not isinstance(parameter, stored):
            parameter.data = parameter.data.float()
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.compute_dtype = torch.float32
    keep_training_layout(model)


@contextlib.contextmanager
def _base_and_adapter(prepared: Prepared, resident: bool) -> Iterator[Any]:
    """Yield base + adapter, loaded as a whole (resident) or read layer by layer."""
    if resident:
        stored = prepared.sources.quantization if prepared.dequantized else QuantizationConfig()
        yield _reference(prepared, stored, weights_only=True)
    else:
        model = _weighed(prepared.model, prepared)
        with streamed(model, Weights(prepared.base, prepared.wholes)):
            yield model


@contextlib.contextmanager
def _written(folder: Path, resident: bool) -> Iterator[Any]:
    """Yield the merged model, loaded as a whole (resident) or read layer by layer."""
    here = ModelConfig(name_or_path=str(folder.resolve()))
    if resident:
        yield load_frozen(here, QuantizationConfig(), torch.float32)
    else:
        architecture = load_architecture(here, buffers=True)
        base = Base.read(shards(here), architecture)
        with streamed(adapters.with_placeholders(architecture).eval(), Weights(base, {})) as model:
            yield model


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
