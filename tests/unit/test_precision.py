"""The precision of a run: what was measured to be fastest, the same on all ranks and resumes."""

import math
import os
import subprocess
from typing import Any

import pytest
import torch
import warm_python

from sft.errors import ConfigError
from sft.fast import cpu_products, linear, speed
from sft.model.precision import Precision, choose, choose_tf32

NONE: dict[str, Any] = {"cpu_name": "Intel", "avx2": True}
BF16: dict[str, Any] = {"cpu_name": "Intel", "avx512_f": True, "avx512_bf16": True}
WAYS = (speed.FLOAT32, cpu_products.NATIVE, cpu_products.WIDENED, cpu_products.SHORTENED)


def chosen(asked: str, begun: dict[str, str] | None = None) -> tuple[str, str]:
    found = choose(asked, begun)
    return found.value, found.products


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the processor be another, with what is measured there; None: nothing may be."""

    def become(can: dict[str, Any], figures: tuple[float, ...] | None) -> None:
        def speeds() -> dict[str, float]:
            assert figures is not None
            return dict(zip(WAYS, figures, strict=False))

        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
        monkeypatch.setattr(speed, "speeds", speeds)

    return become


@pytest.mark.parametrize(
    ("figures", "auto", "bf16"),
    [
        # GFLOP/s of float32, bf16, bf16 as float32, and that by bf16 instructions.
        ((102.0, 186.0, 73.0, 90.0), "native", "native"),  # AMD Zen 4, a thread
        ((150.0, 81.0, 135.0, 139.0), None, cpu_products.WIDENED),  # Intel, AVX512-BF16 without AMX
        ((100.0, 114.0, 90.0, 114.0), None, cpu_products.NATIVE),  # within what a speed varies
        ((100.0, 60.0, 90.0, 140.0), cpu_products.SHORTENED, cpu_products.SHORTENED),
        (
            (100.0, 60.0, 130.0, 60.0),
            None,
            cpu_products.WIDENED,
        ),  # disturbed
        ((100.0, 120.0, 90.0, 130.0), cpu_products.NATIVE, cpu_products.NATIVE),
    ],
)
def test_the_fastest_is_chosen_where_it_clearly_is(
    processor: Any, figures: tuple[float, ...], auto: str | None, bf16: str
) -> None:
    processor(BF16, figures)
    found = choose("auto")
    assert (found.value, found.products) == (("bf16", auto) if auto else ("fp32", ""))
    assert found.reason.startswith("measured on this CPU: ")
    assert f"float32 {figures[0]:.0f}" in found.reason and "GFLOP/s" in found.reason
    asked = choose("bf16")
    assert (asked.value, asked.products) == ("bf16", bf16)
    assert f"products are computed as {speed.NAMES[bf16]}" in asked.reason


def test_nothing_is_measured_where_nothing_is_to_choose(processor: Any) -> None:
    for can in (NONE, BF16):
        processor(can, None)
        assert choose("fp32") == Precision("precision", "fp32", "as set", "")
        with pytest.raises(ConfigError, match="precision=fp16"):
            choose("fp16")
    processor(NONE, None)
    assert choose("auto") == Precision("precision", "fp32", "the CPU has no bf16", "")
    assert chosen("bf16") == ("bf16", cpu_products.WIDENED)
    assert "computed in float32 and rounded" in choose("bf16").reason


@pytest.mark.parametrize(("has_bf16", "chosen"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_without_bf16_trains_in_fp16(
    monkeypatch: pytest.MonkeyPatch, has_bf16: bool, chosen: str
) -> None:
    """Such as a T4 or V100, on which PyTorch emulates bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: has_bf16 or including_emulation,
    )
    assert choose("auto").value == chosen
    assert choose("auto", {"precision": "fp32"}).value == "fp32"


def test_a_resumed_run_goes_on_with_what_it_began_with(processor: Any) -> None:
    processor(BF16, None)
    for products in (cpu_products.NATIVE, cpu_products.WIDENED, cpu_products.SHORTENED):
        begun = Precision("precision", "bf16", "", products).identity()
        for asked in ("auto", "bf16"):
            assert chosen(asked, begun) == ("bf16", products)
    assert choose("auto", begun).reason.startswith("the run began with it")
    assert chosen("auto", {"precision": "fp32"}) == ("fp32", "")
    processor(NONE, None)  # which cannot compute so
    begun = {"precision": "bf16", "products": cpu_products.NATIVE}
    assert chosen("auto", begun) == ("bf16", cpu_products.WIDENED)
    # A run of before there were figures, or of a GPU, has no way of computing noted.
    processor(BF16, (100.0, 60.0, 90.0, 80.0))
    assert chosen("auto", {"precision": "bf16"}) == ("bf16", cpu_products.WIDENED)


