"""Keys of transformers.TrainingArguments and peft.LoraConfig, old ones too, which tools share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sft.config.foreign import (
    CONVERTED,
    DIFFERS,
    Key,
    Outcome,
    by,
    done,
    fn,
    listed,
    no,
    off,
    same,
    secret,
    to,
)
from sft.config.foreign_evaluation import EVALUATION
from sft.config.model_settings import LoraSection
from sft.config.packages import TRACKERS
from sft.config.rules import named
from sft.config.train_settings import TrainConfig
from sft.config.verdicts import LORA_PASSED, LORA_REFUSED, TRAIN_PASSED, TRAIN_REFUSED

PUSH = "hf upload USER/NAME outputs/RUN/adapter uploads it after the run"
TRACKER = "is set in the environment of the tracker; tracker=wandb, or another, chooses the tracker"
RUN_NAME = "trackers show a run under the name of its folder: run_name=NAME"
FUSED = "sft has its own kernels; such a switch would not change the result"
ZERO = "sft splits the model by DeepSpeed ZeRO: zero=stage3"
VISION = "sft trains on text only"
PREFERENCE = "sft trains by supervised fine-tuning only: no preferences, rewards or RL"
GALORE = "sft has no GaLore; LoRA saves the same memory"
CONSENT = (
    "sft takes this consent on the command line only: add model.trust_remote_code=true there if "
    "the model needs code of its own, after you have read it"
)
ORDER = "sft shuffles rows by the seed alone; train.padding_free joins rows of any length"
BATCH = "train.global_batch_size=N, with N = train.per_device_train_batch_size x {} x GPUs"
OVERWRITE = (
    "give overwrite=true on the command line when you mean it; in a file it would delete the run "
    "instead of resuming it"
)


def targets(value: Any) -> Any:
    """Return target modules: all linear layers, a list of names, or a regular expression."""
    if str(value) in ("all", "all-linear", "['all']", "['all-linear']"):
        return "all-linear"
    is_list = not isinstance(value, str) or re.fullmatch(r"[\w., ]+", value)
    return listed(value) if is_list else value


def report_to(value: Any) -> Outcome:
    """Choose trackers by Transformers' names; those that sft has not are Transformers' own."""
    names = [str(name) for name in listed(value) if str(name) != "none"]
    if not names:
        return same("no tracker is the default; metrics.jsonl has every logged line")
    if names == ["all"]:
        return off("a tracker must be named: tracker=wandb")
    settings: dict[str, Any] = {f"tracker.{name}": True for name in names if name in TRACKERS}
    others = [name for name in names if name not in TRACKERS]
    if others:
        settings["train.extra.report_to"] = others[0] if len(others) == 1 else others
    return Outcome(CONVERTED, settings)


def held_out(value: Any) -> Outcome:
    """Hold out a share of the rows; a number of rows is not known as a share."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return off(f"{value} is no share of the rows: dataset.eval_fraction=0.05")
    if value < 1:
        return Outcome(CONVERTED, {"dataset.eval_fraction": value})
    note = f"a share, not {value} rows: divide {value} by the number of rows"
    return Outcome(DIFFERS, {"dataset.eval_fraction": 0.05}, note)


def deepspeed(value: Any) -> Outcome:
    """Choose the ZeRO stage of a file that comes with a tool; other files are taken as they are."""
    if isinstance(value, dict):
        return off("write the mapping into a JSON file: zero.config=FILE")
    name, text = str(value).rpartition("/")[2].lower(), str(value)
    if name in ("1", "2", "3"):
        return Outcome(CONVERTED, {"zero": f"stage{name}"})
    if name in ("z0", "zero0", "ds_z0_config.json"):
        return Outcome(CONVERTED, {"zero": "none"})
    shipped = "deepspeed_configs/" in text or "examples/deepspeed/" in text or "." not in name
    found = re.match(r"(?:ds_)?z(?:ero)?_?([123])", name)
    is_missing = "/" not in text and not Path(text).is_file()
    if not found or not (shipped or is_missing):
        return Outcome(CONVERTED, {"zero.config": text})
    offload = "_offload" if "offload" in name and found[1] != "1" else ""
    note = "" if shipped else f"there is no file {text} here: sft's own of that stage"
    return Outcome(DIFFERS if note else CONVERTED, {"zero": f"stage{found[1]}{offload}"}, note)


