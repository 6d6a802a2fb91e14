"""Every setting: its type, unit, default and rule. This module imports no torch.

The dataclasses declare what is legal; the YAML files in ``conf/`` choose values. A field that
exists upstream (``learning_rate``, ``lora_alpha``, ``bnb_4bit_quant_type``) has upstream's name, so
that a section maps onto the library's class by name.
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
# A wheel has conf/, ds_config/ and assets/ inside the package; a clone has them next to it.
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
# The checks of the audit. Each text follows the number of documents that the check found.
CHECKS = {
    "nothing_trained": "have no trained token, and are left out",
    "never_stops": "train no token that ends the answer",
    "answer_cut": "have an answer that is cut off at dataset.max_length",
    "double_bos": "begin with two BOS tokens",
    "control_tokens": "contain the text of a control token",
    "empty_answers": "have an empty answer, which is not trained",
    "duplicates": "are exact copies of an earlier document",
    "eval_in_train": "are held out and also trained on",
}

OmegaConf.register_new_resolver("assets", lambda path: str(HOME_DIR / "assets" / path))


@dataclass
class ModelConfig:
    """The base model: a name on the Hugging Face hub or a local folder."""

    name: str | None = setting(
        None, "short name, used in run_name; null: the last part of name_or_path"
    )
    name_or_path: str | None = setting(
        None,
        "hub id or local folder of the base model",
        decides=("lora.base_model_name_or_path",),
        example="model.name_or_path=HUB_ID_OR_FOLDER",
    )
    revision: str | None = setting(
        None,
        "branch, tag or commit of the model on the hub; null: the default branch",
        decides=("lora.revision",),
        example="model.revision=COMMIT",
    )
    pretrained: bool = setting(
        True,
        "true: load the pretrained weights; false: start from random weights of the same "
        "architecture",
    )
    trust_remote_code: bool = setting(
        False,
        "true: run the Python code in the model's repository or folder",
        decides=("train.model_init_kwargs", "train.trust_remote_code"),
        example="model.trust_remote_code=true",
    )
    attn_implementation: str | None = setting(
        "auto",
        "attention kernel. packed: ours, for rows that hold several documents; auto: packed if "
        "rows hold several documents, else the architecture's default; null: the architecture's "
        "default",
        one_of(
            *("auto", "packed", "eager", "sdpa"),
            *("flash_attention_2", "flash_attention_3", "flex_attention"),
        ),
        changes_training=False,
    )
    lm_head: str = setting(
        "auto",
        "how the loss is computed. chunked: our loss, on trained positions only, a few at a time; "
        "trl: TRL's loss; plain: the loss of the model's logits; auto: chunked on a CPU, trl on a "
        "GPU",
        one_of("auto", "chunked", "trl", "plain"),
        changes_training=False,
    )
    frozen_linear: str = setting(
        "auto",
        "how frozen linear layers are computed on a CPU. packed: from two more copies of the "
        "weights in oneDNN's layout; plain: from the weights as loaded; auto: packed where that is "
        "faster",
        one_of("auto", "packed", "plain"),
        changes_training=False,
    )


@dataclass
class DatasetConfig:
    """Where rows come from, which are held out for evaluation, and how they become samples."""

    name: str | None = setting(
        None,
        "short name, used in run_name; null: the last part of path, or the names in mix",
        in_data_key=False,
    )
    path: str | None = setting(
        None, "where the rows are: file, folder, pattern, URL (s3://, ...) or hub id"
    )
    subset: str | None = setting(None, "configuration name of the hub dataset")
    split: str = setting("train", "split of the hub dataset to train on")
    eval_path: str | None = setting(None, "file or folder of held-out rows")
    eval_split: str | None = setting(None, "split of the hub dataset to evaluate on")
    eval_fraction: float = setting(0.0, "fraction of rows held out for evaluation", within(0, 1))
    streaming: bool = setting(
        False,
        "true: read only the rows that train.max_steps needs; for data larger than the disk",
    )
    mix: dict[str, Any] = setting(
        {},
        "several sources instead of path: {NAME: {path: ..., weight: W}}; each row is seen W times "
        "per epoch",
    )
    format: str = setting(
        "auto",
        "format of the rows; auto: detected from the column names",
        one_of("auto", *FORMAT_NAMES),
    )
    columns: dict[str, str] = setting(
        {}, "column names of the data by template field, such as {prompt: question}"
    )
    ignore_columns: list[str] = setting(
        [],
        "columns, after renaming, that are left out although their meaning is known, such as "
        "[history, images]; messages.KEY: a key of the messages in that column",
    )
    max_rows: int | None = setting(
        None, "number of rows to read from the start of each source; null: all", at_least(1)
    )
    max_eval_rows: int | None = setting(
        None,
        "number of rows to read from the start of eval_path or eval_split; null: all",
        at_least(1),
    )
    max_length: int = setting(
        1024,
        "maximum number of tokens in a sample",
        at_least(8),
        decides=("train.max_length",),
        called=("max_seq_length", "sequence_len", "cutoff_len"),
    )
    overlong: str = setting(
        "error",
        "what to do with documents longer than max_length. error: stop the run; truncate: cut off "
        "the end; drop: leave them out; split: make several samples. The audit shows their number",
        one_of("truncate", "drop", "split", "error"),
    )
    packing: str = setting(
        "auto",
        "what a sample is. none: one document; bfd: as many whole documents as fit into max_length "
        "(best-fit decreasing); bfd_split: as bfd, but longer documents are split; wrapped: "
        "documents are joined and cut every max_length tokens; boundary: as wrapped, but cut after "
        "dataset.boundary; auto: wrapped for plain text, else none. Documents never attend to each "
        "other",
        one_of("auto", "none", "bfd", "bfd_split", "wrapped", "boundary"),
    )
    boundary: str = setting(
        "\n",
        "with packing=boundary: a block begins after the last such token of the previous block",
    )
    sanitize: bool = setting(
        False,
        "true: plain text loses carriage returns, blank lines and repeated spaces; tabs become "
        "spaces",
    )
    order: str = setting(
        "given",
        "order in which packing joins documents. given: as read; shortest: by length, shortest "
        "first; longest: longest first; random: shuffled with the seed",
        one_of("given", "shortest", "longest", "random"),
    )
    sample: float = setting(1.0, "fraction of the samples to train on, evenly spaced", share())
    max_bad_fraction: float = setting(
        0.0,
        "largest fraction of rows that may not match the format or template; else the run stops",
        within(0, 1),
        in_data_key=False,
    )
    stop_above: dict[str, float] = setting(
        {"nothing_trained": 0.05, "never_stops": 0.5, "double_bos": 0.0},
        "for each check of the audit, the fraction of documents above which the run stops; 1: "
        "never",
        changes_training=False,
        in_data_key=False,
    )
    warn_above: dict[str, float] = setting(
        {
            "nothing_trained": 0.0,
            "never_stops": 0.0,
            "answer_cut": 0.0,
            "control_tokens": 0.0,
            "empty_answers": 0.0,
            "duplicates": 0.01,
            "eval_in_train": 0.0,
        },
        "for each check of the audit, the fraction of documents above which a warning is shown; "
        "1: never",
        changes_training=False,
        in_data_key=False,
    )
    num_proc: int | None = setting(
        None,
        "number of processes that tokenise; null: one per CPU core",
        at_least(1),
        changes_training=False,
        in_data_key=False,
    )
    exact_match: int = setting(
        0,
        "number of held-out prompts answered greedily before and after training; the share of "
        "exact answers is reported; 0: none",
        at_least(0),
        changes_training=False,
        in_data_key=False,
    )


@dataclass
class TemplateConfig:
    """How a row becomes text, and which part of it is trained."""

    name: str | None = setting(None, "short name of the template")
    kind: str = setting(
        "completion",
        "completion: a prompt, then a trained completion; chat: messages in the tokenizer's chat "
        "template; text: plain text, all of it trained",
        one_of("completion", "chat", "text"),
    )
    train_on: str | None = setting(
        None,
        "which tokens are trained; null: the completion (kind=completion), every assistant turn "
        "(kind=chat) or the whole text (kind=text)",
        one_of("completion", "assistant", "last_assistant", "all"),
    )
    chat_template: str | None = setting(
        None,
        "with kind=chat: a Jinja template, a .jinja file, or the name of a template of TRL (qwen3, "
        "llama3, ...); null: the tokenizer's own",
    )
    system: str | None = setting(
        None, "with kind=chat: system message for conversations that do not begin with one"
    )
    prompts: list[str] = setting(
        [], "prompt texts with {column} fields; the first whose columns a row fills is used"
    )
    completions: list[str] = setting(
        [], "texts of the trained part with {column} fields, chosen in the same way"
    )
    append_eos: bool = setting(
        True, "true: append the EOS token to each completion or document (not with kind=chat)"
    )


@dataclass
class LoraSection:
    """The LoRA adapter. Fields are peft.LoraConfig's, except ``enabled`` and ``extra``."""

    enabled: bool = setting(
        True, "true: train an adapter; false: train every weight of the base model", ours=True
    )
    r: int = setting(
        8,
        "rank; a higher rank learns more and takes more memory",
        at_least(1),
        called=("lora_r", "lora_rank"),
    )
    lora_alpha: int = setting(16, "the adapter's output is scaled by lora_alpha / r", at_least(1))
    lora_dropout: float = setting(0.0, "dropout probability on the adapter's input", within(0, 1))
    target_modules: Any = setting(
        "all-linear",
        "which modules get an adapter: 'attention', 'all-linear', a regular expression, or a list "
        "of module names",
    )
    modules_to_save: list[str] | None = setting(
        None, "names of modules that are trained in full and saved with the adapter"
    )
    rank_pattern: dict[str, int] = setting(
        {}, "ranks that differ from r, by module name, such as {q_proj: 16}"
    )
    alpha_pattern: dict[str, int] = setting(
        {}, "values that differ from lora_alpha, by module name, such as {q_proj: 32}"
    )
    use_rslora: bool = setting(
        False, "true: scale the adapter's output by lora_alpha / sqrt(r) instead (rsLoRA)"
    )
    use_dora: bool = setting(
        False, "true: train the magnitude and direction of weights separately (DoRA; slower)"
    )
    extra: dict[str, Any] = setting({}, "any other fields of peft.LoraConfig, by name", ours=True)


