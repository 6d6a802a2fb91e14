"""The first 20 losses of the embedded model on the embedded data, as they were declared.

A change of sft or of a library either leaves them or declares new ones, with
``DECLARE_TRAJECTORY=1``; so a loss cannot change unnoticed.
"""

import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, losses
from warm import run_warm

FILE = ROOT / "tests" / "trajectory.json"
DECLARE = "DECLARE_TRAJECTORY=1 python -m pytest tests/integration/test_trajectory.py"
LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers")
STEPS = 20
UNTRAINED = 2  # steps whose weights are the first ones: the first step's rate is 0, by warm-up
SETTINGS = (
    *(f"train.max_steps={STEPS}", "train.logging_steps=1", "train.eval_strategy=no"),
    *("train.save_strategy=no", "dataset.exact_match=0", "output_dir=run"),
)
# How far a loss may be from the declared one, as a share of it: in the steps before the first
# update, and in those after it. It is promised for any x86 processor. Processors add float32 sums
# in different orders, with and without fused multiply-add, which changes the last bits of products,
# and each update adds to the difference. It was measured on an AMD with AVX-512, with PyTorch, MKL
# and oneDNN held to what older processors have (ATEN_CPU_CAPABILITY=default and avx2,
# MKL_CBWR=COMPATIBLE and AVX2, ONEDNN_MAX_CPU_ISA=SSE41, AVX2 and AVX512_CORE), with two threads,
# and with plain attention, head and padding. fp32: up to 3.8e-7 before the first update, 2.3e-6
# after it. bf16, where a last bit decides to which of two 8-bit mantissas a result is rounded: up
# to 1.5e-4 and 8.0e-3. So a loss that changes by a thousandth is found in both precisions; what
# changes the updates by less than a tenth is found in fp32 only.
ALLOWED = {"fp32": (1e-5, 2e-5), "bf16": (4e-4, 2e-2)}
# On a processor that has bf16, sft measures in which of three ways its products are fastest, and
# each way rounds differently. The way that every processor has is compared.
WIDENED = """
import runpy
from sft.fast import cpu_products
cpu_products.ways = lambda dtype: [cpu_products.WIDENED]
runpy.run_module("sft.train", run_name="__main__", alter_sys=True)
"""


def trained(precision: str, folder: Path, *more: str) -> list[float]:
    """Train on the CPU, and list the losses."""
    command = "train"
    if precision == "bf16":
        script = folder / "widened.py"
        script.write_text(WIDENED, encoding="utf-8")
        command = str(script)
    run_warm(command, *SETTINGS, f"precision={precision}", *more, cwd=folder)
    return losses(folder / "run")


def installed() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def difference(precision: str, found: Sequence[float], declared: dict[str, Any]) -> str | None:
    """Say where losses leave the declared ones and what to do; None where they do not."""
    expected = declared["losses"][precision]
    assert len(found) == len(expected) == STEPS
    first, later = ALLOWED[precision]
    for step, (loss, wanted) in enumerate(zip(found, expected, strict=True), 1):
        allowed = first if step <= UNTRAINED else later
        apart = abs(loss - wanted) / wanted
        if not apart <= allowed:
            changed = [
                f"{name} {declared['versions'][name]} -> {version}"
                for name, version in installed().items()
                if declared["versions"][name] != version
            ]
            return (
                f"precision={precision}: the loss of step {step} is {loss:.7g}, and "
                f"{FILE.relative_to(ROOT)} declares {wanted:.7g}: {apart:.1e} apart, where "
                f"{allowed:.0e} is allowed. Libraries that differ: {', '.join(changed) or 'none'}. "
                f"If the change is meant, declare it: {DECLARE}, and say why in CHANGELOG.md"
            )
    return None


def declare(precision: str, found: list[float]) -> None:
    """Write what was found into the file, with what gave it."""
    declared = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {"losses": {}}
    declared |= {
        "declared_by": DECLARE,
        "settings": SETTINGS,
        "processor": torch.cpu.get_capabilities().get("cpu_name", ""),
        "versions": installed(),
    }
    declared["losses"][precision] = found
    FILE.write_text(json.dumps(declared, indent=2) + "\n", encoding="utf-8")


@pytest.mark.parametrize("precision", ALLOWED)
def test_losses_are_the_declared_ones(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what a GPU computes is no one's reference
    found = trained(precision, tmp_path)
    if os.environ.get("DECLARE_TRAJECTORY"):
        declare(precision, found)
    wrong = difference(precision, found, json.loads(FILE.read_text(encoding="utf-8")))
    assert wrong is None, wrong


def test_another_learning_rate_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a thousandth."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = trained("fp32", tmp_path, "train.learning_rate=7.007e-3")
    wrong = difference("fp32", found, json.loads(FILE.read_text(encoding="utf-8")))
    assert wrong is not None and DECLARE in wrong and "the loss of step" in wrong


@pytest.mark.parametrize("precision", ALLOWED)
def test_a_loss_that_is_a_thousandth_larger_is_found(precision: str) -> None:
    declared = json.loads(FILE.read_text(encoding="utf-8"))
    larger = [loss * 1.001 for loss in declared["losses"][precision]]
    declared["versions"]["trl"] = "1.15.0"
    wrong = difference(precision, larger, declared)
    assert wrong is not None and f"the loss of step 1 is {larger[0]:.7g}" in wrong
    assert f"trl 1.15.0 -> {installed()['trl']}" in wrong