def fsdp(value: Any) -> Outcome:
    """Choose the ZeRO stage that splits the same parts."""
    words = " ".join(map(str, listed(value)))
    stage = "stage2" if "shard_grad_op" in words else "stage3"
    if "no_shard" in words or words in ("False", "0"):
        return same("does not split the model")
    stage += "_offload" if "offload" in words else ""
    note = "sft splits by DeepSpeed ZeRO instead of FSDP"
    return Outcome(DIFFERS, {"zero": stage}, note)


def replaced(name: str) -> Any:
    """Return a function that puts a value into the model's config."""
    setting = f"model.config.{name}"

    def becomes(value: Any) -> Outcome:
        if not isinstance(value, dict):
            return off(f"{setting} needs all values of the model's config: {{rope_type: ..., ...}}")
        return Outcome(CONVERTED, {setting: value})

    return becomes


def dtype(value: Any) -> Outcome:
    """Choose the precision by the data type of the weights."""
    kind = str(value).removeprefix("torch.")
    names = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "half": "fp16"}
    names |= {name: name for name in names.values()}
    if kind not in names:
        return same("precision=auto chooses") if kind == "auto" else off(f"{kind} is no precision")
    note = "sft has one precision for weights and arithmetic; trained adapters are float32"
    return Outcome(DIFFERS, {"precision": names[kind]}, note)


EMBEDDING_RATE = to(
    "train.embedding_learning_rate",
    "sft's is that of trained embeddings and heads too, and not of adapters on the embedding only",
    example=1e-6,
)
DTYPE = fn("precision", dtype, "one precision for weights and arithmetic", "bfloat16")
DEEPSPEED = fn("zero, zero.config", deepspeed, example="zero3")
HELD_OUT = fn("dataset.eval_fraction", held_out, example=0.1)
ACCUMULATION = Key(
    DIFFERS,
    lambda value: Outcome(DIFFERS, note=BATCH.format(value)),
    "train.global_batch_size",
    BATCH.format("accumulation"),
    4,
)
QUANTIZED = {
    "load_in_4bit": by({True: "quantization=nf4", False: ""}),
    "load_in_8bit": by({True: "quantization=int8", False: ""}),
    "bnb_4bit_quant_type": to("quantization.bnb_4bit_quant_type", example="nf4"),
    "bnb_4bit_use_double_quant": to("quantization.bnb_4bit_use_double_quant", example=True),
    "bnb_4bit_compute_dtype": DTYPE,
    "bnb_4bit_quant_storage": to("quantization.extra.bnb_4bit_quant_storage", example="uint8"),
    "llm_int8_threshold": to("quantization.extra.llm_int8_threshold", example=6.0),
}

