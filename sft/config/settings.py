"""Every setting: its type, unit, default and rule. Imports no torch.

Python says what is legal here; the YAML files in ``conf/`` choose. Field names that exist
upstream (``learning_rate``, ``lora_alpha``, ``bnb_4bit_quant_type``) are upstream's own, so that a
section maps onto the library's class by name.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from omegaconf import OmegaConf

from sft.config.rules import AS_SET, Choice, above, at_least, one_of, setting, share, within

PACKAGE_DIR = Path(__file__).resolve().parents[1]
# A wheel carries conf/, ds_config/ and assets/ inside the package; a clone has them beside it.
HOME_DIR = PACKAGE_DIR if (PACKAGE_DIR / "conf").is_dir() else PACKAGE_DIR.parent
CONF_DIR = HOME_DIR / "conf"
DS_CONFIG_DIR = HOME_DIR / "ds_config"

FORMAT_NAMES = (
    "prompt_completion",
    "alpaca",
    "question_answer",
    "messages",
    "sharegpt",
    "text",
    "tokenized",
    "columns",
)
# What the audit looks for in the documents, and how it says so.
CHECKS = {
    "nothing_trained": "have nothing trained, and are left out",
    "never_stops": "train no token that ends the answer",
    "answer_cut": "lost the end of the answer to max_length",
    "double_bos": "begin with two BOS tokens",
    "control_tokens": "write a control token in their text",
    "duplicates": "are exact copies of another",
    "eval_in_train": "are held out and also trained on",
}

OmegaConf.register_new_resolver("assets", lambda path: str(HOME_DIR / "assets" / path))


@dataclass
class ModelConfig:
    """The base model: a name on the Hugging Face hub or a local folder."""

    name: str | None = setting(None, "short name, used in run_name; null: from name_or_path")
    name_or_path: str | None = setting(
        None,
        "hub id or local folder",
        decides=("lora.base_model_name_or_path",),
        example="model.name_or_path=HUB_ID_OR_FOLDER",
    )
    revision: str | None = setting(
        None,
        "branch, tag or commit on the hub",
        decides=("lora.revision",),
        example="model.revision=COMMIT",
    )
    pretrained: bool = setting(True, "false: random weights of the same architecture")
    trust_remote_code: bool = setting(
        False,
        "run Python code that comes with the model",
        decides=("train.model_init_kwargs", "train.trust_remote_code"),
        example="model.trust_remote_code=true",
    )
    attn_implementation: str | None = setting(
        "auto",
        "attention kernel; auto: packed (ours) where a row holds several documents, else the "
        "architecture's; null: the architecture's",
        one_of(
            *("auto", "packed", "eager", "sdpa"),
            *("flash_attention_2", "flash_attention_3", "flex_attention"),
        ),
        changes_training=False,
    )
    lm_head: str = setting(
        "auto",
        "how the loss is computed. chunked: ours, of trained positions, a few at a time; trl: "
        "TRL's; plain: from the model's logits; auto: chunked on a CPU, trl on a GPU",
        one_of("auto", "chunked", "trl", "plain"),
        changes_training=False,
    )
    frozen_linear: str = setting(
        "auto",
        "how layers that are not trained are computed on a CPU. packed: weights kept twice more, "
        "in oneDNN's own layout; plain: as they are; auto: packed where that is faster",
        one_of("auto", "packed", "plain"),
        changes_training=False,
    )


@dataclass
class DatasetConfig:
    """Where rows come from, which are kept for evaluation, and how long a sample may be."""

    name: str | None = setting(
        None, "short name, used in run_name; null: from path", in_data_key=False
    )
    path: str | None = setting(None, "file, folder, pattern, URL (s3://, ...) or hub id")
    subset: str | None = setting(None, "the hub dataset's configuration name")
    split: str = setting("train", "hub split to train on")
    eval_path: str | None = setting(None, "file or folder of held-out rows")
    eval_split: str | None = setting(None, "hub split to evaluate on")
    eval_fraction: float = setting(0.0, "share of rows held out for evaluation", within(0, 1))
    streaming: bool = setting(
        False, "read only as many rows as train.max_steps takes; for what does not fit a disk"
    )
    mix: dict[str, Any] = setting(
        {}, "several sources instead of path: {name: {path: ..., weight: times seen an epoch}}"
    )
    format: str = setting(
        "auto",
        "what a row is; auto: told by its columns",
        one_of("auto", *FORMAT_NAMES),
    )
    columns: dict[str, str] = setting({}, "template field: column of the data that holds it")
    max_rows: int | None = setting(None, "read the first rows of each source only", at_least(1))
    max_eval_rows: int | None = setting(None, "evaluate on the first rows only", at_least(1))
    max_length: int = setting(
        1024,
        "tokens in a sample, at most",
        at_least(8),
        decides=("train.max_length",),
        called=("max_seq_length", "sequence_len", "cutoff_len"),
    )
    overlong: str = setting(
        "error",
        "documents over max_length: stop, cut at the end, drop, or split; counted and shown",
        one_of("truncate", "drop", "split", "error"),
    )
    packing: str = setting(
        "auto",
        "what a sample is. none: a document; bfd: as many as fit, none cut (bfd_split: long ones "
        "split); wrapped: documents joined, cut every max_length; boundary: cut after dataset."
        "boundary; auto: wrapped for plain text, else none. Documents never see each other",
        one_of("auto", "none", "bfd", "bfd_split", "wrapped", "boundary"),
    )
    boundary: str = setting("\n", "packing=boundary: a block begins after the last such token")
    sanitize: bool = setting(False, "plain text: no carriage returns, tabs, blank lines, spaces")
    order: str = setting(
        "given",
        "of documents that are joined",
        one_of("given", "shortest", "longest", "random"),
    )
    sample: float = setting(1.0, "share of the blocks trained on, evenly spaced", share())
    max_bad_fraction: float = setting(
        0.0,
        "share of rows that may not fit before the run is stopped",
        within(0, 1),
        in_data_key=False,
    )
    stop_above: dict[str, float] = setting(
        {"nothing_trained": 0.05, "never_stops": 0.5, "double_bos": 0.0},
        "audit check: share of documents above which the run is stopped; 1: never",
        changes_training=False,
        in_data_key=False,
    )
    warn_above: dict[str, float] = setting(
        {
            "nothing_trained": 0.0,
            "never_stops": 0.0,
            "answer_cut": 0.0,
            "control_tokens": 0.0,
            "duplicates": 0.01,
            "eval_in_train": 0.0,
        },
        "likewise, above which a warning is shown",
        changes_training=False,
        in_data_key=False,
    )
    num_proc: int | None = setting(
        None,
        "processes that tokenise; null: all cores",
        at_least(1),
        changes_training=False,
        in_data_key=False,
    )
    exact_match: int = setting(
        0,
        "eval rows answered greedily before and after training and compared; 0: none",
        at_least(0),
        changes_training=False,
        in_data_key=False,
    )


@dataclass
class TemplateConfig:
    """How a row becomes text, and which part of it is trained."""

    name: str | None = setting(None, "short name")
    kind: str = setting(
        "completion",
        "completion: prompt + trained completion; chat: the tokenizer's chat template; "
        "text: the whole row is trained",
        one_of("completion", "chat", "text"),
    )
    train_on: str | None = setting(
        None,
        "what the loss sees; null: completion, or every assistant turn, or all of a text",
        one_of("completion", "assistant", "last_assistant", "all"),
    )
    chat_template: str | None = setting(
        None, "chat only: Jinja, a .jinja file, or one of TRL's (qwen3, llama3, ...); null: its own"
    )
    system: str | None = setting(None, "system message (chat only)")
    prompts: list[str] = setting([], "texts with {column}; the first whose columns a row fills")
    completions: list[str] = setting([], "likewise, for the trained part")
    append_eos: bool = setting(True, "end a completion or document with the EOS token (not chat)")


@dataclass
class LoraSection:
    """The adapter. Fields are peft.LoraConfig's, but for ``enabled``."""

    enabled: bool = setting(True, "false: train every weight of the base model", ours=True)
    r: int = setting(
        8,
        "rank; higher learns more and takes more memory",
        at_least(1),
        called=("lora_r", "lora_rank"),
    )
    lora_alpha: int = setting(16, "the delta is scaled by lora_alpha / r", at_least(1))
    lora_dropout: float = setting(0.0, "dropout on the adapter's input", within(0, 1))
    target_modules: Any = setting(
        "all-linear", "'attention', 'all-linear', or a list of module names"
    )
    modules_to_save: list[str] | None = setting(None, "modules trained in full, beside the adapter")
    rank_pattern: dict[str, int] = setting({}, "module name: its own rank")
    alpha_pattern: dict[str, int] = setting({}, "module name: its own lora_alpha")
    use_rslora: bool = setting(False, "scale by lora_alpha / sqrt(r)")
    use_dora: bool = setting(False, "learn magnitude and direction apart (slower)")
    extra: dict[str, Any] = setting({}, "any other field of peft.LoraConfig", ours=True)


