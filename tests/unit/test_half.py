"""16-bit products on a CPU without them are those of hardware that has them."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sft.fast import half


@pytest.fixture(autouse=True)
def lacking(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this processor lack both, whatever it is, for one test."""
    monkeypatch.setattr(half, "cpu_has", lambda dtype: False)
    monkeypatch.setattr(half, "_kernels", [])
    for dtype in half.CAPABILITIES:
        half.widen_products.__wrapped__(dtype)
    assert len(half._kernels) == 2
    yield
    for library in reversed(half._kernels):
        library._destroy()


def once_rounded(exact: torch.Tensor, found: torch.Tensor) -> None:
    """Require what float32 sums and one rounding give: half a unit, and what the sums round."""
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=0.51 * eps, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((3, 50, 70), (90, 70), (90,)))
    once_rounded(F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias))
    once_rounded(x.double() @ weight.double().t(), x @ weight.t())
    once_rounded(x.double() @ x.double().mT, x @ x.mT)
    scores = torch.zeros(3, 50, 50, dtype=dtype)
    once_rounded(0.5 * (x.double() @ x.double().mT), scores.baddbmm(x, x.mT, alpha=0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_rounded_once_and_keep_their_precision(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(*shape).to(dtype) for shape in ((50, 70), (90, 70), (90,))]
    exact = [value.double().requires_grad_() for value in inputs]
    found = [value.requires_grad_() for value in inputs]
    ahead = torch.randn(50, 90).to(dtype)
    F.linear(*exact).backward(ahead.double())
    F.linear(*found).backward(ahead)
    for a, b in zip(exact[:2], found[:2], strict=True):
        assert b.grad.dtype == dtype
        once_rounded(a.grad, b.grad)


@pytest.mark.parametrize("causal", [True, False])
def test_attention_and_its_gradient(causal: bool) -> None:
    torch.manual_seed(0)
    exact = [torch.randn(2, 4, 30, 16).bfloat16().double().requires_grad_() for _ in range(3)]
    found = [value.detach().bfloat16().requires_grad_() for value in exact]
    ahead = torch.randn(2, 4, 30, 16).bfloat16()
    results = []
    for (q, k, v), given in ((exact, ahead.double()), (found, ahead)):
        mask = torch.zeros(30, 30, dtype=q.dtype)
        mask[:, 25:] = -3.0
        mask = None if causal else mask
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        output.backward(given)
        results.append([output.detach(), q.grad, k.grad, v.grad])
    for a, b in zip(*results, strict=True):
        assert b.dtype == torch.bfloat16
        # The output is rounded before the gradient is made of it.
        torch.testing.assert_close(b.double(), a, rtol=2**-7, atol=2**-7)


def test_float32_is_what_it_was() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(50, 70), torch.randn(90, 70)
    script = (
        "import torch; torch.manual_seed(0); torch.set_num_threads(1)\n"
        "x, weight = torch.randn(50, 70), torch.randn(90, 70)\n"
        "print((x @ weight.t()).double().sum().item().hex())"
    )
    elsewhere = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert (x @ weight.t()).double().sum().item().hex() == elsewhere.strip()


def test_a_processor_that_has_it_keeps_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half, "cpu_has", lambda dtype: True)
    before = list(half._kernels)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        half.widen_products.__wrapped__(dtype)
    assert half._kernels == before


class Stock:
    """A kernel that says in which precisions it was called."""

    def __init__(self) -> None:
        self.seen: list[list[torch.dtype]] = []

    def call_boxed(self, keys: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        self.seen.append([value.dtype for value in tensors])
        return torch.zeros(1) if "out" not in kwargs else kwargs["out"].fill_(3)


def test_what_is_widened_and_what_is_not() -> None:
    stock = Stock()
    run = half._widened(stock, 0, 1, torch.bfloat16)
    wide, narrow = torch.float32, torch.bfloat16
    many, few = torch.ones(half.ROWS, 4), torch.ones(half.ROWS - 1, 4)
    weight = torch.ones(5, 4)
    assert run(None, many.bfloat16(), weight.bfloat16().t()).dtype == narrow
    run(None, few.bfloat16(), weight.bfloat16().t())  # a layer, in generating
    run(None, few.bfloat16(), weight.t().bfloat16().contiguous())  # LoRA's gradient
    run(None, many.bfloat16(), weight.t())  # which PyTorch refuses, and must
    run(None, many.half(), weight.half().t())
    out = torch.zeros(2, dtype=narrow)
    assert run(None, many.bfloat16(), weight.bfloat16().t(), out=out) is out
    assert out.tolist() == [3, 3]
    assert stock.seen == [
        [wide, wide],
        [narrow, narrow],
        [wide, wide],
        [narrow, wide],
        [torch.float16, torch.float16],
        [wide, wide, wide],
    ]


def test_products_of_unlike_precisions_are_still_refused() -> None:
    x = torch.ones(half.ROWS, 8)
    for other in (torch.float32, torch.float16):
        with pytest.raises(RuntimeError, match="dtype"):
            x.bfloat16() @ x.t().to(other)
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(x, x, torch.ones(half.ROWS, dtype=torch.bfloat16))


def test_into_a_tensor_and_in_groups_as_experts_do() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(2, 32, 48).bfloat16()
    out = torch.empty(64, 48, dtype=torch.bfloat16)
    torch.mm(x, weight[0], out=out)
    once_rounded(x.double() @ weight[0].double(), out)
    found = F.grouped_mm(x, weight, offs=torch.tensor([40, 64], dtype=torch.int32))
    parts = [x[:40].double() @ weight[0].double(), x[40:].double() @ weight[1].double()]
    once_rounded(torch.cat(parts), found)
