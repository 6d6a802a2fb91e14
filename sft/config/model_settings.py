"""The settings of the sections model, lora and quantization: the base model and the adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.config.rules import (
    HUB_KERNEL,
    LARGEST_RANK,
    at_least,
    between,
    each,
    one_of,
    or_matching,
    setting,
    within,
)


@dataclass
class ModelConfig:
    """The base model: a name on the Hugging Face hub or a local folder."""

    name: str | None = setting(
        None, "short name, used in run_name; null: the last part of name_or_path"
    )
    name_or_path: str | None = setting(
        None,
        "hub id or local folder of the base model",
        path="read",
        decides=("lora.base_model_name_or_path",),
    )
    revision: str | None = setting(
        None,
        "branch, tag or commit of the model on the hub; null: the default branch",
        decides=("lora.revision",),
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
    )
    config: dict[str, Any] = setting(
        {}, "values that replace those of the model's config.json, such as {rope_theta: 1000000}"
    )
    eos_token: str | None = setting(None, "token that ends a text; null: the tokenizer's own")
    pad_token: str | None = setting(
        None, "token that pads a batch; null: the tokenizer's own, or its EOS token if it has none"
    )
    new_tokens: Any = setting(
        None,
        "tokens that are added to the tokenizer and the model: a list, {TOKEN: DESCRIPTION}, or a "
        "file of either. A row of the embedding begins as the mean of the description's rows, or "
        "of all rows",
    )
    trainable: list[str] | None = setting(
        None,
        "with lora=none: regular expressions; weights whose full names begin with a match of one "
        "are trained, the others are frozen; null: all are trained",
    )
    attn_implementation: str | None = setting(
        "auto",
        "attention kernel. packed: ours, for rows that hold several documents; auto: packed if "
        "rows hold several documents, else the architecture's default; null: the architecture's "
        "default; OWNER/NAME: a kernel of the Hugging Face hub, with @REVISION and :FUNCTION where "
        "it has them",
        or_matching(
            HUB_KERNEL,
            one_of(
                *("auto", "packed", "eager", "sdpa"),
                *("flash_attention_2", "flash_attention_3", "flex_attention"),
            ),
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
class LoraSection:
    """The LoRA adapter. Fields are peft.LoraConfig's, except ``enabled`` and ``extra``."""

    enabled: bool = setting(
        True, "true: train an adapter; false: train every weight of the base model", ours=True
    )
    r: int = setting(
        8,
        "rank; a higher rank learns more and takes more memory",
        between(1, LARGEST_RANK),
    )
    lora_alpha: int = setting(16, "the adapter's output is scaled by lora_alpha / r", at_least(1))
    lora_dropout: float = setting(
        0.0, "dropout probability on the adapter's input", within(0, 1), null=0.0
    )
    target_modules: Any = setting(
        "all-linear",
        "which modules get an adapter: 'attention', 'all-linear', a regular expression, or a list "
        "of module names",
    )
    modules_to_save: list[str] | None = setting(
        None, "names of modules that are trained in full and saved with the adapter"
    )
    rank_pattern: dict[str, int] = setting(
        {},
        "ranks that differ from r, by module name, such as {q_proj: 16}",
        each(between(1, LARGEST_RANK)),
    )
    alpha_pattern: dict[str, int] = setting(
        {},
        "values that differ from lora_alpha, by module name, such as {q_proj: 32}",
        each(at_least(1)),
    )
    use_rslora: bool = setting(
        False, "true: scale the adapter's output by lora_alpha / sqrt(r) instead (rsLoRA)"
    )
    use_dora: bool = setting(
        False, "true: train the magnitude and direction of weights separately (DoRA; slower)"
    )
    init_from: str | None = setting(
        None,
        "folder of an adapter, or of the run that made it, whose weights the run's adapter starts "
        "from; null: PEFT's initial values",
        ours=True,
        path="read",
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