@dataclass
class QuantizationConfig:
    """How the frozen base model is stored. Fields are transformers.BitsAndBytesConfig's."""

    load_in_8bit: bool = setting(False, "true: store weights in 8 bits (LLM.int8), 1 byte each")
    load_in_4bit: bool = setting(False, "true: store weights in 4 bits (QLoRA), half a byte each")
    bnb_4bit_quant_type: str = setting("nf4", "data type of 4-bit weights", one_of("nf4", "fp4"))
    bnb_4bit_use_double_quant: bool = setting(
        True, "true: quantise the scales of 4-bit weights too, which saves 0.4 bit per weight"
    )
    extra: dict[str, Any] = setting(
        {}, "any other fields of transformers.BitsAndBytesConfig, by name", ours=True
    )


@dataclass
class ZeroConfig:
    """How DeepSpeed splits the optimizer state, gradients and parameters over ranks."""

    config: str | None = setting(
        None,
        "DeepSpeed configuration: the name of a JSON file in ds_config/, or a path; null: plain "
        "DDP without DeepSpeed",
        changes_training=False,
        decides=("train.deepspeed", "train.fsdp", "train.fsdp_config", "train.parallelism_config"),
        called=("deepspeed",),
        example="zero=stage2",
    )
    overrides: dict[str, Any] = setting(
        {}, "values that replace those of the JSON file, nested as in it", changes_training=False
    )


