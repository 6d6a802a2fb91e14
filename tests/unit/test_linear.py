"""Packed layers give what plain ones do, and only frozen ones are packed."""

from typing import Any

import pytest
import torch

from sft.errors import ConfigError
from sft.fast import linear
from sft.model.base import load_architecture
from sft.train import main


class Layers(torch.nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.biased = torch.nn.Linear(24, 40)
        self.bare = torch.nn.Linear(40, 24, bias=False)
        self.trained = torch.nn.Linear(24, 24)
        self.half = torch.nn.Linear(24, 24, dtype=torch.bfloat16)
        self.head = torch.nn.Linear(24, 100)
        self.requires_grad_(False)
        self.trained.requires_grad_(True)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.trained(self.bare(self.biased(x).tanh())))


def gradients(model: Layers, x: torch.Tensor) -> list[torch.Tensor]:
    given = x.clone().requires_grad_()
    model.zero_grad()
    output = model(given)
    output.square().sum().backward()
    trained = model.trained
    return [output.detach(), given.grad, trained.weight.grad.clone(), trained.bias.grad.clone()]


def test_only_frozen_float32_layers_are_packed_and_nothing_changes() -> None:
    model = Layers()
    inputs = [torch.randn(2, length, 24) for length in (1, 7, 300)]
    expected = [gradients(model, x) for x in inputs]
    assert linear.frozen(model) == [model.biased, model.bare]
    assert linear.install(model) == 2
    for x, values in zip(inputs, expected, strict=True):
        for found, value in zip(gradients(model, x), values, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
    # An input that is no whole tensor of its own, as a slice of another.
    wide = torch.randn(5, 48)
    torch.testing.assert_close(model(wide[:, ::2]), model(wide[:, ::2].contiguous()))


def test_autocast_and_other_precisions_take_the_plain_way() -> None:
    model = Layers()
    x = torch.randn(3, 24)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.biased(x)
        linear.install(model)
        assert torch.equal(model.biased(x), expected)
    assert model.biased(x).dtype == torch.float32


@pytest.mark.parametrize(
    ("overrides", "stage", "amd", "bytes_free", "kind", "reason"),
    [
        (["model.frozen_linear=plain"], 0, True, 1 << 40, "plain", "as set"),
        (["model.frozen_linear=packed"], 0, False, 1 << 40, "packed", "as set"),
        ([], 0, True, 1 << 40, "packed", "oneDNN is faster"),
        ([], 0, False, 1 << 40, "plain", "MKL is as fast"),
        ([], 0, True, 1 << 20, "plain", "half of the free memory"),
        ([], 3, True, 1 << 40, "plain", "no rank holds a whole layer"),
        (["lora=none"], 0, True, 1 << 40, "plain", "there is no adapter"),
        (["quantization=nf4"], 0, True, 1 << 40, "plain", "quantised"),
    ],
)
def test_where_it_pays(
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    stage: int,
    amd: bool,
    bytes_free: int,
    kind: str,
    reason: str,
) -> None:
    monkeypatch.setattr(linear, "amd_with_avx512", lambda: amd)
    monkeypatch.setattr(linear, "available", lambda: bytes_free)
    config = main.compose(overrides)
    architecture = load_architecture(config.model)
    found = linear.choose(config, architecture, "fp32", stage)
    assert (found.setting, found.value) == ("model.frozen_linear", kind)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("can", "kind"),
    [
        ({"cpu_name": "AMD EPYC", "avx512_f": True}, "packed"),
        ({"cpu_name": "AMD EPYC", "avx512_f": True, "avx512_bf16": True}, "packed"),
        ({"cpu_name": "AMD EPYC", "avx512_f": False, "avx2": True}, "plain"),
        ({"cpu_name": "Intel(R) Xeon(R)", "avx512_f": True, "avx512_bf16": True}, "plain"),
        ({"bf16": True}, "plain"),  # ARM
    ],
)
def test_which_processors_pack(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, Any], kind: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    monkeypatch.setattr(linear, "available", lambda: 1 << 40)
    config = main.compose([])
    assert linear.choose(config, load_architecture(config.model), "fp32", 0).value == kind


def test_what_cannot_be_packed_is_refused() -> None:
    config = main.compose(["model.frozen_linear=packed"])
    architecture = load_architecture(config.model)
    with pytest.raises(ConfigError, match="precision is bf16"):
        linear.choose(config, architecture, "bf16", 0)
    with pytest.raises(ConfigError, match="no rank holds a whole layer"):
        linear.choose(config, architecture, "fp32", 3)
