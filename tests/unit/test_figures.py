"""What a logged line says of speed: operations, time, peaks, time left, and the line itself."""

import itertools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import small_models
import torch
from support import FAMILIES, counted
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from sft.config.train_settings import TrainConfig
from sft.data.collator import Collator
from sft.fast import attention, head, linear
from sft.fast import lora as fast_lora
from sft.training.cadence import WithinEpochs
from sft.watch import lines, peaks, scans, scores
from sft.watch.clock import PARTS, Clock, Pace
from sft.watch.operations import Operations

MOE = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
OLMOE = {"intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2}
OLMOE["num_key_value_heads"] = 2
LATENT: dict[str, Any] = {
    **{"intermediate_size": 128, "moe_intermediate_size": 32, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 32},
    **{"kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12},
    **{"num_key_value_heads": 4, "first_k_dense_replace": 1},
}
WINDOWED = {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
NARROW = {**WINDOWED, "sliding_window": 16}


LENGTHS = (37, 20, 51, 12)


def batch(kernel: str, lengths: Sequence[int] = LENGTHS) -> dict[str, Any]:
    """Give rows of 120 tokens in all, the second half of each trained, joined or padded."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(2, 128, (length,), generator=draw).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    joined = kernel == attention.NAME
    return Collator(0, padding_free=joined, documents=joined, loss_positions=True)(rows)


def made(
    family: str,
    trains: str,
    kernel: str,
    kind: str,
    checkpointing: str,
    lora: dict[str, Any],
    changed: dict[str, Any],
) -> Any:
    """Make a two-layer model as training does."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    torch.manual_seed(0)
    common = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    own = FAMILIES.get(family, {})
    fixed: dict[str, Any] = {"vocab_size": 128, "tie_word_embeddings": False, "pad_token_id": 0}
    fixed |= {"bos_token_id": None, "eos_token_id": 1, **({} if "n_embd" in own else common)}
    config = AutoConfig.for_model(family, **{**fixed, **own, **changed})
    model = AutoModelForCausalLM.from_config(config, attn_implementation=kernel)
    head.install(model, kind)
    for name, parameter in model.named_parameters():
        upper = ".1." in name or "head" in name
        parameter.requires_grad_(trains == "all" or (trains == "upper" and upper))
    if trains in ("lora", "fused"):
        all_linear = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**{**all_linear, **lora}))
    if trains == "fused":
        fast_lora.install(model)
        linear.install(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        if checkpointing == "reentrant":
            model.enable_input_require_grads()
    return model.train()


CASES: list[Any] = [
    *(
        (family, trains, kernel, "chunked", checkpointing, {}, {})
        for family, kernel in (("opt", "sdpa"), ("gptj", "eager"), ("qwen3", "sdpa"))
        for trains, checkpointing in (
            ("lora", ""),
            ("all", ""),
            ("upper", ""),
            ("lora", "recorded"),
            ("lora", "reentrant"),
        )
    ),
    ("gpt2", "lora", "sdpa", "chunked", "", {}, {"attn_pdrop": 0.0}),
    ("gpt2", "lora", "sdpa", "chunked", "recorded", {}, {}),  # its dropout needs the scores
    ("llama", "all", "sdpa", "chunked", "", {}, {"tie_word_embeddings": True}),
    ("llama", "fused", "packed", "chunked", "", {}, {}),
    ("llama", "fused", "packed", "chunked", "recorded", {}, {}),
    ("llama", "lora", "eager", "trl", "", {}, {}),
    ("llama", "lora", "sdpa", "plain", "", {}, {}),
    ("llama", "lora", "sdpa", "chunked", "", {"modules_to_save": ["lm_head"]}, {}),
    ("llama", "lora", "sdpa", "chunked", "", {"use_dora": True}, {}),
    ("llama", "lora", "sdpa", "chunked", "", {"use_dora": True, "lora_dropout": 0.1}, {}),
    ("qwen3_moe", "all", "sdpa", "chunked", "", {}, {}),
    ("qwen3_moe", "lora", "sdpa", "chunked", "recorded", {"target_parameters": MOE}, {}),
    ("olmoe", "lora", "sdpa", "chunked", "", {"target_parameters": MOE}, OLMOE),
    ("deepseek_v3", "lora", "sdpa", "chunked", "", {}, LATENT),
    ("gemma3_text", "lora", "sdpa", "chunked", "", {}, WINDOWED),
    *(("gemma3_text", "lora", k, "chunked", "", {}, NARROW) for k in ("packed", "sdpa")),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:5])))
def test_operations_are_those_that_pytorch_counts(case: Any) -> None:
    """In the micro-batch that is watched, and in a later one, which is scaled from it."""
    model, (_, _, kernel, kind, *_) = made(*case), case
    operations = Operations(model, kind, kernel, compiled=False)
    for lengths in (LENGTHS, (90, 70, 20)):
        inputs = batch(kernel, lengths)
        with FlopCounterMode(display=False, custom_mapping=counted()) as counter:
            with operations.micro_batch(inputs):
                loss = model(**inputs, use_cache=False, fused_lm_head=True).loss
                operations.begin_backward()
                loss.backward()
        tokens, needed, done = operations.flush()
        assert tokens == sum(lengths)
        assert done == pytest.approx(counter.get_total_flops(), rel=0.005)
        assert needed <= done


