"""The precision of a run: its choice, its torch dtype, and which weights must be float32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.config import zero
from sft.config.rules import AS_SET, Choice
from sft.config.settings import Config
from sft.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch

SMALL = 512  # hidden size, below which auto takes float32 on a CPU
BEGUN = "the run began with it"


@dataclass(frozen=True)
class Precision(Choice):
    """The choice of ``precision``: fp32, bf16 or fp16.

    Attributes:
        products: The way in which a CPU computes bf16 products, one of
            ``sft.fast.cpu_products.ways``; empty in other precisions and on a GPU.
    """

    products: str = ""

    def identity(self) -> dict[str, str]:
        """Return the values that a resumed run must have too; ``run.json`` stores them."""
        return {"precision": self.value, **({"products": self.products} if self.products else {})}


def choose(
    asked: str, begun: Mapping[str, str] | None = None, width: int | None = None
) -> Precision:
    """Choose fp32, bf16 or fp16, and on a CPU the way to compute bf16 products.

    A CPU with bf16 instructions may still multiply faster in float32, so both are measured.

    Args:
        asked: ``precision`` of the config.
        begun: The identity of the resumed run, if any: ``auto`` takes its precision, and products
            are computed in the same way if this processor supports it.
        width: The model's hidden size; None: do not consider it.

    Raises:
        ConfigError: fp16 on a CPU, where the trainer would silently compute in fp32.
    """
    import torch

    begun = begun or {}
    name = begun.get("precision", asked) if asked == "auto" else asked
    why = AS_SET if asked != "auto" else BEGUN
    if not torch.cuda.is_available():
        return _on_cpu(name, why, begun.get("products"), width)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto" and has_bf16:
        return _precision("bf16", "the GPU has bf16")
    if name == "auto":
        return _precision(
            "fp16", "the GPU has no bf16; trained weights are float32, and the loss is scaled"
        )
    if name == "bf16" and not has_bf16:
        why += "; the GPU has no bf16 and emulates it, which is slow"
    return _precision(name, why)


def _precision(name: str, reason: str, products: str = "") -> Precision:
    return Precision("precision", name, reason, products)


def _on_cpu(name: str, why: str, products: str | None, width: int | None) -> Precision:
    """Choose on a CPU.

    Args:
        name: The precision or ``auto``.
        why: The reason for a precision.
        products: The way in which the resumed run computed products; None: the run is new.
        width: The model's hidden size; None: do not consider it.
    """
    import torch

    from sft.fast import cpu_products, speed

    if name == "fp16":
        fix = "precision=bf16"
        if why != AS_SET:  # a different precision would be refused on resume
            fix = "resume this run on a GPU, or run_name=NAME for a new run"
        rule = "there is no GPU, and only a GPU trains in fp16"
        raise ConfigError([Problem("precision=fp16", rule, fix)])
    ways = cpu_products.ways(torch.bfloat16)
    if name == "fp32":
        return _precision(name, why)
    if cpu_products.NATIVE not in ways:
        if name == "auto":
            return _precision("fp32", "the CPU has no bf16")
        why += "; the CPU has no bf16, so products are computed in float32 and rounded"
        return _precision(name, why, cpu_products.WIDENED)
    if name == "auto" and width is not None and width < SMALL:
        # Conversions between the precisions cost more than faster products save: in bf16 the
        # embedded model (width 128) takes 1.2 times the CPU time of float32, on a processor whose
        # bf16 products are 1.7 times as fast.
        reason = f"layers of width {width} are too small to gain from bf16 on a CPU"
        return _precision("fp32", reason)
    if products in ways:
        reason = f"{why}; products are computed as before: {speed.NAMES[products]}"
        return _precision(name, reason, products)
    measured = speed.speeds()
    if name == "auto":
        # WIDENED is never faster than float32: it is the same product with conversions.
        others = [way for way in ways if way != cpu_products.WIDENED]
        way = speed.fastest(measured, [speed.FLOAT32, *others])
        name, why = ("fp32" if way == speed.FLOAT32 else "bf16"), "measured on this CPU"
    else:
        way = speed.fastest(measured, ways)
        why += f"; products are computed as {speed.NAMES[way]}, as measured on this CPU"
    reason = f"{why}: {speed.said(measured)}"
    return _precision(name, reason, "" if name == "fp32" else way)


def choose_tf32(precision: str, extra: Mapping[str, Any]) -> Choice:
    """Choose ``train.extra.tf32``: whether float32 products may use TF32.

    Args:
        precision: fp32, bf16 or fp16.
        extra: ``train.extra``.
    """
    from transformers.utils import is_torch_tf32_available

    name = "train.extra.tf32"
    if extra.get("tf32") is not None:
        return Choice(name, extra["tf32"], AS_SET)
    if not is_torch_tf32_available():
        return Choice(name, False, "there is no GPU with TF32")
    if precision == "fp32":
        return Choice(name, False, "precision=fp32 computes products in full float32")
    return Choice(name, True, f"precision={precision} allows it for products that stay in float32")


def dtype_of(precision: str) -> torch.dtype:
    """Map fp32, bf16 or fp16 to the torch dtype."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def needs_masters(config: Config) -> bool:
    """Return whether the weights must be loaded in float32, whatever ``precision`` is.

    Mixed precision updates float32 weights. DeepSpeed makes its own float32 copies, and a frozen
    base model is not updated.
    """
    return not config.lora.enabled and zero.read(config.zero) is None