TRAINING: dict[str, Key] = {
    **{name: to(f"train.{name}") for name in sorted(named(TrainConfig, ours=False))},
    **{name: to(f"train.extra.{name}") for name in sorted(TRAIN_PASSED)},
    **{name: no(reason) for name, reason in TRAIN_REFUSED.items()},
    **dict.fromkeys(("do_train", "do_eval"), done(TRAIN_REFUSED["do_train"])),
    "do_predict": no("sft generate file=ROWS answers rows after training"),
    "eval_strategy": by({False: "train.eval_strategy='no'"}, rest=to("train.eval_strategy")),
    "save_strategy": by(
        {
            False: "train.save_strategy='no'",
            "best": off("train.save_strategy=steps keeps the best"),
        },
        rest=to("train.save_strategy"),
    ),
    "optim": by({"adamw_hf": "train.optim=adamw_torch"}, rest=to("train.optim")),
    "report_to": fn(
        "tracker.tensorboard, ...; train.extra.report_to", report_to, example="tensorboard"
    ),
    "bf16": by({True: "precision=bf16", False: "precision=fp32", "auto": ""}),
    "fp16": by({True: "precision=fp16", False: ""}),
    **dict.fromkeys(("bf16_full_eval", "fp16_full_eval"), done("precision is that of training")),
    "tf32": by({"auto": ""}, rest=to("train.extra.tf32")),
    "gradient_accumulation_steps": ACCUMULATION,
    "auto_find_batch_size": no("set train.per_device_train_batch_size; the global batch stays"),
    "output_dir": to("output_dir"),
    "run_name": to("run_name"),
    "seed": to("seed"),
    "data_seed": to("seed", "sft has one seed, of the data's order too"),
    "deepspeed": DEEPSPEED,
    "fsdp": fn("zero", fsdp, "DeepSpeed ZeRO instead of FSDP", "full_shard"),
    "fsdp_config": done("zero=stage3 needs none of FSDP's options"),
    "parallelism_config": no(ZERO),
    "resume_from_checkpoint": by(
        {True: "", False: ""},
        rest=to("resume.checkpoint", change=lambda path: str(path).rstrip("/").rpartition("/")[2]),
    ),
    "activation_checkpointing": to("train.gradient_checkpointing"),
    "logging_strategy": by({"steps": "", "no": "train.logging_steps=1000000"}),
    "eval_on_start": done("the held-out rows are evaluated before and after training"),
    "average_tokens_across_devices": done("the loss is the mean over the tokens of all ranks"),
    "save_only_model": no("a run could not resume from such a checkpoint"),
    **EVALUATION,
    "label_smoothing_factor": no("the LM head computes nll and dft: train.extra.loss_type", 0, 0.0),
    "dataloader_drop_last": no("rows would be left out without a message"),
    "disable_tqdm": done("the progress bar is shown on a terminal only"),
    "remove_unused_columns": done("the template names the columns that are read"),
    "label_names": done("sft makes the labels"),
    "dataloader_multiprocessing_context": no("sft forks workers, which ignore signals"),
    "accelerator_config": no("each rank makes its own batches"),
    "use_cpu": no("CUDA_VISIBLE_DEVICES= in the environment"),
    "local_rank": done("torchrun sets it"),
    "ignore_data_skip": no("a resumed run would train on some rows twice"),
    "restore_callback_states_from_checkpoint": done("sft restores its counts"),
    "save_on_each_node": no("rank 0 saves, to a folder that all nodes share"),
    "enable_jit_checkpoint": no("a run that SIGTERM stops is saved anyway"),
    **dict.fromkeys(
        (
            *("push_to_hub", "hub_model_id", "hub_strategy", "hub_always_push"),
            *("hub_private_repo", "hub_revision"),
        ),
        no(PUSH),
    ),
    "hub_token": secret("HF_TOKEN in the environment"),
    # Names of older releases.
    "evaluation_strategy": by({False: "train.eval_strategy='no'"}, rest=to("train.eval_strategy")),
    "warmup_ratio": to(
        "train.warmup_steps",
        "below 1 it is a share of all steps",
        example=0.1,
        kind=CONVERTED,
    ),
    "overwrite_output_dir": by({True: "overwrite=true", False: ""}),
    "group_by_length": no(ORDER),
    "per_gpu_train_batch_size": to("train.per_device_train_batch_size"),
    "per_gpu_eval_batch_size": to("train.per_device_eval_batch_size"),
    "no_cuda": no("CUDA_VISIBLE_DEVICES= in the environment"),
    **dict.fromkeys(("save_safetensors", "safe_serialization"), done("files are safetensors")),
    "logging_dir": no("tracker=tensorboard writes into the run's folder"),
    "predict_with_generate": no("dataset.exact_match=200 answers held-out prompts"),
    "sortish_sampler": no(ORDER),
    "include_inputs_for_metrics": no("sft computes the evaluation itself"),
    "torchdynamo": no("train.extra.torch_compile=true compiles the model"),
    "trust_remote_code": no(CONSENT),
}

LORA: dict[str, Key] = {
    **{name: to(f"lora.{name}") for name in sorted(named(LoraSection, ours=False))},
    **{name: to(f"lora.extra.{name}") for name in sorted(LORA_PASSED)},
    **{name: no(reason) for name, reason in LORA_REFUSED.items()},
    "target_modules": to("lora.target_modules", change=targets, example="all-linear"),
    "bias": by({"none": ""}, rest=to("lora.extra.bias")),
    "init_lora_weights": by({True: ""}, rest=to("lora.extra.init_lora_weights")),
    "task_type": by({"CAUSAL_LM": "", "TaskType.CAUSAL_LM": ""}, rest=no("CAUSAL_LM")),
    "peft_type": by({"LORA": ""}),
    "inference_mode": no("an adapter is trained"),
    "fan_in_fan_out": done("PEFT detects the layout of each layer"),
}
