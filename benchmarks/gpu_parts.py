"""Shared by the stages of ``gpu.py``: shapes, rows, models with random weights, and a clock.

Slow imports are inside the functions, so that ``gpu.py`` itself starts quickly.
"""

import contextlib
import gc
import json
import logging
import os
import random
import resource
import shutil
import signal
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from step import MODELS

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "assets" / "tiny"  # the embedded model, whose tokenizer every model here has
PADDING = 256  # its padding token, which no row holds
WORK = Path(os.environ.get("SFT_GPU_WORK", "."))  # a folder that gpu.py makes and removes

LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
LLAMA |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
        "tie_word_embeddings": True,
    },
    "opt-125m": MODELS["opt-125m"],
}
# What a shape becomes on a CPU, where only the code is tried.
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
SMALL |= {"num_key_value_heads": 2, "intermediate_size": 128, "ffn_dim": 128, "head_dim": 16}
SMALL |= {"word_embed_proj_dim": 64}

# Tokens of the prompt and of the completion with its end, of 64 rows: those of databricks-dolly-15k
# (a sample of 5,000 rows, as "### Instruction ... ### Response" prompts, GPT-2's tokenizer) sorted
# by their length and cut into 64 equal parts, of each the median length and the mean share of the
# completion. All rows: mean 183, median 110, 43 % completion; these: 177, 110, 43 %.
LENGTHS = [
    *((18, 4), (20, 5), (20, 7), (20, 10), (20, 12), (22, 12), (22, 14), (23, 15), (23, 16)),
    *((24, 17), (24, 18), (22, 23), (22, 25), (23, 26), (22, 30), (24, 31), (25, 33), (24, 38)),
    *((27, 37), (25, 43), (24, 47), (26, 48), (28, 49), (27, 53), (30, 53), (32, 53), (34, 55)),
    *((33, 60), (27, 69), (36, 65), (35, 70), (33, 76), (32, 80), (40, 76), (39, 80), (44, 80)),
    *((45, 85), (49, 87), (63, 80), (67, 82), (62, 94), (77, 87), (74, 98), (90, 89), (94, 91)),
    *((98, 96), (106, 96), (113, 97), (119, 103), (126, 106), (143, 99), (146, 110), (164, 106)),
    *((167, 117), (185, 119), (192, 131), (226, 120), (239, 136), (254, 150), (304, 143)),
    *((371, 158), (410, 194), (544, 224), (908, 362)),
]


class Skip(Exception):
    """Raised if a stage does not apply; the text gives the reason."""


class Enough(Exception):
    """Raised to end a run as soon as the measurement is complete."""


def end_tree(pid: int) -> None:
    """Kill a process, its group, and all its descendants in any group."""
    below = []
    with contextlib.suppress(Exception):  # psutil may be missing, the process gone
        import psutil

        below = psutil.Process(pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, signal.SIGKILL)
    for process in below:
        with contextlib.suppress(Exception):
            process.kill()


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def device() -> str:
    return "cuda" if has_gpu() else "cpu"


def is_tiny() -> bool:
    """Return whether to use tiny shapes: with ``--tiny``, or because there is no GPU."""
    return bool(os.environ.get("SFT_GPU_TINY")) or not has_gpu()


def needs_gpu() -> None:
    if not has_gpu():
        raise Skip("needs CUDA")


def wait() -> None:
    import torch

    if has_gpu():
        torch.cuda.synchronize()


def clean() -> None:
    """Free a stage's memory, so that the next stage begins with an empty GPU."""
    import torch

    logger = logging.getLogger("sft")
    for handler in list(logger.handlers):  # of the run's own log file
        handler.close()
        logger.removeHandler(handler)
    gc.collect()
    if has_gpu():
        torch.backends.fp32_precision = "ieee"  # a run in 16 bits allows TF32, and so it would stay
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Return the peak memory of tensors on the GPU; on a CPU, that of this process."""
    import torch

    if has_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def config_of(fields: dict[str, Any], **changed: Any) -> Any:
    """Make a Transformers config; a small one if ``is_tiny()``."""
    from transformers import AutoConfig

    fields = {**fields, **changed}
    if is_tiny():
        fields |= {name: value for name, value in SMALL.items() if name in fields}
    fields |= {"bos_token_id": None, "eos_token_id": 258, "pad_token_id": None}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def folder_of(shape: str) -> Path:
    """Write a shape's config, without weights, and the embedded tokenizer."""
    folder = WORK / shape
    if not folder.is_dir():
        config_of(SHAPES[shape]).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / name, folder)
    return folder