@dataclass
class QuantizationConfig:
    """The frozen base model's storage. Fields are transformers.BitsAndBytesConfig's."""

    load_in_8bit: bool = setting(False, "LLM.int8: 1 byte a weight")
    load_in_4bit: bool = setting(False, "QLoRA: half a byte a weight")
    bnb_4bit_quant_type: str = setting("nf4", "4-bit code", one_of("nf4", "fp4"))
    bnb_4bit_use_double_quant: bool = setting(True, "quantise the scales too: 0.4 bit a weight")
    extra: dict[str, Any] = setting({}, "any other field of BitsAndBytesConfig", ours=True)


@dataclass
class ZeroConfig:
    """DeepSpeed's partitioning of optimizer, gradients and parameters over ranks."""

    config: str | None = setting(
        None,
        "a JSON in ds_config/ or a path; null: plain DDP",
        changes_training=False,
        decides=("train.deepspeed", "train.fsdp", "train.fsdp_config", "train.parallelism_config"),
        called=("deepspeed",),
        example="zero=stage2",
    )
    overrides: dict[str, Any] = setting({}, "deep-merged over the JSON", changes_training=False)


@dataclass
class TrainConfig:
    """Batch, length of training, optimizer, evaluation and saving. Names are SFTConfig's."""

    global_batch_size: int = setting(
        32,
        "sequences per optimizer step, over all ranks and accumulation",
        at_least(1),
        ours=True,
        decides=("train.gradient_accumulation_steps",),
        called=("batch_size", "gradient_accumulation_steps"),
    )
    per_device_train_batch_size: int = setting(
        4,
        "sequences per rank per forward",
        at_least(1),
        changes_training=False,
        decides=("train.auto_find_batch_size",),
        called=("micro_batch_size",),
    )
    per_device_eval_batch_size: int = setting(
        8, "likewise in evaluation", at_least(1), changes_training=False
    )
    num_train_epochs: float = setting(
        3.0, "passes over the data", above(0), called=("num_epochs", "epochs")
    )
    max_steps: int = setting(-1, "optimizer steps; -1: num_train_epochs decides", at_least(-1))
    learning_rate: float = setting(
        2e-4,
        "peak; about 2e-4 for LoRA, 2e-5 in full",
        above(0),
        called=("lr",),
        example="train.learning_rate=2e-4",
    )
    lr_scheduler_type: str = setting("cosine", "linear, cosine, cosine_with_min_lr, constant, ...")
    lr_scheduler_kwargs: dict[str, Any] = setting({}, "such as {min_lr_rate: 0.1}")
    warmup_steps: float = setting(
        0.03,
        "below 1: a share of all steps; else steps",
        at_least(0),
        called=("warmup_ratio",),
        example="train.warmup_steps=0.03 (below 1 it is a share of all steps)",
    )
    weight_decay: float = setting(0.0, "AdamW's decoupled decay", at_least(0))
    max_grad_norm: float = setting(1.0, "gradient norm is clipped to this; 0: never", at_least(0))
    optim: str = setting(
        "adamw_torch_fused", "adamw_torch_fused, adamw_8bit, paged_adamw_8bit, adafactor, ..."
    )
    gradient_checkpointing: Any = setting(
        "auto",
        "recompute activations in the backward pass, a third more time; auto: where they do not "
        "fit the memory",
        one_of("auto", True, False),
        changes_training=False,
        decides=("train.activation_checkpointing",),
        example="train.gradient_checkpointing=true",
    )
    logging_steps: int = setting(
        10,
        "steps between logged lines",
        at_least(1),
        changes_training=False,
        decides=("train.logging_strategy",),
    )
    eval_strategy: str = setting(
        "epoch",
        "when to evaluate, besides before and after",
        one_of("no", "steps", "epoch"),
        changes_training=False,
        decides=("train.eval_on_start",),
        called=("evaluation_strategy",),
    )
    eval_steps: int | None = setting(
        None, "steps between evaluations", at_least(1), changes_training=False
    )
    save_strategy: str = setting(
        "epoch",
        "when to write a checkpoint",
        one_of("no", "steps", "epoch"),
        changes_training=False,
    )
    save_steps: int = setting(500, "steps between checkpoints", at_least(1), changes_training=False)
    save_total_limit: int = setting(
        2,
        "checkpoints kept: the best of those evaluated, and the newest",
        at_least(2),
        changes_training=False,
    )
    merge: bool = setting(
        False,
        "true: when training is done, fold the adapter into full weights, and verify them",
        changes_training=False,
        ours=True,
    )
    on_nan: str = setting(
        "stop",
        "where a loss or its gradient is not finite: stop, or skip the step's update",
        one_of("stop", "skip"),
        changes_training=False,
        ours=True,
    )
    max_loss_jump: float | None = setting(
        None,
        "stop where a step's loss is over so many times the mean of the 20 before; null: never",
        above(1),
        changes_training=False,
        ours=True,
    )
    padding_free: Any = setting(
        "auto",
        "join a micro-batch into one row instead of padding it; auto: where attention allows it",
        one_of("auto", True, False),
        changes_training=False,
        ours=True,
    )
    pad_to_multiple_of: int | None = setting(
        None, "round a batch's length up", at_least(1), changes_training=False, ours=True
    )
    dataloader_num_workers: int = setting(
        0, "processes that prepare batches", at_least(0), changes_training=False
    )
    extra: dict[str, Any] = setting({}, "any other field of trl.SFTConfig", ours=True)


