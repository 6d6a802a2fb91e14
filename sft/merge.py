"""Fold an adapter into full weights, and check that the merged model is the one that was trained.

The deltas are added in float32 and rounded once to the base's own precision. An adapter that was
trained on a 4- or 8-bit base is merged onto that base dequantised, which is what it was trained on.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import environment
from sft.cli import Command
from sft.config import ModelConfig, QuantizationConfig
from sft.errors import MergeError, Problem
from sft.files import write_text
from sft.rules import one_of, rule_problems, setting

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger("sft")

REPORT = "merge_report.json"
# Largest logit difference that rounding explains, as a share of the largest logit.
TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}


@dataclass
class MergeConfig:
    """What to merge, and where to."""

    run: str | None = setting(None, "a run's folder; its adapter/ becomes its merged/")
    adapter: str | None = setting(None, "or an adapter folder (PEFT format)")
    output: str | None = setting(None, "where the merged model goes; null: merged/ in the run")
    base: str | None = setting(None, "base model; null: the one the adapter names")
    dtype: str = setting(
        "auto",
        "of the written weights; auto: the base model's own",
        one_of("auto", "float32", "bfloat16", "float16"),
    )
    overwrite: bool = setting(False, "true: replace what is in the output folder")


@dataclass
class _Plan:
    """Where everything is, once the settings are understood."""

    adapter: Path
    output: Path
    base: ModelConfig
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)


def check(config: MergeConfig) -> list[Problem]:
    """Find what is wrong with the settings alone."""
    if (config.run is None) == (config.adapter is None):
        return [Problem("run, adapter", "give one of them", "run=outputs/NAME")]
    if config.adapter is not None and config.output is None:
        return [Problem("output=null", "adapter= needs a place to go", "output=FOLDER")]
    return []


def merge(config: MergeConfig) -> None:
    """Merge, verify, and only then give the output its name.

    Raises:
        MergeError: Something is missing, the output is taken, or the merged model differs.
    """
    plan = _plan(config)
    _check_adapter(plan.adapter)
    partial = plan.output.with_name(f"{plan.output.name}.partial")
    for folder in (plan.output, partial):
        _check_output(folder, config.overwrite or folder is partial)
    environment.prepare()
    import torch
    from peft import PeftModel

    from sft.model import load_tokenizer

    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_text(partial / REPORT, '{"passed": false}\n')  # until it has been verified
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(plan.adapter)))
    base, stored = _load_base(plan)
    dtype = stored if config.dtype == "auto" else getattr(torch, config.dtype)
    with torch.no_grad():
        probe = _probe(tokenizer, base)
        base_logits = base(probe).logits.float()
        adapted = PeftModel.from_pretrained(base, str(plan.adapter))
        adapted.eval()
        wanted = adapted(probe).logits.float()
        merged = adapted.merge_and_unload(safe_merge=True)
    _save(merged.to(dtype), tokenizer, plan, partial)
    del base, adapted, merged
    report = _verify(partial, probe, wanted, base_logits, dtype)
    write_text(partial / REPORT, json.dumps(report, indent=2) + "\n")
    if not report["passed"]:
        raise MergeError(
            f"the merged model is not the trained one: logits differ by "
            f"{report['max_difference']:.3g} where rounding to {report['dtype']} explains "
            f"{report['allowed']:.3g}; it stays in {partial} for inspection\n"
            "    fix: dtype=float32"
        )
    if plan.output.exists():
        shutil.rmtree(plan.output)
    partial.rename(plan.output)
    logger.info(
        "merged into %s (%s): logits within %.2g of base + adapter (allowed %.2g), same top token "
        "at %.1f %% of positions; the adapter moved them by up to %.2g",
        plan.output,
        report["dtype"],
        report["max_difference"],
        report["allowed"],
        100 * report["top1_agreement"],
        report["adapter_effect"],
    )


def _plan(config: MergeConfig) -> _Plan:
    from sft.inference import ADAPTER_SETTINGS, base_of, read_card

    if config.run is not None:
        run = Path(config.run)
        if (run / "model").is_dir():
            raise MergeError(
                f"{run} trained every weight: {run / 'model'} is the whole model already"
            )
        adapter, output = run / "adapter", Path(config.output or run / "merged")
    else:
        assert config.adapter is not None and config.output is not None
        adapter, output = Path(config.adapter), Path(config.output)
    settings_file = adapter / ADAPTER_SETTINGS
    if not settings_file.is_file():
        raise MergeError(
            f"there is no adapter in {adapter}\n    fix: run=FOLDER of a finished LoRA run, or "
            "adapter=FOLDER with adapter_config.json"
        )
    card = read_card(adapter)
    base = base_of(adapter, card, config.base)
    return _Plan(adapter, output, base, card.quantization if card else QuantizationConfig())


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse to replace anything but what a merge has made."""
    if not output.exists():
        return
    if not overwrite:
        raise MergeError(
            f"{output} exists\n    fix: overwrite=true to replace it, or output=ANOTHER"
        )
    if not (output / REPORT).is_file():
        raise MergeError(f"{output} is not a merged model of ours\n    fix: output=ANOTHER")