@pytest.mark.parametrize("kind", ["bamba", "minimax", "qwen3_next"])
def test_scans_of_recurrent_layers_are_counted(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own code of them; without its products, 5 to 20 % of the operations are missing."""
    torch.manual_seed(0)
    config = small_models.small_config(kind)
    found = []
    for hidden in (False, True):
        if hidden:  # as by the kernel of a package
            monkeypatch.setattr(scans, "flop_registry", {})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
        for name, parameter in model.named_parameters():
            # FlopCounterMode takes the weight gradient of a depthwise convolution for a full one.
            parameter.requires_grad_("conv1d" not in name)
        head.install(model, "chunked")
        operations, inputs = Operations(model, "chunked", "eager", compiled=False), batch("eager")
        with FlopCounterMode(display=False, custom_mapping=counted()) as counter:
            with operations.micro_batch(inputs):
                loss = model(**inputs, use_cache=False, fused_lm_head=True).loss
                operations.begin_backward()
                loss.backward()
        found.append(operations.flush()[2] / counter.get_total_flops())
        assert bool(operations.left_out) is hidden
    assert found[0] == pytest.approx(1, abs=0.03)
    assert found[1] < found[0] - 0.03


def test_a_frozen_weight_costs_two_thirds_of_a_trained_one() -> None:
    """And checkpointing computes the forward pass again, which the model does not need."""
    found = {}
    for trains, checkpointing in (("all", ""), ("lora", ""), ("lora", "recorded")):
        model = made("llama", trains, "eager", "chunked", checkpointing, {"r": 1}, {})
        operations = Operations(model, "chunked", "eager", compiled=False)
        with operations.micro_batch(batch("eager")):
            loss = model(**batch("eager"), use_cache=False, fused_lm_head=True).loss
            operations.begin_backward()
            loss.backward()
        found[trains, checkpointing] = operations.flush()
    needed = {case: figures[1] for case, figures in found.items()}
    assert 0.6 < needed["lora", ""] / needed["all", ""] < 0.75
    assert needed["lora", "recorded"] == pytest.approx(needed["lora", ""], rel=0.05)
    assert found["lora", "recorded"][2] > 1.3 * needed["lora", "recorded"]


def test_a_layer_that_cannot_be_counted_trains_all_the_same(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "sft")
    model = made("llama", "lora", "eager", "chunked", "", {}, {})
    model.config.v_head_dim = "wide"
    operations, inputs = Operations(model, "chunked", "eager", compiled=False), batch("eager")
    for _ in range(2):
        with operations.micro_batch(inputs):
            model(**inputs, use_cache=False, fused_lm_head=True).loss.backward()
    assert operations.flush() == (240, 0, 0)
    assert [line.message.partition(":")[0] for line in caplog.records] == [
        "operations are not counted"
    ]


@pytest.mark.parametrize(("kernel", "skips"), [("flash_attention_2", True), ("packed", False)])
def test_attention_counts_the_squares_of_documents(kernel: str, skips: bool) -> None:
    """Only a flash kernel skips what is outside of a window; on a CPU it is masked."""
    model = made("llama", "lora", "packed", "chunked", "", {}, {})
    operations = Operations(model, "chunked", kernel, compiled=False)
    places = batch("packed")["position_ids"]
    ids = torch.zeros(1, 120, dtype=torch.int64)
    assert int(operations._pairs(ids, places, 0)) == sum(n * n for n in LENGTHS)
    windowed = sum(n * min(n, 16 if skips else n) for n in LENGTHS)
    assert int(operations._pairs(ids, places, 16)) == windowed
    assert operations._pairs(torch.zeros(4, 51), None, 16) == 4 * 51 * (16 if skips else 51)


@pytest.mark.parametrize(("family", "window"), [("mistral", 16), ("gemma3_text", 16), ("llama", 0)])
def test_the_window_of_a_layer_is_its_own_or_that_of_the_config(family: str, window: int) -> None:
    model = made(family, "all", "sdpa", "chunked", "", {}, NARROW if window else {})
    assert scores.window_of(model.model.layers[0].self_attn) == window


def test_the_parts_of_a_clock_sum_to_all_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("sft.watch.clock.time.perf_counter", lambda: now)
    clock = Clock(torch.device("cpu"))
    clock.mark("data")  # before the start: counts nothing
    clock.start()
    now += 1
    clock.mark("data")
    now += 2
    with clock.part("evaluation"), clock.part("evaluation"):
        now += 4
        with clock.part("saving"):
            now += 8
        now += 16
    now += 32
    found = clock.flush()
    assert tuple(found) == PARTS
    parts = {"data": 1, "compute": 0, "optimizer": 0, "evaluation": 20, "saving": 8, "other": 34}
    assert found == parts
    assert clock.apart == 28  # the save is within the evaluation: counted once
    assert clock.took == {"evaluation": [28], "saving": [8]}
    assert sum(clock.flush().values()) == 0


def test_a_gpu_is_asked_for_its_times_only_when_they_are_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With events as those of CUDA, in whose place there is no GPU: each read is noted."""
    times, waited = itertools.count(), []

    class Event:
        def synchronize(self) -> None:
            waited.append(self)

        def elapsed_time(self, other: Any) -> float:
            assert waited
            return 1000.0 * (other.at - self.at)

    def record(event: Any) -> Any:
        event.at = next(times)
        return event

    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event())
    clock = Clock(torch.device("cpu"))
    clock._stream = SimpleNamespace(record_event=record)  # type: ignore[assignment]
    clock.start()
    for _ in range(300):
        clock.mark("data")
    assert not waited
    for _ in range(300):
        clock.mark("compute")
    assert len(waited) == 1  # the older half, so that they do not pile up
    found = clock.flush()
    assert (found["data"], found["compute"], found["other"]) == (300, 300, 1)


