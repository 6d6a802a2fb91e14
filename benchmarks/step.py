"""Measure useful tokens per CPU-second of training: sft, TRL, other tools, and the limits.

    python benchmarks/step.py --rows ROWS.jsonl --tokenizer FOLDER [--model opt-125m llama-135m]
        [--precision bf16 fp32] [--steps 8] [--warmup 1] [--runs 3] [--threads 1]
        [--micro 8] [--peer llamafactory=PYTHON axolotl=PYTHON]

Rows have ``prompt`` and ``completion``; the loss is on the completion. Every tool trains LoRA of
rank 8 on the same random weights for an epoch of the same rows, the first ``--steps`` times
``--micro`` of the file, in its own order (packed: an eighth as many blocks per step). Each tool
runs in a separate process, and the tools alternate; the first ``--warmup`` epochs are not counted.
``--peer`` gives the Python of an environment in which LLaMA-Factory or Axolotl is installed. Useful
tokens are all tokens but padding. The share of a product's speed counts the operations that frozen
weights need. On a GPU, wall seconds replace CPU-seconds.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = {
    "opt-125m": {
        "model_type": "opt",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 768,
        "dropout": 0.0,
    },
    "llama-135m": {
        "model_type": "llama",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 50272,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}
LENGTH = 1024


def build(name: str, tokenizer: str, folder: Path) -> None:
    """Write a model with random weights, and a tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    fields = dict(MODELS[name])
    made = AutoTokenizer.from_pretrained(tokenizer)
    made.pad_token = made.pad_token or made.eos_token
    fields |= {"bos_token_id": made.bos_token_id, "eos_token_id": made.eos_token_id}
    torch.manual_seed(0)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    made.save_pretrained(folder)


def take(rows: str, count: int, path: Path) -> None:
    """Write the first rows of a file to another."""
    with open(rows) as every, open(path, "w") as few:
        few.writelines(itertools.islice(every, count))