@pytest.mark.parametrize("amd", [True, False])
@pytest.mark.parametrize("ways", [[cpu_products.WIDENED], [cpu_products.NATIVE], list(WAYS[1:])])
def test_a_measurement_leaves_all_as_it_was(
    monkeypatch: pytest.MonkeyPatch, amd: bool, ways: list[str]
) -> None:
    monkeypatch.setattr(linear, "amd_with_avx512", lambda: amd)
    monkeypatch.setattr(cpu_products, "ways", lambda dtype: ways)
    for name, value in (("TOKENS", 16), ("INPUTS", 32), ("OUTPUTS", 48)):
        monkeypatch.setattr(speed, name, value)
    speed._speeds.cache_clear()
    before = torch.get_rng_state(), dict(cpu_products._ways), cpu_products._library
    usual = torch.backends.mkldnn.matmul.fp32_precision
    found = speed.speeds()
    assert list(found) == [speed.FLOAT32, *ways]
    assert all(0 < figure for figure in found.values())
    assert speed.speeds() is found  # measured once in a process
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (cpu_products._ways, cpu_products._library)
    assert torch.backends.mkldnn.matmul.fp32_precision == usual != "bf16"
    speed._speeds.cache_clear()


def test_the_order_decides_what_is_close() -> None:
    figures = {"a": 100.0, "b": 100 * speed.MARGIN, "c": 100 * speed.MARGIN + 0.1}
    assert speed.fastest(figures, ["a", "b"]) == "a"
    assert speed.fastest(figures, ["a", "b", "c"]) == "c"
    assert speed.fastest(figures, ["c", "b", "a"]) == "c"
    assert math.isclose(speed.MARGIN, 1.15)


def test_ranks_share_decisions_before_there_is_a_process_group() -> None:
    from socket import socket

    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = (
        "import os; from sft.ranks import exchange, from_rank_zero as f\n"
        "print(*(f(lambda: [name, os.environ['RANK']]) for name in ('a', 'b')))\n"
        "print(exchange(os.environ['RANK']), exchange(None))"
    )
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [warm_python.executable(), "-c", script],
            env={**os.environ, **shared, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    expected = "['a', '0'] ['b', '0']\n['0', '1'] [None, None]\n"
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == [expected] * 2


def test_small_layers_are_float32_without_a_measurement(processor: Any) -> None:
    processor(BF16, None)
    found = choose("auto", width=128)
    assert (found.value, found.products) == ("fp32", "")
    assert found.reason == "layers of width 128 are too small to gain from bf16 on a CPU"
    processor(BF16, (100.0, 190.0, 75.0, 90.0))
    assert choose("auto", width=512).value == "bf16"
    assert choose("bf16", width=128).value == "bf16"


@pytest.mark.parametrize(
    ("precision", "extra", "on_gpu", "value", "reason"),
    [
        ("bf16", {}, True, True, "precision=bf16 allows it for products that stay in float32"),
        ("fp32", {}, True, False, "precision=fp32 computes products in full float32"),
        ("fp32", {"tf32": True}, True, True, "as set"),
        ("bf16", {"tf32": False}, True, False, "as set"),
        ("bf16", {"tf32": None}, False, False, "there is no GPU with TF32"),
    ],
)
def test_tf32(
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    extra: dict[str, Any],
    on_gpu: bool,
    value: bool,
    reason: str,
) -> None:
    monkeypatch.setattr("transformers.utils.is_torch_tf32_available", lambda: on_gpu)
    found = choose_tf32(precision, extra)
    assert (found.setting, found.value, found.reason) == ("train.extra.tf32", value, reason)


def test_ranks_that_do_not_find_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.errors import RunError
    from sft.ranks import exchange, from_rank_zero

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert from_rank_zero(lambda: [1]) == [1]  # no rank of a launcher's
    assert exchange(2) == [2]
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(RunError, match=r"rank 1 cannot reach rank 0: .*MASTER_ADDR"):
        from_rank_zero(lambda: [1])
    with pytest.raises(RunError, match=r"rank 1 cannot reach the other ranks: .*MASTER_ADDR"):
        exchange(2)


def test_a_run_begun_in_fp16_is_not_told_to_change_its_precision(processor: Any) -> None:
    processor(BF16, None)
    with pytest.raises(ConfigError, match="fix: precision=bf16"):
        choose("fp16")
    with pytest.raises(ConfigError, match="fix: resume this run on a GPU, or run_name=NAME"):
        choose("auto", {"precision": "fp16"})