def test_the_first_steps_do_not_spoil_the_time_left() -> None:
    pace, now = Pace(), 0.0
    assert pace.seconds_per_step is None
    for took in (0.0, 60.0, 0.9, *[1.0, 1.2] * 10, 30.0):
        now += took
        pace.step(now)
    assert pace.seconds_per_step == pytest.approx(1.09, abs=0.02)


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
def test_evaluations_and_saves_to_come_are_counted(strategy: str) -> None:
    """After each step, against the list of all of them."""
    train = TrainConfig(global_batch_size=4, evals_per_epoch=3, saves_per_epoch=2)
    within = WithinEpochs(train, 38)  # 10 steps
    args = SimpleNamespace(eval_strategy=strategy, save_strategy=strategy)
    points = {
        "no": (set(), set()),
        "steps": ({*range(7, 27, 7), 26}, {*range(4, 27, 4), 26}),
        "epoch": (
            {step for step in range(1, 26) if within.evaluates_after(step) or step % 10 == 0}
            | {26},
            {step for step in range(1, 26) if step % 10 in within.saves or step % 10 == 0} | {26},
        ),
    }[strategy]
    for step in range(1, 27):
        state = SimpleNamespace(global_step=step, max_steps=26, eval_steps=7, save_steps=4)
        found = within.due(args, state)
        expected = [len([point for point in each if point >= step]) for each in points]
        assert [found["evaluation"], found["saving"]] == expected, step


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989),
        ("NVIDIA H100 PCIe", "bf16", True, 756),
        ("NVIDIA H200", "bf16", False, 989),
        ("NVIDIA A100-SXM4-80GB", "fp16", False, 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", False, 19.5),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156),
        ("NVIDIA A10", "bf16", False, 125),
        ("NVIDIA L4", "bf16", False, 121),
        ("NVIDIA L40S", "bf16", False, 362),
        ("Tesla T4", "fp16", False, 65),
        ("Tesla V100-SXM2-16GB", "fp32", True, 15.7),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
        ("NVIDIA B200", "bf16", False, 2250),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", False, None),
        ("NVIDIA GeForce GTX 1080", "bf16", False, None),
    ],
)
def test_the_peak_of_a_gpu_is_that_of_its_name(
    name: str, precision: str, tf32: bool, tera: float | None
) -> None:
    assert peaks.of_gpu(name, precision, tf32) == (None if tera is None else tera * 1e12)


def test_a_line_fits_and_reads_well() -> None:
    logged = {
        **{"loss": 0.0052, "grad_norm": 0.01391, "learning_rate": 3.27e-8, "epoch": 3.0},
        **{"tokens_per_second": 12345.6, "seconds_per_step": 0.6123, "seconds_left": 4032.2},
        **{"memory_resident": 2**31, "mfu": 0.413},
    }
    line = lines.describe(logged, 750, 1000)
    assert line == (
        "step  750/1000  loss 0.0052  grad norm 0.0139  lr 3.27e-08  12,346 tokens/s  0.612 s/step"
        "  1:07:12 left  2.0 GiB  MFU 41%"
    )
    sizes = {"memory_allocated": 61 * 2**30, "memory_reserved": 70 * 2**30}
    gpu = lines.describe({**logged, **sizes, "memory_device": 75 * 2**30}, 750, 1000)
    assert "  61.0/70.0/75.0 GiB  MFU 41%" in gpu
    assert len(line) <= len(gpu) <= 140
    assert [lines.clock(seconds) for seconds in (0.4, 59.6, 725, 3600, 273_000)] == [
        *("0:00", "1:00", "12:05", "1:00:00", "3 d 03:50")
    ]