@dataclass
class ResumeConfig:
    """How the same command goes on with a run that was cut off."""

    checkpoint: str | None = setting(
        None,
        "go on from this one, such as checkpoint-40; null: from the newest complete one",
        changes_training=False,
        decides=("train.resume_from_checkpoint",),
        example="resume.checkpoint=checkpoint-40; without it, the newest is taken",
    )
    allow: list[str] = setting(
        [],
        "what may differ from the run's: settings such as train.learning_rate, or base, data",
        changes_training=False,
    )


@dataclass
class Config:
    """One run."""

    run_name: str | None = setting(
        None,
        "null: <model>_<dataset>_r<rank>_seed<seed>",
        changes_training=False,
        decides=("train.run_name",),
        example="run_name=NAME",
    )
    output_dir: str | None = setting(
        None,
        "the run's folder; null: outputs/<run_name>",
        changes_training=False,
        decides=("train.output_dir",),
        example="output_dir=DIR",
    )
    overwrite: bool = setting(
        False,
        "true: delete a run that is already in the folder",
        changes_training=False,
        called=("overwrite_output_dir",),
        example="overwrite=true",
    )
    seed: int = setting(
        42,
        "of data order, adapter initialisation and dropout",
        at_least(0),
        decides=("train.seed", "train.data_seed"),
    )
    precision: str = setting(
        "auto",
        "of weights and arithmetic; auto: bf16 where a GPU has it or a CPU computes faster in it, "
        "else fp32",
        one_of("auto", "fp32", "bf16", "fp16"),
        decides=("train.bf16", "train.fp16", "train.bf16_full_eval", "train.fp16_full_eval"),
        called=("bf16",),
        example="precision=bf16",
    )
    model: ModelConfig = field(default_factory=ModelConfig)
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    template: TemplateConfig = field(default_factory=TemplateConfig)
    lora: LoraSection = field(default_factory=LoraSection)
    quantization: QuantizationConfig = field(default_factory=QuantizationConfig)
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    resume: ResumeConfig = field(default_factory=ResumeConfig)