@dataclass
class TrainConfig:
    """Batch, training length, optimizer, evaluation and saving. Most names are SFTConfig's."""

    global_batch_size: int = setting(
        32,
        "sequences per optimizer step, over all ranks and gradient accumulation",
        at_least(1),
        ours=True,
        decides=("train.gradient_accumulation_steps",),
        called=("batch_size", "gradient_accumulation_steps"),
    )
    per_device_train_batch_size: int = setting(
        4,
        "micro-batch: sequences per rank and forward pass",
        at_least(1),
        changes_training=False,
        decides=("train.auto_find_batch_size",),
        called=("micro_batch_size",),
    )
    per_device_eval_batch_size: int = setting(
        8,
        "sequences per rank and forward pass in evaluation",
        at_least(1),
        changes_training=False,
    )
    num_train_epochs: float = setting(
        3.0, "passes over the training data", above(0), called=("num_epochs", "epochs")
    )
    max_steps: int = setting(
        -1, "number of optimizer steps; -1: num_train_epochs decides", at_least(-1)
    )
    learning_rate: float = setting(
        2e-4,
        "peak learning rate; about 2e-4 for LoRA, 2e-5 for full fine-tuning",
        above(0),
        called=("lr",),
        example="train.learning_rate=2e-4",
    )
    lr_scheduler_type: str = setting(
        "cosine", "learning rate schedule: linear, cosine, cosine_with_min_lr, constant, ..."
    )
    lr_scheduler_kwargs: dict[str, Any] = setting(
        {}, "arguments of the learning rate schedule, such as {min_lr_rate: 0.1}"
    )
    warmup_steps: float = setting(
        0.03,
        "number of warm-up steps; below 1: a fraction of all steps",
        at_least(0),
        called=("warmup_ratio",),
        example="train.warmup_steps=0.03 (below 1 it is a share of all steps)",
    )
    weight_decay: float = setting(0.0, "decoupled weight decay of AdamW", at_least(0))
    max_grad_norm: float = setting(
        1.0, "the gradient norm is clipped to this value; 0: no clipping", at_least(0)
    )
    optim: str = setting(
        "adamw_torch_fused",
        "optimizer: adamw_torch_fused, adamw_8bit, paged_adamw_8bit, adafactor, ...",
    )
    gradient_checkpointing: Any = setting(
        "auto",
        "true: recompute activations in the backward pass, which saves memory and takes a third "
        "more time; auto: only if activations do not fit into the free memory",
        one_of("auto", True, False),
        changes_training=False,
        decides=("train.activation_checkpointing",),
        example="train.gradient_checkpointing=true",
    )
    logging_steps: int = setting(
        10,
        "optimizer steps between logged lines",
        at_least(1),
        changes_training=False,
        decides=("train.logging_strategy",),
    )
    eval_strategy: str = setting(
        "epoch",
        "when to evaluate, besides before and after training",
        one_of("no", "steps", "epoch"),
        changes_training=False,
        decides=("train.eval_on_start",),
        called=("evaluation_strategy",),
    )
    eval_steps: int | None = setting(
        None,
        "optimizer steps between evaluations, with eval_strategy=steps",
        at_least(1),
        changes_training=False,
    )
    save_strategy: str = setting(
        "epoch",
        "when to write a checkpoint",
        one_of("no", "steps", "epoch"),
        changes_training=False,
    )
    save_steps: int = setting(
        500,
        "optimizer steps between checkpoints, with save_strategy=steps",
        at_least(1),
        changes_training=False,
    )
    save_total_limit: int = setting(
        2,
        "number of checkpoints to keep: the newest, and the one with the best evaluation",
        at_least(2),
        changes_training=False,
    )
    merge: bool = setting(
        False,
        "true: after training, merge the adapter into full weights and verify them",
        changes_training=False,
        ours=True,
    )
    on_nan: str = setting(
        "stop",
        "what to do when a loss or gradient is not finite. stop: stop the run; skip: leave out the "
        "update of that step",
        one_of("stop", "skip"),
        changes_training=False,
        ours=True,
    )
    max_loss_jump: float | None = setting(
        None,
        "stop the run when the loss of a step is more than this many times the mean of the 20 "
        "previous steps; null: never",
        above(1),
        changes_training=False,
        ours=True,
    )
    padding_free: Any = setting(
        "auto",
        "true: join the rows of a micro-batch into one row instead of padding them; auto: if the "
        "model's attention can keep them apart",
        one_of("auto", True, False),
        changes_training=False,
        ours=True,
    )
    pad_to_multiple_of: int | None = setting(
        None,
        "pad each batch to a length that is a multiple of this number; null: to its longest row",
        at_least(1),
        changes_training=False,
        ours=True,
    )
    dataloader_num_workers: int = setting(
        0,
        "processes per rank that prepare batches; 0: the training process does",
        at_least(0),
        changes_training=False,
    )
    extra: dict[str, Any] = setting({}, "any other fields of trl.SFTConfig, by name", ours=True)


