"""Real runs: commands as a user types them, and small models of each real architecture."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "assets" / "tiny"
SHARED = Path(os.environ.get("SFT_SHARED", ROOT.parent / "shared"))


# How far the losses of two runs may be apart, as a share, where only the order of float32 sums
# differs: seen are 1 to 2 units in the last place (6e-8), and an update carries them on.
SAME_LOSS = 1e-5


def quick(command: str, overrides: tuple[str, ...]) -> tuple[str, ...]:
    """Leave out the general text, which costs each of hundreds of runs half a second.

    Of a sweep, the words name its folder, so they stay as they are.
    """
    if command != "train" or "-m" in overrides or "train.max_forgetting" in " ".join(overrides):
        return overrides
    return (*overrides, "train.max_forgetting=null")


def run_sft(
    command: str, *overrides: str, ranks: int = 1, cwd: Path, check: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m sft.<command>``, under torchrun where there are several ranks."""
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    result = subprocess.run(
        [*launch, f"sft.{command}", *quick(command, overrides)],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=500,
    )
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


def shown(text: str) -> list[str]:
    """Return a terminal's lines: apply carriage returns and erasures to what was written to it."""
    lines, column = [""], 0
    for part in re.split(r"(\r|\n|\x1b\[K)", text.replace("\r\n", "\n")):
        if part == "\n":
            lines.append("")
            column = 0
        elif part == "\r":
            column = 0
        elif part == "\x1b[K":
            lines[-1] = lines[-1][:column]
        else:
            lines[-1] = lines[-1][:column] + part + lines[-1][column + len(part) :]
            column += len(part)
    return lines


def records(run: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    """List the training losses by step."""
    return [record["loss"] for record in records(run) if "loss" in record]


def assert_same_adapter(found: Path, expected: Path, rate: float, steps: int) -> None:
    """Require that two runs trained the same adapter but for the order of float32 sums.

    Another number of ranks, ZeRO stage or processor adds up a gradient in another order, so that
    its last bits differ. Adam divides a gradient by its own size: an element whose gradient is no
    larger than these bits may move by the learning rate in every step, in either direction. Such
    elements are few and hardly change the loss. All others agree.

    Args:
        found: A run's folder.
        expected: Another run's.
        rate: The largest learning rate.
        steps: Optimizer steps.
    """
    from safetensors.torch import load_file

    one, other = (
        load_file(run / "adapter" / "adapter_model.safetensors") for run in (found, expected)
    )
    assert one.keys() == other.keys()
    apart = total = 0
    for name, tensor in other.items():
        difference = (one[name] - tensor).abs()
        assert difference.max() <= 2 * rate * steps, name
        apart += int((difference > 1e-4 * tensor.abs().max()).sum())
        total += tensor.numel()
    assert apart <= 0.01 * total, f"{apart} of {total} elements differ by over 1e-4 of the largest"


# Nothing of ours computes anything: the way that every fast one must agree with.
PLAIN = [
    "model.lm_head=plain",
    "model.attn_implementation=null",
    "model.frozen_linear=plain",
    "train.padding_free=false",
    "train.gradient_checkpointing=true",
]

FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 512,
        "dropout": 0.0,  # two ways to the same loss are compared
    },
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 512},
    "gpt_neox": {"intermediate_size": 128, "max_position_embeddings": 512},
    "llama": {"intermediate_size": 128, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "qwen3_moe": {
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


def build_model(folder: Path, family: str, tied: bool, **changed: Any) -> Path:
    """Write a two-layer model of a real architecture, with random weights and the tiny tokenizer.

    Nonzero biases and a wide initialisation, so that a lost or doubled one shows in the logits.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    common = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes = {} if "n_embd" in FAMILIES[family] else common
    fixed = {
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(family, **{**fixed, **sizes, **FAMILIES[family], **changed})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build_adapter(folder: Path, base: Path, seed: int = 1, **settings: Any) -> Path:
    """Write an adapter as PEFT does, every trainable number of it moved by a little."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    adapted.save_pretrained(folder)
    return folder


def counted() -> dict[Any, Any]:
    """Give ``FlopCounterMode`` the formulas of operations that it does not know."""
    import torch
    from torch.utils import flop_counter

    def attention(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        return flop_counter.sdpa_flop_count(*shapes[:3])

    def attention_backward(*shapes: Any, out_shape: Any = None, **_: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(*shapes[:4])

    def added(_: Any, a: Any, b: Any, *rest: Any, out_shape: Any = None, **__: Any) -> int:
        return flop_counter.mm_flop(a, b)

    def packed(x: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
        return int(2 * out_shape.numel() * x[-1])

    def grouped(a: Any, b: Any, *rest: Any, out_shape: Any = None, **_: Any) -> int:
        # (rows, in) by (experts, in, out), or the gradient of a weight: (out, rows) by (rows, in)
        return int(2 * a[0] * a[1] * b[-1])

    aten = torch.ops.aten
    return {
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten.addmm_: added,
        aten._grouped_mm: grouped,
        torch.ops.mkldnn._linear_pointwise: packed,
    }