@functools.cache  # called for every row
def columns_of(text: str) -> tuple[str, ...]:
    """List the ``{column}`` fields of a template's text.

    Raises:
        ValueError: Its braces do not match.
    """
    return tuple(name for _, name, _, _ in Formatter().parse(text) if name is not None)


def short_name(path: str) -> str:
    """Name a model or dataset after its path: ``facebook/opt-125m`` is ``opt-125m``."""
    return Path(path.rstrip("/")).stem if Path(path).is_file() else path.rstrip("/").split("/")[-1]


def packing_of(dataset: DatasetConfig, kind: str) -> Choice:
    """Choose ``dataset.packing``: what a sample is.

    Rows are not packed by default: those of a batch are joined without padding (train.padding_free)
    just as fast, and a step goes on holding as many rows as train.global_batch_size says.

    Args:
        dataset: The dataset section.
        kind: Of the template.
    """
    if dataset.packing != "auto":
        return Choice("dataset.packing", dataset.packing, AS_SET)
    if kind == "text":
        reason = "plain text is joined and cut every dataset.max_length tokens"
        return Choice("dataset.packing", "wrapped", reason)
    reason = "each row is a sample; bfd joins rows up to dataset.max_length"
    return Choice("dataset.packing", "none", reason)


def streamed_samples(config: Config) -> int | None:
    """Count the samples that a run takes, where its rows are streamed; None: all there are."""
    if not config.dataset.streaming:
        return None
    return config.train.max_steps * config.train.global_batch_size


def fill_names(config: Config) -> None:
    """Give names and the output folder that were left out; no clock, so that ranks agree."""
    for section, path in (
        (config.model, config.model.name_or_path),
        (config.dataset, config.dataset.path),
    ):
        if section.name is None and path:
            section.name = short_name(path)
    # A folder of the user's is found again from anywhere.
    if config.model.name_or_path and Path(config.model.name_or_path).is_dir():
        config.model.name_or_path = str(Path(config.model.name_or_path).resolve())
    if config.dataset.name is None and config.dataset.mix:
        config.dataset.name = "+".join(config.dataset.mix)
    if config.run_name is None:
        size = f"r{config.lora.r}" if config.lora.enabled else "full"
        config.run_name = f"{config.model.name}_{config.dataset.name}_{size}_seed{config.seed}"
    if config.output_dir is None:
        config.output_dir = str(Path("outputs") / config.run_name)
