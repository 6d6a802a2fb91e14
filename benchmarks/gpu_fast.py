"""Stages of ``gpu.py``: the speed of a step, compared with TRL and the hardware, and its memory."""

import functools
import importlib.util
import json
from typing import Any

import gpu_machine
from gpu_parts import (
    SHAPES,
    WORK,
    Clock,
    Skip,
    batch,
    clean,
    device,
    folder_of,
    has_gpu,
    is_tiny,
    median,
    peak_gib,
    rows_of,
    train,
)

PUBLISHED = 12473  # tokens/s: NeMo Automodel's figure of LoRA on Llama-3.1-8B, one H100
RANK = 16
LORA = [f"lora.r={RANK}", f"lora.lora_alpha={2 * RANK}", "lora.target_modules=all-linear"]
STEPS, WARMUP = 15, 3
rates: dict[str, float] = {}  # tokens per second, of the stages of this process

product_peak = functools.cache(gpu_machine.product_peak)


def steps() -> tuple[int, int]:
    return (4, 1) if is_tiny() else (STEPS, WARMUP)


def length_of(shape: str, longest: int) -> int:
    return min(128 if is_tiny() else longest, SHAPES[shape]["max_position_embeddings"])


def data(shape: str, longest: int, samples: int, packing: str) -> list[str]:
    """Return dataset settings for rows with Dolly's lengths, enough for all steps."""
    longest = length_of(shape, longest)
    each = 150 if packing == "none" else longest  # fewer tokens than a row has
    rows = rows_of(shape, 64 + samples * each // 150, longest)
    return [
        f"dataset.path={rows}",
        f"dataset.max_length={longest}",
        f"dataset.packing={packing}",
        "dataset.stop_above.nothing_trained=1",
        "dataset.stop_above.never_stops=1",
    ]


def flop_per_token(model: Any, lengths: list[int], trained: float) -> float:
    """Count the floating-point operations per token of a training step.

    A frozen weight takes 2 forward, and 2 for the gradient of its input; a trained one takes 2 more
    for its own gradient. The head counts for trained tokens only. Attention over a document of n
    tokens, with a width of d over all heads, takes 2 d n^2 per layer forward (causal: half of all
    pairs) and twice that backward. Recomputation is not counted.

    Args:
        model: The model that is trained, adapter included.
        lengths: The lengths of the documents in tokens.
        trained: The share of trained tokens.
    """
    from torch.nn import Linear

    head = model.get_output_embeddings()
    own = head.weight.numel()
    tensors = [m.weight for m in model.modules() if isinstance(m, Linear) and m is not head]
    frozen = sum(w.numel() for w in tensors if not w.requires_grad)
    learnt = sum(w.numel() for w in tensors if w.requires_grad)
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    width = heads * (getattr(text, "head_dim", None) or text.hidden_size // heads)
    context = sum(n * n for n in lengths) / sum(lengths)
    of_head = (6 if head.weight.requires_grad else 4) * own * trained
    return 4 * frozen + 6 * learnt + of_head + 6 * text.num_hidden_layers * width * context


def result(name: str, clock: Clock, rows: str) -> dict[str, Any]:
    """Return the speed, the share of the hardware's peak and the memory of a run."""
    found, peak = clock.rates(), peak_gib()
    first, last = clock.warmup, clock.steps - 1
    tokens, trained = (clock.count(first, last, kind) for kind in (1, 2))
    lengths = [len(json.loads(line)["input_ids"]) for line in open(rows)]
    speed = rates[name] = median(found)
    needed = flop_per_token(clock.trainer.model, lengths, trained / tokens)
    achieved = speed * needed / 1e12
    return {
        "tokens_per_second": speed,
        "blocks": found,
        "tokens_a_step": tokens / (clock.steps - clock.warmup),
        "trained_share": trained / tokens,
        "tflops": achieved,
        "mfu_of_published": achieved / gpu_machine.PUBLISHED_TFLOPS,
        "of_measured_product": achieved / product_peak(),
        "peak_gib": peak,
        "recomputed": clock.trainer.args.gradient_checkpointing,
        "last_loss": float(clock.losses[-1]),
    }


def ours(
    name: str,
    shape: str,
    *settings: str,
    size: int = 1,
    longest: int = 4096,
    packing: str = "bfd",
    profiled: int = 0,
) -> dict[str, Any]:
    """Train with sft."""
    clock = Clock(*steps(), profiled)
    given = data(shape, longest, clock.steps * size, packing)
    train(shape, clock, *given, *batch(size), *LORA, *settings)
    found = result(name, clock, given[0].partition("=")[2])
    if profiled:
        found |= kernels(clock)
    return found


def kernels(clock: Clock) -> dict[str, Any]:
    """List the ten longest operations of the profiled steps, on the GPU and on the host."""
    from torch.autograd import DeviceType

    found: dict[str, Any] = {}
    where = {"host": (DeviceType.CPU, "self_cpu_time_total")}
    if has_gpu():  # kernels, not the operators that start them
        where["gpu"] = (DeviceType.CUDA, "self_device_time_total")
    for name, (kind, of) in where.items():
        events = [e for e in clock.profile.key_averages() if e.device_type == kind]
        events.sort(key=lambda event: -getattr(event, of))
        total = sum(getattr(event, of) for event in events)
        found[f"{name}_milliseconds_a_step"] = total / clock.profiled / 1000
        found[f"{name}_top_ten"] = [
            {"name": e.key[:90], "share": getattr(e, of) / total, "calls": e.count / clock.profiled}
            for e in events[:10]
        ]
    return found


def llama(name: str, *settings: str, size: int = 1, profiled: int = 0) -> dict[str, Any]:
    """Train Llama-3.1-8B's shape, packed to 4,096 tokens."""
    found = ours(name, "llama-3.1-8b", *settings, size=size, profiled=profiled)
    return {**found, "of_nemo_automodel": found["tokens_per_second"] / PUBLISHED}


def trl(name: str, shape: str, size: int = 8, packing: bool = False) -> dict[str, Any]:
    """Train as TRL's documentation does, on the same rows: default settings and a LoraConfig."""
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    clock = Clock(*steps())
    longest, samples = (4096, clock.steps) if packing else (1024, clock.steps * size)
    path = data(shape, longest, samples, "bfd" if packing else "none")[0].partition("=")[2]
    rows = datasets.Dataset.from_list([json.loads(line) for line in open(path)])
    clean()
    args = SFTConfig(
        output_dir=str(WORK / "trl"),
        max_length=length_of(shape, longest),
        packing=packing,
        per_device_train_batch_size=1 if packing else size,
        max_steps=clock.steps,
        learning_rate=2e-4,
        bf16=has_gpu(),
        use_cpu=not has_gpu(),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    set_seed(42)
    with torch.device(device()):
        config = AutoConfig.from_pretrained(folder_of(shape))
        dtype = torch.bfloat16 if has_gpu() else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with clock.watching():
        SFTTrainer(
            model,
            args,
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(folder_of(shape)),
            peft_config=LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        ).train()
    found = result(name, clock, path)
    other = rates.get(name.replace("trl", "ours"))
    return {**found, "ours_is": other and other / found["tokens_per_second"]}


def beside(name: str, shape: str, packing: bool) -> dict[str, Any]:
    """Train with sft the same as ``trl`` trains."""
    size, longest, how = (1, 4096, "bfd") if packing else (8, 1024, "none")
    return ours(name, shape, size=size, longest=longest, packing=how)


def by_peft(name: str, *settings: str) -> dict[str, Any]:
    """Train Llama-3.1-8B's shape with adapters computed by PEFT."""
    from sft.fast import lora

    stock = lora.install
    lora.install = lambda model: 0
    try:
        return llama(name, *settings)
    finally:
        lora.install = stock


def kernel(name: str, attention: str) -> dict[str, Any]:
    """Train with one attention kernel, packed to 1,024 tokens."""
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise Skip("flash_attn is not installed")
    wanted = f"model.attn_implementation={attention}"
    return ours(name, "qwen3-0.6b", wanted, size=4, longest=1024)


def head(name: str, kind: str) -> dict[str, Any]:
    """Train with one kind of LM head, for Qwen3's vocabulary of 151,936 tokens."""
    return ours(name, "qwen3-0.6b", f"model.lm_head={kind}", size=2, longest=2048)


# Shape, tokens in a row, rows in a micro-batch, activations recomputed, further settings.
MEMORY: dict[str, tuple[str, int, int, bool, list[str]]] = {
    "llama-8b-4096": ("llama-3.1-8b", 4096, 1, False, []),
    "llama-8b-2048": ("llama-3.1-8b", 2048, 1, False, []),
    "llama-8b-8192-recomputed": ("llama-3.1-8b", 8192, 1, True, []),
    "llama-1b-4096": ("llama-3.2-1b", 4096, 1, False, []),
    "llama-1b-4x4096": ("llama-3.2-1b", 4096, 4, False, []),
    "llama-1b-4x4096-recomputed": ("llama-3.2-1b", 4096, 4, True, []),
    "llama-1b-4096-full": ("llama-3.2-1b", 4096, 1, False, ["lora=none"]),
    "qwen3-4096": ("qwen3-0.6b", 4096, 1, False, []),
    "qwen3-4x4096": ("qwen3-0.6b", 4096, 4, False, []),
    "qwen3-8x1024": ("qwen3-0.6b", 1024, 8, False, []),
    "qwen3-4096-r128": ("qwen3-0.6b", 4096, 1, False, ["lora.r=128"]),
    "qwen3-4096-full": ("qwen3-0.6b", 4096, 1, False, ["lora=none"]),
    "opt-4x2048": ("opt-125m", 2048, 4, False, []),
    "opt-8x2048-full": ("opt-125m", 2048, 8, False, ["lora=none"]),
}


def memory(which: str) -> dict[str, Any]:
    """Measure the peak memory of one configuration, and compare it with the estimate of sft."""
    import sft.model.base
    import sft.model.precision
    import sft.plan.memory

    shape, longest, size, recomputed, settings = MEMORY[which]
    clock = Clock(steps=3, warmup=1)
    given = data(shape, longest, clock.steps * size, "bfd")
    lora = [] if "lora=none" in settings else LORA
    checkpointing = f"train.gradient_checkpointing={str(recomputed).lower()}"
    config = train(shape, clock, *given, *batch(size), checkpointing, *lora, *settings)
    architecture = sft.model.base.load_architecture(config.model)
    itemsize = sft.model.precision.dtype_of(sft.model.precision.choose("auto").value).itemsize
    text, tokens = architecture.config.get_text_config(), size * length_of(shape, longest)
    kept = 0 if recomputed else sft.plan.memory.activation_bytes(text, tokens, itemsize)
    state = sft.plan.memory.state_bytes(config, architecture.num_parameters(), itemsize, 0)
    estimate = (kept + state) / 2**30
    peak = peak_gib()
    # Where activations are recomputed, sft/plan/memory.py counts weights and optimizer only.
    return {
        "peak_gib": peak,
        "estimate_gib": estimate,
        "of_estimate": peak / estimate,
        "activations_gib": kept / 2**30,
        "state_gib": state / 2**30,
        "margin": sft.plan.memory.MARGIN,
    }