def _check_adapter(adapter: Path) -> None:
    """Refuse an adapter that is empty, not finite, or that changes nothing.

    Users of ZeRO-3 found 40-byte files after days (TRL #4416, PEFT #2892).
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        raise MergeError(f"there is no {weights}\n    fix: adapter=FOLDER with safetensors weights")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise MergeError(
            f"{weights} is damaged: {error}\n    fix: train or copy it anew"
        ) from error
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if not tensors or empty:
        raise MergeError(f"{weights} holds empty tensors {empty[:3]}\n    fix: train it anew")
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise MergeError(f"{weights} is not finite in {broken[:3]}\n    fix: a lower learning rate")
    deltas = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    if deltas and not any(tensor.any() for tensor in deltas):
        raise MergeError(f"every lora_B of {weights} is zero: it changes nothing")


def _load_base(plan: _Plan) -> tuple[PreTrainedModel, torch.dtype]:
    """Load the base in float32, and say in what precision it is stored."""
    import torch
    from transformers import AutoConfig

    from sft.model import load_frozen, loading, source

    with loading("config", plan.base):
        stored = AutoConfig.from_pretrained(**source(plan.base)).dtype or torch.float32
    base = load_frozen(plan.base, plan.quantization, torch.float32)
    if plan.quantization.load_in_4bit or plan.quantization.load_in_8bit:
        base = base.dequantize().float().to("cpu")
    return base, stored


def _probe(tokenizer: PreTrainedTokenizerBase, base: PreTrainedModel) -> torch.Tensor:
    """Make token ids to compare on: the whole vocabulary's range, shape (4, 64)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    size = min(len(tokenizer), base.get_input_embeddings().weight.shape[0])
    return torch.randint(0, size, (4, 64), generator=generator)


def _save(merged: Any, tokenizer: Any, plan: _Plan, folder: Path) -> None:
    from sft.answers import stop_ids
    from sft.data.template import Template
    from sft.inference import read_card, write_card

    card = read_card(plan.adapter)
    if card is not None:
        stop_id = Template(card.template, tokenizer).stop_id()
        merged.generation_config.eos_token_id = stop_ids(merged, tokenizer, stop_id)
        # The merged weights are whole, and need no base.
        write_card(folder, dataclasses.replace(card, quantization=QuantizationConfig()))
    merged.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def _verify(
    folder: Path,
    probe: torch.Tensor,
    wanted: torch.Tensor,
    base_logits: torch.Tensor,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Load what was written, and compare its logits with those of base + adapter."""
    import torch
    from transformers import AutoModelForCausalLM

    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = written(probe).logits
    name = str(dtype).removeprefix("torch.")
    difference = (logits - wanted).abs().max().item()
    allowed = TOLERANCE[name] * wanted.abs().max().item()
    return {
        "passed": bool(torch.isfinite(logits).all()) and difference <= allowed,
        "dtype": name,
        "max_difference": difference,
        "allowed": allowed,
        "mean_difference": (logits - wanted).abs().mean().item(),
        "top1_agreement": (logits.argmax(-1) == wanted.argmax(-1)).float().mean().item(),
        "adapter_effect": (wanted - base_logits).abs().max().item(),
    }


main = Command(
    name="merge",
    schema=MergeConfig,
    run=merge,
    check=lambda config: [*rule_problems(config), *check(config)],
    summary="fold an adapter into full weights, and verify them",
    examples=(
        "python -m sft.merge run=outputs/opt-125m_alpaca_r8_seed42",
        "python -m sft.merge adapter=FOLDER output=FOLDER base=facebook/opt-125m",
    ),
)

if __name__ == "__main__":
    main()
