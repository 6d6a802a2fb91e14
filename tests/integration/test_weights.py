"""Which weights train, how fast, and in which precision: rates by kind, fp16, quantised bases."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support import SAME_LOSS, assert_same_adapter, build_adapter, losses, records
from warm import run_warm

from sft import prove

FILE = "adapter/adapter_model.safetensors"


def train(*overrides: str) -> None:
    from sft.train import main, train

    train(main.compose(list(overrides)))


def without(settings: list[str], *names: str) -> list[str]:
    """Leave settings out, by the beginning of their names."""
    return [item for item in settings if not item.startswith(names)]


def test_one_step_moves_each_kind_by_its_rate(
    tmp_path: Path, llama: Path, saving: list[str]
) -> None:
    """SGD's first step is the rate times the gradient, which is the same in both runs."""
    start = build_adapter(tmp_path / "start", llama, modules_to_save=["embed_tokens"])
    once = without(saving, "train.max_steps", "train.save_")
    once += [f"lora.init_from={start}", "lora.r=4", "lora.lora_alpha=8", "train.optim=sgd"]
    once += ["lora.modules_to_save=[embed_tokens]", "lora.target_modules=[q_proj,v_proj]"]
    once += ["train.max_steps=1", "train.lr_scheduler_type=constant", "train.warmup_steps=0"]
    once += ["train.save_strategy=no", "train.max_grad_norm=0"]
    train(*once, f"output_dir={tmp_path / 'plain'}")
    rates = ["train.loraplus_lr_ratio=8", "train.embedding_learning_rate=2e-2"]
    train(*once, *rates, f"output_dir={tmp_path / 'rates'}")
    before = load_file(start / "adapter_model.safetensors")
    plain, other = (load_file(tmp_path / run / FILE) for run in ("plain", "rates"))
    factors = {"lora_A": 1.0, "lora_B": 8.0, "embed_tokens": 2.0}
    for name, value in before.items():
        factor = next(factor for kind, factor in factors.items() if kind in name)
        moved, expected = other[name] - value, factor * (plain[name] - value)
        assert moved.abs().max() > 1e-5
        # Both are differences of float32 numbers of about 1.
        assert (moved - expected).abs().max() < 1e-6 + 1e-4 * expected.abs().max(), name


def test_rates_by_kind_are_the_same_under_zero_and_on_resume(
    tmp_path: Path, saving: list[str]
) -> None:
    rates = ["train.loraplus_lr_ratio=4", "train.embedding_learning_rate=1e-3"]
    rates += ["lora.modules_to_save=[embed_tokens]", "train.weight_decay=0.1"]
    one, two = tmp_path / "one", tmp_path / "two"
    train(*saving, *rates, f"output_dir={one}")
    run_warm("train", *saving, *rates, "zero=stage2", f"output_dir={two}", ranks=2, cwd=tmp_path)
    assert losses(two) == pytest.approx(losses(one), rel=SAME_LOSS)
    assert_same_adapter(two, one, rate=4e-2, steps=6)
    assert_goes_on(one, *saving, *rates)


def assert_goes_on(run: Path, *settings: str) -> None:
    """Require that a finished run, cut back to step 4, ends with the same bits."""
    straight = prove.outcome(run)
    prove.cut_back(run, 4)
    train(*settings, f"output_dir={run}")
    assert prove.differences(straight, prove.outcome(run)) == []


class Float16:
    """What a GPU does with precision=fp16, on the CPU: autocast, and a loss that is scaled."""

    scale = 2.0**16
    trainer: Any = None  # the newest one


@pytest.fixture
def float16(monkeypatch: pytest.MonkeyPatch) -> Float16:
    """Let fp16 train here: sft refuses it on a CPU, where Accelerate would compute in float32."""
    import torch
    from accelerate import Accelerator

    from sft.model import precision
    from sft.training import build

    found, start, make = Float16(), Accelerator.__init__, build.make_trainer

    def scaling(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        if self.mixed_precision == "fp16":
            self.native_amp = True
            self.scaler = torch.amp.GradScaler("cpu", init_scale=found.scale)

    def noted(*args: Any) -> Any:
        found.trainer = make(*args)
        return found.trainer

    def as_asked(name: str, why: str, *_: Any) -> precision.Precision:
        return precision.Precision("precision", name, why)

    monkeypatch.setattr(Accelerator, "__init__", scaling)
    monkeypatch.setattr(build, "make_trainer", noted)
    monkeypatch.setattr(precision, "_on_cpu", as_asked)
    return found


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_trains_in_fp16(
    tmp_path: Path, saving: list[str], float16: Float16, quantization: str
) -> None:
    """With float32 adapters, the losses of float32 and a merge that is verified."""
    import torch

    from sft.merge import __main__ as merge

    bits = [f"quantization={quantization}", "lora.modules_to_save=[embed_tokens]"]
    train(*saving, *bits, f"output_dir={tmp_path / 'fp32'}")
    run, fp16 = tmp_path / "run", [*without(saving, "precision"), *bits, "precision=fp16"]
    train(*fp16, f"output_dir={run}")
    parameters = dict(float16.trainer.model.named_parameters())
    trained = {p.dtype for p in parameters.values() if p.requires_grad}
    frozen = {p.dtype for p in parameters.values() if not p.requires_grad}
    assert trained == {torch.float32} and torch.float16 in frozen and torch.float32 not in frozen
    assert losses(run) == pytest.approx(losses(tmp_path / "fp32"), rel=2e-3)
    assert losses(run) != losses(tmp_path / "fp32")
    assert_goes_on(run, *fp16)
    merge.merge(merge.main.compose([f"run={run}"]))
    report = json.loads((run / "merged" / "merge_report.json").read_text())
    assert report["passed"] and report["onto"] == "dequantized"


def test_a_step_that_overflows_in_fp16_is_left_out(
    tmp_path: Path, saving: list[str], float16: Float16
) -> None:
    """The scale is halved and neither the weights nor the schedule go on; a resume goes on so."""
    float16.scale = 2.0**20  # with 2**19, too, the gradients of the first steps overflow
    run, fp16 = tmp_path / "run", [*without(saving, "precision"), "quantization=nf4"]
    fp16 += ["precision=fp16", "train.warmup_steps=1"]
    train(*fp16, f"output_dir={run}")
    logged = [record for record in records(run) if "loss" in record]
    assert [record["grad_norm"] is None for record in logged] == [True] * 2 + [False] * 4
    assert [record["learning_rate"] for record in logged][:4] == [0.0, 0.0, 0.0, 1e-2]
    state = json.loads((run / "checkpoint-4" / "state.json").read_text())
    assert state["scaler"]["scale"] == 2.0**18 and state["scaler"]["_growth_tracker"] == 2
    float16.scale = 1.0  # what a restored scale replaces
    assert_goes_on(run, *fp16)
    assert float16.trainer.accelerator.scaler.get_scale() == 2.0**18