class Meter:
    """Counts tokens and time of each epoch after the first ``warmup`` epochs."""

    def __init__(self, warmup: int) -> None:
        self.warmup, self.epoch = warmup, 0
        self.tokens = self.trained = 0
        self.began = self.ended = (0.0, 0.0)

    @staticmethod
    def now() -> tuple[float, float]:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter(), time.process_time()

    def begin_epoch(self) -> None:
        """Start an epoch; call this before its first batch is made."""
        self.began = self.now()

    def see(self, inputs: dict[str, Any], pad: int) -> None:
        """Count the tokens of a batch."""
        if self.epoch == self.warmup:
            self.tokens += int((inputs["input_ids"] != pad).sum())
            self.trained += int((inputs["labels"] != -100).sum())

    def end_epoch(self) -> None:
        """End an epoch; call this after its last step."""
        self.ended = self.now()
        self.epoch += 1

    def result(self) -> dict[str, float]:
        """Return the measurements of the last epoch."""
        import torch

        assert self.epoch == self.warmup + 1
        seconds, cpu = (b - a for a, b in zip(self.began, self.ended, strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
        return {
            "tokens": self.tokens,
            "trained": self.trained,
            "seconds": seconds,
            "cpu": cpu,
            "peak": peak,
        }


def watch_trainer(meter: Meter, pad: int) -> None:
    """Measure any Trainer that this process runs."""
    import transformers

    stock = transformers.Trainer.training_step

    def measured(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        meter.see(inputs, pad)
        return stock(self, model, inputs, *args, **kwargs)

    class Epochs(transformers.TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            meter.begin_epoch()

        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            meter.end_epoch()

    transformers.Trainer.training_step = measured
    started = transformers.Trainer.__init__

    def begun(self: Any, *args: Any, **kwargs: Any) -> None:
        started(self, *args, **kwargs)
        self.add_callback(Epochs())

    transformers.Trainer.__init__ = begun


def ours(given: argparse.Namespace, meter: Meter, folder: Path, **settings: str) -> None:
    from sft.train import main

    os.chdir(folder)
    settings = {
        "model.name_or_path": given.folder,
        "dataset.path": given.rows,
        "dataset.eval_fraction": "0",
        "dataset.max_length": str(LENGTH),
        "dataset.overlong": "truncate",
        "dataset.stop_above.nothing_trained": "1",
        "dataset.packing": "none",
        "train.global_batch_size": str(given.micro),
        "train.per_device_train_batch_size": str(given.micro),
        "train.num_train_epochs": str(meter.warmup + 1),
        "train.save_strategy": "no",
        "train.warmup_steps": "0",
        "train.logging_steps": "10",
        "precision": given.precision,
        **settings,
    }
    main(["model=hf", "dataset=jsonl", *(f"{key}={value}" for key, value in settings.items())])


def ours_packed(given: argparse.Namespace, meter: Meter, folder: Path) -> None:
    micro = str(max(1, given.micro // 8))
    sizes = {f"train.{k}_batch_size": micro for k in ("global", "per_device_train")}
    ours(given, meter, folder, **{"dataset.packing": "bfd", **sizes})


def trl(
    given: argparse.Namespace, meter: Meter, folder: Path, packing: bool = False, **fields: Any
) -> None:
    """Train as TRL's documentation does: prompt/completion rows, a LoraConfig, default settings."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    rows = [json.loads(line) for line in open(given.rows)]
    args = SFTConfig(
        output_dir=str(folder / "trl"),
        max_length=LENGTH,
        packing=packing,
        per_device_train_batch_size=max(1, given.micro // 8) if packing else given.micro,
        num_train_epochs=meter.warmup + 1,
        learning_rate=2e-4,
        bf16=given.precision == "bf16",
        use_cpu=given.device == "cpu",
        save_strategy="no",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16" if given.precision == "bf16" else "float32"},
        **fields,
    )
    SFTTrainer(
        given.folder,
        args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(given.folder),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    ).train()


def trl_packed(given: argparse.Namespace, meter: Meter, folder: Path) -> None:
    trl(given, meter, folder, packing=True)


def minimal(given: argparse.Namespace, meter: Meter, folder: Path) -> None:
    """Run the hand-written loop."""
    from minimal import train

    train(given, meter, LENGTH)


def peak(given: argparse.Namespace) -> float:
    """Measure floating-point operations per second of a matrix product in the MLP's shape."""
    import torch

    from sft.fast import cpu_products

    torch.set_num_threads(given.threads)
    dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
    cpu_products.widen_products(dtype)
    size = 8192 if given.device == "cuda" else 1024
    a, b = (torch.randn(size, 4 * 768, dtype=dtype, device=given.device) for _ in range(2))
    found = []
    for _ in range(7):
        began = Meter.now()
        for _ in range(10):
            a @ b.t()
        ended = Meter.now()
        found.append(10 * 2 * size * size * 4 * 768 / (ended[0] - began[0]))
    return max(found)


def llamafactory(given: argparse.Namespace, meter: Meter, folder: Path) -> None:
    """Train with LLaMA-Factory and the settings of its LoRA example."""
    from llamafactory.train.tuner import run_exp

    columns = {"prompt": "prompt", "response": "completion"}
    about = {"rows": {"file_name": given.rows, "columns": columns}}
    (folder / "dataset_info.json").write_text(json.dumps(about))
    run_exp(
        {
            "stage": "sft",
            "do_train": True,
            "finetuning_type": "lora",
            "model_name_or_path": given.folder,
            "dataset": "rows",
            "dataset_dir": str(folder),
            "template": "empty",
            "cutoff_len": LENGTH,
            "output_dir": str(folder / "out"),
            "report_to": "none",
            "overwrite_cache": True,
            "per_device_train_batch_size": given.micro,
            "learning_rate": 2e-4,
            "num_train_epochs": meter.warmup + 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "use_cpu": given.device == "cpu",
            "bf16": given.precision == "bf16",
            "lora_rank": 8,
            "lora_target": "all",
        }
    )


def axolotl(given: argparse.Namespace, meter: Meter, folder: Path) -> None:
    """Train with Axolotl and the settings of its LoRA example, samples not packed."""
    import transformers

    # Of which it has no setting of its own, and without which it refuses bf16.
    fields: Any = transformers.TrainingArguments.__dataclass_fields__
    fields["use_cpu"].default = given.device == "cpu"
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train

    kind = {"field_instruction": "prompt", "field_output": "completion"}
    kind |= {"format": "{instruction}", "no_input_format": "{instruction}"}
    config = {
        "base_model": given.folder,
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_linear": True,
        "sequence_len": LENGTH,
        "datasets": [{"path": given.rows, "ds_type": "json", "type": kind}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "out"),
        "micro_batch_size": given.micro,
        "gradient_accumulation_steps": 1,
        "num_epochs": meter.warmup + 1,
        "learning_rate": 2e-4,
        "optimizer": "adamw_torch",
        "lr_scheduler": "cosine",
        "bf16": given.precision == "bf16",
        "save_strategy": "no",
        # Its Triton kernels know neither OPT nor a CPU.
        **{f"lora_{part}_kernel": given.device == "cuda" for part in ("mlp", "qkv", "o")},
    }
    (folder / "config.yml").write_text(json.dumps(config))
    do_train(load_cfg(str(folder / "config.yml")), argparse.Namespace())


CONTENDERS = {
    "ours": ours,
    "ours, packed": ours_packed,
    "trl": trl,
    "trl, packed": trl_packed,
    "minimal": minimal,
    "llamafactory": llamafactory,
    "axolotl": axolotl,
}


def only(given: argparse.Namespace) -> None:
    """Run one contender in this process."""
    import torch

    torch.set_num_threads(given.threads)
    given.device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.only == "peak":
        print(json.dumps({"flops": peak(given)}))
        return
    from transformers import AutoTokenizer

    pad = AutoTokenizer.from_pretrained(given.folder).pad_token_id
    meter = Meter(given.warmup)
    watch_trainer(meter, pad)
    with tempfile.TemporaryDirectory() as folder:
        CONTENDERS[given.only](given, meter, Path(folder))
        os.chdir("/")
    print(json.dumps(meter.result()))


def measured(
    name: str, python: str, given: argparse.Namespace, precision: str, folder: str
) -> dict[str, float]:
    """Run one contender in a separate process."""
    command = [python, __file__, "--only", name, "--folder", folder]
    command += ["--rows", f"{folder}/rows.jsonl", "--precision", precision]
    for key in ("warmup", "threads", "micro"):
        command += [f"--{key}", str(getattr(given, key))]
    environment = os.environ | {"OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}
    environment |= {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{name}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def sizes(folder: str) -> tuple[int, int]:
    """Count the weights that multiply every token, and those that multiply only trained tokens.

    A frozen weight takes two operations forward and two backward.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    head = model.get_output_embeddings().weight.numel()
    return sum(linear.weight.numel() for linear in linears) - head, head


def compare(model: str, precision: str, given: argparse.Namespace, folder: str) -> None:
    import torch

    gpu = torch.cuda.is_available()
    clock = "seconds" if gpu else "cpu"
    peers = dict(peer.split("=", 1) for peer in given.peer)
    here = set(CONTENDERS) - {"llamafactory", "axolotl"}
    names = [name for name in given.tools if name in here | set(peers)]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    peaks = []
    for _ in range(given.runs):
        peaks.append(measured("peak", sys.executable, given, precision, folder)["flops"])
        for name in list(runs):
            python = peers.get(name, sys.executable)
            try:
                runs[name].append(measured(name, python, given, precision, folder))
            except RuntimeError as error:
                print(f"{error}\nleft out", file=sys.stderr)
                del runs[name]
    speeds = {
        name: statistics.median(run["tokens"] / run[clock] for run in found)
        for name, found in runs.items()
    }
    body, head = sizes(folder)
    print(f"\n{model}, {precision}, LoRA r=8, {given.micro} rows a step, medians of {given.runs}")
    print(f"matrix product: {statistics.median(peaks) / 1e9:,.0f} GFLOP/s")
    unit = "s" if gpu else "CPU-s"
    print(
        f"{'':<14}{'tokens/' + unit:>14}{'trained':>9}{'peak GiB':>10}{'of product':>12}  ours/it"
    )
    for name, found in runs.items():
        share = statistics.median(run["trained"] / run["tokens"] for run in found)
        memory = statistics.median(run["peak"] for run in found)
        print(
            f"{name:<14}{speeds[name]:>14,.0f}{share:>9.0%}{memory:>10.2f}"
            f"{speeds[name] * 4 * (body + share * head) / statistics.median(peaks):>12.0%}"
            f"{speeds['ours'] / speeds[name]:>11.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--tokenizer")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16"])
    parser.add_argument("--tools", nargs="+", default=list(CONTENDERS))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peer", nargs="*", default=[])
    parser.add_argument("--only")
    parser.add_argument("--folder")
    given = parser.parse_args()
    if given.only:
        given.precision = given.precision[0]
        only(given)
        return
    for model in given.model:
        with tempfile.TemporaryDirectory() as folder:
            build(model, given.tokenizer, Path(folder))
            take(given.rows, given.steps * given.micro, Path(folder, "rows.jsonl"))
            for precision in given.precision:
                compare(model, precision, given, folder)


if __name__ == "__main__":
    main()
