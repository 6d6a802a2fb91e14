"""Adapters computed by ``sft.fast.lora`` give what PEFT's own forward gives, in less memory."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from sft.fast import lora


class Layers(nn.Module):
    """Two layers that share an input, and one that follows."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(24, 40)
        self.right = nn.Linear(24, 40, bias=False)
        self.out = nn.Linear(40, 8)

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.left(x).tanh() * self.right(x))


def adapted(dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    torch.manual_seed(0)
    given = {"r": 4, "lora_alpha": 6, "init_lora_weights": False} | settings
    return get_peft_model(Layers().to(dtype), LoraConfig(target_modules="all-linear", **given))


def results(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Give the output, and the gradients of the input and of all adapter weights."""
    given = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    output = model(given)
    output.float().square().sum().backward()
    trained = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    assert len(trained) >= 6
    return [output.detach(), given.grad, *trained]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"lora_dropout": 0.5},
    {"use_rslora": True},
    {"rank_pattern": {"left": 2}, "alpha_pattern": {"out": 1}},
    {"use_dora": True},  # which stays PEFT's
    {"lora_bias": True},  # likewise
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24)])
def test_outputs_and_gradients_are_those_of_peft(
    settings: dict[str, Any], shape: tuple[int, ...]
) -> None:
    model = adapted(torch.float64, **settings).double()
    x = torch.randn(shape, dtype=torch.float64)
    expected = results(model, x)
    assert lora.install(model) == 3
    for found, value in zip(results(model, x), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-12)


def test_what_is_not_plain_training_is_left_to_peft() -> None:
    model = adapted()
    x = torch.randn(3, 24)
    base = model.base_model.model
    with torch.no_grad(), model.disable_adapter():
        expected = model(x)
    lora.install(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(x), expected)
    with torch.no_grad():
        before = model(x)
        assert not torch.allclose(before, expected)
        model.merge_adapter()
        torch.testing.assert_close(model(x), before)
        model.unmerge_adapter()
        model.add_adapter("second", LoraConfig(target_modules="all-linear", r=2))
        base.left.set_adapter(["default", "second"])  # both at once
        torch.testing.assert_close(model(x), before)  # the second one's B is zero


def test_autocast_rounds_no_more_than_peft_and_keeps_a_shared_input_once() -> None:
    model = adapted(torch.bfloat16)  # the adapter is in float32, as PEFT makes it
    assert model.base_model.model.left.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(512, 24).bfloat16()
    exact = results(adapted(torch.bfloat16).float(), x.float())
    kept: list[dict[int, int]] = []

    def seen(model: Any) -> list[torch.Tensor]:
        kept.append({})

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1][tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            return results(model, x)

    expected = seen(model)
    lora.install(model)
    found = seen(model)
    for ours, theirs, value in zip(found, expected, exact, strict=True):
        assert ours.dtype == theirs.dtype
        error, allowed = (float((each - value).norm() / value.norm()) for each in (ours, theirs))
        assert error <= 1.2 * allowed <= 0.01
    # PEFT keeps two more copies of the shared input.
    assert sum(kept[0].values()) - sum(kept[1].values()) >= x.nbytes


def test_an_output_that_another_keeps_for_its_gradient_is_not_overwritten_unseen() -> None:
    class Kept(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).exp()  # whose gradient is its output

    model = adapted()
    layer = model.base_model.model.left
    layer.base_layer.__class__ = Kept
    lora.install(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        results(model, torch.randn(3, 24))
