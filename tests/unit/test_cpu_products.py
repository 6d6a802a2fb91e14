"""16-bit products on a CPU without them are those of hardware that has them."""

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sft.fast import cpu_products


@pytest.fixture(autouse=True, params=[cpu_products.WIDENED, cpu_products.SHORTENED])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Compute both precisions in one way, whatever this processor has, for one test."""
    cpu_products._register()
    ways = {torch.bfloat16: request.param, torch.float16: cpu_products.WIDENED}
    monkeypatch.setattr(cpu_products, "_ways", ways)
    return str(request.param)


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
    added = torch.randn(50, 90).to(dtype)
    exact = added.double() + 0.5 * (x[0].double() @ weight.double().t())
    assert added.addmm_(x[0], weight.t(), alpha=0.5) is added
    once_rounded(exact, added)


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


BF16 = {"avx512_bf16": True}
ARM = {"bf16": True}


@pytest.mark.parametrize(
    ("can", "asked", "found"),
    [
        ({}, None, cpu_products.WIDENED),
        ({}, cpu_products.NATIVE, cpu_products.WIDENED),  # which PyTorch would emulate
        ({}, cpu_products.SHORTENED, cpu_products.WIDENED),
        (BF16, None, cpu_products.NATIVE),
        (BF16, "", cpu_products.NATIVE),
        (BF16, cpu_products.WIDENED, cpu_products.WIDENED),
        (BF16, cpu_products.SHORTENED, cpu_products.SHORTENED),
        (ARM, cpu_products.SHORTENED, cpu_products.NATIVE),
    ],
)
def test_the_way_is_one_that_the_processor_has(
    monkeypatch: pytest.MonkeyPatch, can: dict[str, bool], asked: str | None, found: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    cpu_products.widen_products(torch.bfloat16, asked)
    assert cpu_products._ways[torch.bfloat16] == found
    cpu_products.widen_products(torch.float16, asked)
    assert cpu_products._ways[torch.float16] == cpu_products.WIDENED  # none of these has fp16
    cpu_products.widen_products(torch.float32, asked)
    assert torch.float32 not in cpu_products._ways


def test_a_way_is_looked_up_at_each_call_and_registered_once(way: str) -> None:
    library = cpu_products._library
    for name in (cpu_products.NATIVE, way, cpu_products.NATIVE):
        cpu_products.widen_products(torch.bfloat16, name)
    cpu_products._register()
    assert cpu_products._library is library


class Stock:
    """A kernel that notes in which precisions it was called."""

    def __init__(self) -> None:
        self.seen: list[list[torch.dtype]] = []
        self.instructions: list[str] = []

    def call_boxed(self, keys: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        self.seen.append([value.dtype for value in tensors])
        self.instructions.append(torch.backends.mkldnn.matmul.fp32_precision)
        return torch.zeros(1) if "out" not in kwargs else kwargs["out"].fill_(3)


def test_what_is_widened_and_what_is_not(way: str) -> None:
    stock = Stock()
    run = cpu_products._widened(stock, 0, 1, exact=False)
    wide, narrow = torch.float32, torch.bfloat16
    many, few = torch.ones(cpu_products.ROWS, 4), torch.ones(cpu_products.ROWS - 1, 4)
    weight = torch.ones(5, 4)
    assert run(None, many.bfloat16(), weight.bfloat16().t()).dtype == narrow
    run(None, few.bfloat16(), weight.bfloat16().t())  # a layer, in generating
    run(None, few.bfloat16(), weight.t().bfloat16().contiguous())  # LoRA's gradient
    run(None, many.bfloat16(), weight.t())  # which PyTorch refuses, and must
    run(None, many, weight.t())
    cpu_products._ways[torch.float16] = cpu_products.NATIVE
    run(None, many.half(), weight.half().t())
    out = torch.zeros(2, dtype=narrow)
    assert run(None, many.bfloat16(), weight.bfloat16().t(), out=out) is out
    assert out.tolist() == [3, 3]
    cpu_products._ways[torch.bfloat16] = cpu_products.NATIVE
    run(None, many.bfloat16(), weight.bfloat16().t())
    assert stock.seen == [
        [wide, wide],
        [narrow, narrow],
        [wide, wide],
        [narrow, wide],
        [wide, wide],
        [torch.float16, torch.float16],
        [wide, wide, wide],
        [narrow, narrow],
    ]
    # bf16 instructions are for widened products only: what is float32 itself stays so.
    usual = torch.backends.mkldnn.matmul.fp32_precision
    short = "bf16" if way == cpu_products.SHORTENED else usual
    assert usual != "bf16"
    assert stock.instructions == [short, usual, short, usual, usual, usual, short, usual]


def test_attention_s_weights_are_not_shortened() -> None:
    stock = Stock()
    query = torch.ones(1, 1, cpu_products.ROWS, 4).bfloat16()
    cpu_products._widened(stock, 0, 1, exact=True)(None, query, query, query)
    assert stock.seen == [[torch.float32] * 3]
    assert stock.instructions != ["bf16"]


def test_products_of_unlike_precisions_are_still_refused() -> None:
    x = torch.ones(cpu_products.ROWS, 8)
    for other in (torch.float32, torch.float16):
        with pytest.raises(RuntimeError, match="dtype"):
            x.bfloat16() @ x.t().to(other)
    with pytest.raises(RuntimeError, match="dtype"):
        F.linear(x, x, torch.ones(cpu_products.ROWS, dtype=torch.bfloat16))


def test_into_a_tensor_and_in_groups_as_experts_do() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 32).bfloat16(), torch.randn(2, 32, 48).bfloat16()
    out = torch.empty(64, 48, dtype=torch.bfloat16)
    torch.mm(x, weight[0], out=out)
    once_rounded(x.double() @ weight[0].double(), out)
    found = F.grouped_mm(x, weight, offs=torch.tensor([40, 64], dtype=torch.int32))
    parts = [x[:40].double() @ weight[0].double(), x[40:].double() @ weight[1].double()]
    once_rounded(torch.cat(parts), found)
