"""Which weights train, how fast, and in which precision: rates by kind, fp16, quantised bases."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from support import SAME_LOSS, assert_same_adapter, build_adapter, losses
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
