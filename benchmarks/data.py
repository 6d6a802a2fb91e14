"""Measure data preparation, from rows to packed blocks: sft, TRL, and plain encode_batch.

    python benchmarks/data.py --rows ROWS.jsonl --tokenizer FOLDER [--processes 1 2] [--runs 3]

Rows have ``prompt`` and ``completion``. Each run is a new process, on the same rows and with the
same number of processes (for encode_batch: threads). The runs of the three alternate, and medians
of tokens per second are compared. The time begins with the rows on disk (sft) or in memory (TRL,
encode_batch) and excludes imports. ``encode_batch`` only encodes: it does not read, render, mask or
pack.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MAX_LENGTH = 2048


def ours(rows: str, tokenizer_path: str, processes: int) -> tuple[int, float]:
    import datasets  # noqa: F401  (not to be timed)
    import filelock  # noqa: F401
    from transformers import AutoTokenizer

    from sft.config.settings import DatasetConfig, TemplateConfig
    from sft.data.prepare import prepare
    from sft.data.template import Template

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    template = TemplateConfig(name="pairs", prompts=["{prompt}"], completions=["{completion}"])
    config = DatasetConfig(
        path=rows,
        max_length=MAX_LENGTH,
        overlong="truncate",
        packing="bfd",
        num_proc=processes,
        stop_above={},
    )
    made = Template(template, tokenizer)
    began = time.perf_counter()
    prepared = prepare(config, made, seed=0)
    return prepared.train.counts.tokens, time.perf_counter() - began


def trl(rows: str, tokenizer_path: str, processes: int) -> tuple[int, float]:
    import datasets
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
    from trl import SFTConfig, SFTTrainer

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = datasets.Dataset.from_list([json.loads(line) for line in open(rows)])
    small = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=len(tokenizer), n_positions=16)
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            output_dir=folder,
            packing=True,
            max_length=MAX_LENGTH,
            dataset_num_proc=None if processes == 1 else processes,
            report_to="none",
            use_cpu=True,
            bf16=False,
        )
        began = time.perf_counter()
        trainer = SFTTrainer(
            GPT2LMHeadModel(small), args, train_dataset=data, processing_class=tokenizer
        )
        seconds = time.perf_counter() - began
    return sum(map(len, trainer.train_dataset["input_ids"])), seconds


def encode_batch(rows: str, tokenizer_path: str, processes: int) -> tuple[int, float]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(Path(tokenizer_path) / "tokenizer.json"))
    texts = [row["prompt"] + row["completion"] for row in map(json.loads, open(rows))]
    began = time.perf_counter()
    tokens = 0
    for start in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(texts[start : start + 1000]):
            tokens += len(encoding.ids)
    return tokens, time.perf_counter() - began


CONTENDERS = {"ours": ours, "trl": trl, "encode_batch": encode_batch}


def measured(name: str, rows: str, tokenizer: str, processes: int) -> float:
    """Run one contender in a new process with an empty cache; return tokens per second."""
    with tempfile.TemporaryDirectory() as cache:
        threads = str(processes)
        environment = os.environ | {
            "SFT_CACHE_DIR": cache,
            "RAYON_NUM_THREADS": threads,
            "TOKENIZERS_PARALLELISM": "false" if processes == 1 else "true",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, __file__, "--only", name, "--rows", rows]
        command += ["--tokenizer", tokenizer, "--processes", threads]
        result = subprocess.run(
            command, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    tokens, seconds = json.loads(result.stdout.splitlines()[-1])
    return tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=CONTENDERS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(CONTENDERS[given.only](given.rows, given.tokenizer, given.processes[0])))
        return
    for processes in given.processes:
        speeds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for _ in range(given.runs):
            for name in CONTENDERS:
                speeds[name].append(measured(name, given.rows, given.tokenizer, processes))
        medians = {name: statistics.median(found) for name, found in speeds.items()}
        for name, found in speeds.items():
            print(
                f"{processes} processes  {name:<13} {medians[name]:>12,.0f} tokens/s  "
                f"({min(found):,.0f} to {max(found):,.0f})"
            )
        print(
            f"{processes} processes  ours / trl = {medians['ours'] / medians['trl']:.2f}, "
            f"ours / encode_batch = {medians['ours'] / medians['encode_batch']:.2f}"
        )


if __name__ == "__main__":
    main()