@dataclass
class ResumeConfig:
    """How the same command resumes a run that was interrupted."""

    checkpoint: str | None = setting(
        None,
        "checkpoint to resume from, such as checkpoint-40; null: the newest complete one",
        changes_training=False,
        decides=("train.resume_from_checkpoint",),
        example="resume.checkpoint=checkpoint-40; without it, the newest is taken",
    )
    allow: list[str] = setting(
        [],
        "what may differ from the run that is resumed: names of settings such as "
        "train.learning_rate, base (the base model) or data",
        changes_training=False,
    )


@dataclass
class Config:
    """The run as a whole: its name, folder, seed and precision."""

    run_name: str | None = setting(
        None,
        "name of the run; null: <model>_<dataset>_r<rank>_seed<seed>",
        changes_training=False,
        decides=("train.run_name",),
        example="run_name=NAME",
    )
    output_dir: str | None = setting(
        None,
        "folder of the run; null: outputs/<run_name>",
        changes_training=False,
        decides=("train.output_dir",),
        example="output_dir=DIR",
    )
    overwrite: bool = setting(
        False,
        "true: delete the run that is already in output_dir and start again",
        changes_training=False,
        called=("overwrite_output_dir",),
        example="overwrite=true",
    )
    seed: int = setting(
        42,
        "seed of the data order, the adapter's initialisation and dropout",
        at_least(0),
        decides=("train.seed", "train.data_seed"),
    )
    precision: str = setting(
        "auto",
        "precision of weights and arithmetic; auto: bf16 on a GPU that supports it or a CPU that "
        "computes faster in it, else fp32",
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
        ValueError: The braces of the text do not match.
    """
    return tuple(name for _, name, _, _ in Formatter().parse(text) if name is not None)


def short_name(path: str) -> str:
    """Return the short name of a model or dataset: ``opt-125m`` for ``facebook/opt-125m``."""
    return Path(path.rstrip("/")).stem if Path(path).is_file() else path.rstrip("/").split("/")[-1]


def packing_of(dataset: DatasetConfig, kind: str) -> Choice:
    """Choose ``dataset.packing``: what a sample is.

    Rows are not packed by default: joining the rows of a micro-batch without padding
    (train.padding_free) is as fast, and a step still has train.global_batch_size rows.

    Args:
        dataset: The dataset section.
        kind: ``template.kind``.
    """
    if dataset.packing != "auto":
        return Choice("dataset.packing", dataset.packing, AS_SET)
    if kind == "text":
        reason = "plain text is joined and cut every dataset.max_length tokens"
        return Choice("dataset.packing", "wrapped", reason)
    reason = "each row is a sample; bfd joins rows up to dataset.max_length"
    return Choice("dataset.packing", "none", reason)


def streamed_samples(config: Config) -> int | None:
    """Return the number of samples that a run with streamed rows needs; None: all samples."""
    if not config.dataset.streaming:
        return None
    return config.train.max_steps * config.train.global_batch_size


def fill_names(config: Config) -> None:
    """Fill in names and the output folder that are null; without a clock, so that ranks agree."""
    for section, path in (
        (config.model, config.model.name_or_path),
        (config.dataset, config.dataset.path),
    ):
        if section.name is None and path:
            section.name = short_name(path)
    # An absolute path stays valid when a later command runs in a different folder.
    if config.model.name_or_path and Path(config.model.name_or_path).is_dir():
        config.model.name_or_path = str(Path(config.model.name_or_path).resolve())
    if config.dataset.name is None and config.dataset.mix:
        config.dataset.name = "+".join(config.dataset.mix)
    if config.run_name is None:
        size = f"r{config.lora.r}" if config.lora.enabled else "full"
        config.run_name = f"{config.model.name}_{config.dataset.name}_{size}_seed{config.seed}"
    if config.output_dir is None:
        config.output_dir = str(Path("outputs") / config.run_name)