def rows_of(shape: str, count: int, longest: int) -> Path:
    """Write rows of random tokens in Dolly's lengths; the completions are trained."""
    path = WORK / f"{shape}-{count}-{longest}.jsonl"
    if path.is_file():
        return path
    draw = random.Random(0)
    lengths = LENGTHS * -(-count // len(LENGTHS))
    draw.shuffle(lengths)
    with path.open("w") as file:
        for prompt, completion in lengths[:count]:
            # The bytes of the embedded tokenizer: sft refuses ids that the tokenizer lacks.
            ids = [draw.randrange(256) for _ in range(prompt + completion - 1)] + [258]
            labels = ([-100] * prompt + ids[prompt:])[:longest]
            file.write(json.dumps({"input_ids": ids[:longest], "labels": labels}) + "\n")
    return path


class Clock:
    """Records time, tokens and loss of each step of any Trainer; the warm-up is separate."""

    def __init__(self, steps: int, warmup: int, profiled: int = 0) -> None:
        self.steps, self.warmup, self.profiled = steps, warmup, profiled
        self.tokens: list[Any] = []  # of each micro-batch: its step, all, trained
        self.losses: list[Any] = []
        self.marks: list[Any] = []
        self.trainer: Any = None
        self.profile: Any = None

    def mark(self) -> Any:
        import torch

        if not has_gpu():
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: int, end: int) -> float:
        """Return the time between the ends of two steps."""
        first, last = self.marks[begin], self.marks[end]
        return first.elapsed_time(last) / 1000 if has_gpu() else last - first

    def rates(self) -> list[float]:
        """Return useful tokens per second of three blocks of steps after the warm-up."""
        wait()
        size = (self.steps - self.warmup) // 3
        starts = [self.warmup - 1 + block * size for block in range(3)]
        return [
            self.count(begin + 1, begin + size, 1) / self.seconds(begin, begin + size)
            for begin in starts
        ]

    def count(self, first: int, last: int, kind: int) -> int:
        """Count tokens of steps (from 0): all but padding (kind 1), or trained ones (kind 2)."""
        return sum(int(seen[kind]) for seen in self.tokens if first <= seen[0] <= last)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the Trainer that is created and run in this block; stop it after its last step."""
        import transformers

        stock_step = transformers.Trainer.training_step
        stock_init = transformers.Trainer.__init__
        clock = self

        def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = (inputs["input_ids"] != PADDING).sum()
            trained = (inputs["labels"] != -100).sum()
            clock.tokens.append((self.state.global_step, tokens, trained))
            loss = stock_step(self, model, inputs, *args, **kwargs)
            clock.losses.append(loss.detach())
            return loss

        class Steps(transformers.TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                clock.marks.append(clock.mark())
                clock.on_step(state.global_step)

        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            stock_init(self, *args, **kwargs)
            clock.trainer = self
            self.add_callback(Steps())

        transformers.Trainer.training_step, transformers.Trainer.__init__ = training_step, init
        try:
            yield
        except Enough:
            wait()
        finally:
            transformers.Trainer.training_step = stock_step
            transformers.Trainer.__init__ = stock_init

    def on_step(self, done: int) -> None:
        """Profile the last steps if that is set, and end the run after them."""
        import torch
        from torch.profiler import ProfilerActivity

        if self.profiled and done == self.steps - self.profiled:
            wait()
            kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * has_gpu()
            self.profile = torch.profiler.profile(activities=kinds)
            self.profile.__enter__()
        if done >= self.steps:
            wait()
            if self.profile is not None:
                self.profile.__exit__(None, None, None)
            raise Enough


def train(shape: str, clock: Clock, *settings: str, base: Path | None = None) -> Any:
    """Train a few steps with sft's own code and random weights that are made on the device.

    Args:
        shape: A name of SHAPES.
        clock: Records the steps, and ends the run.
        settings: Settings of ``sft.train``; of two with one name, the last counts.
        base: A folder with weights to use instead of the shape, with the embedded data.

    Returns:
        The run's config.
    """
    import torch

    import sft.model.base
    from sft.train import fit, main

    given = {
        "model": "hf",
        "model.name_or_path": str(base or folder_of(shape)),
        "output_dir": str(WORK / f"run-{time.monotonic_ns()}"),
        "train.max_steps": str(clock.steps),
        "train.save_strategy": "no",
        "train.eval_strategy": "no",
        "train.warmup_steps": "0",
        "train.logging_steps": "10",
        "dataset.num_proc": "1",
    }
    if base is None:
        given |= {"dataset": "jsonl", "dataset.format": "tokenized", "dataset.eval_fraction": "0"}
    given |= dict(word.split("=", 1) for word in settings)
    config = main.compose([f"{key}={value}" for key, value in given.items()])
    # On the command line this is refused beside LoRA, whose base would be nowhere.
    config.model.pretrained = base is not None
    stock = sft.model.base.load_base

    def on_the_device(*args: Any, **kwargs: Any) -> Any:
        with torch.device(device()):
            return stock(*args, **kwargs)

    clean()
    sft.model.base.load_base = on_the_device if base is None else stock
    try:
        with clock.watching():
            fit(config)
    finally:
        sft.model.base.load_base = stock
    return config


def batch(size: int) -> list[str]:
    return [f"train.{kind}_batch_size={size}" for kind in ("global", "per_device_train")]


def median(values: list[float]) -> float:
    return statistics.median(values)
