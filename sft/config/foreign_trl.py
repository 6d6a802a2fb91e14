"""Keys of `trl sft` (SFTConfig, ModelConfig, ScriptArguments) and of notebooks with Unsloth."""

from __future__ import annotations

from typing import Any

from sft.config.foreign import (
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
from sft.config.foreign_common import (
    DTYPE,
    FUSED,
    LORA,
    PUSH,
    QUANTIZED,
    TRAINING,
    VISION,
    targets,
)

CUT = "TRL cuts off the end of longer rows, and sft stops: dataset.overlong=truncate"
LENGTH = to("dataset.max_length", CUT, also="dataset.overlong=truncate", example=2048)
COLUMNS = (
    "TRL tells by the rows' columns what they are, and sft by template: chat for messages, text "
)
COLUMNS += "for a column text; texts of prompt and completion get no chat template in TRL"
WHOLE = "TRL trains every token of messages, but only the completion of rows with prompt and "
WHOLE += "completion; sft trains the answers of both unless template.train_on=all"


def strategy(value: Any) -> Outcome:
    """Choose the packing by TRL's name."""
    if value == "wrapped":
        return off("documents would attend to each other: dataset.packing=bfd_split splits them")
    note = "TRL packs 1,000 rows at a time, and sft all rows"
    return Outcome(DIFFERS, {"dataset.packing": value}, note)


def chat_template(value: Any) -> Outcome:
    """Convert a Jinja file; a folder would be another tokenizer."""
    if str(value).endswith((".jinja", ".jinja2", ".j2")):
        return Outcome("converted", {"template.chat_template": value})
    return off("template.chat_template=FILE.jinja: a file, not the tokenizer of another model")


SCRIPT: dict[str, Key] = {
    "dataset_name": to("dataset.path", COLUMNS),
    "dataset_config": to("dataset.subset"),
    "dataset_train_split": to("dataset.split"),
    "dataset_test_split": to("dataset.eval_split"),
    "dataset_streaming": to("dataset.streaming", example=True),
    "datasets": to("dataset.path", change=lambda value: first(value), example=[{"path": "x"}]),
    "streaming": to("dataset.streaming", example=True),
    "test_split_size": to("dataset.eval_fraction", example=0.1),
    "ignore_bias_buffers": done("buffers are not trained"),
    "gradient_checkpointing_use_reentrant": done("Transformers chooses it"),
}
MODEL: dict[str, Key] = {
    **QUANTIZED,
    "model_name_or_path": to("model.name_or_path"),
    "model_revision": to("model.revision", change=lambda name: same() if name == "main" else name),
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    "attn_implementation": to("model.attn_implementation", example="sdpa"),
    "use_flash_attention_2": by({True: "model.attn_implementation=flash_attention_2", False: ""}),
    "use_peft": by({True: "", False: "lora=none"}),
    "lora_r": to("lora.r"),
    "lora_alpha": to("lora.lora_alpha"),
    "lora_dropout": to("lora.lora_dropout", example=0.05),
    "lora_target_modules": to("lora.target_modules", change=targets, example=["q_proj", "v_proj"]),
    "lora_target_parameters": to("lora.extra.target_parameters", example=["experts.down_proj"]),
    "lora_modules_to_save": to("lora.modules_to_save", change=listed, example=["lm_head"]),
    "lora_task_type": LORA["task_type"],
    "use_rslora": LORA["use_rslora"],
    "use_dora": LORA["use_dora"],
    "use_bnb_nested_quant": to("quantization.bnb_4bit_use_double_quant", example=True),
}
CONFIG: dict[str, Key] = {
    **TRAINING,
    **dict.fromkeys(("max_length", "max_seq_length"), LENGTH),
    "packing": by({True: "dataset.packing=bfd", False: "dataset.packing=none"}),
    "packing_strategy": fn("dataset.packing", strategy, "TRL packs 1,000 rows at a time", "bfd"),
    "eval_packing": done("packing does not change sft's evaluation loss"),
    "padding_free": to("train.padding_free", example=True),
    "pad_to_multiple_of": to("train.pad_to_multiple_of"),
    "dataset_num_proc": to("dataset.num_proc", example=8),
    "dataset_text_field": to("dataset.columns.text", also="template=text", example="content"),
    "dataset_kwargs": no("dataset and template say how rows become samples"),
    "dataset_batch_size": done("rows are tokenised in batches"),
    "eos_token": to("model.eos_token", example="<|im_end|>"),
    "pad_token": to("model.pad_token", example="<pad>"),
    "chat_template_path": fn("template.chat_template", chat_template, example="mine.jinja"),
    "assistant_only_loss": by(
        {True: "", False: Outcome(DIFFERS, {"template.train_on": "all"}, WHOLE)}
    ),
    "completion_only_loss": by({True: "", False: "template.train_on=all"}),
    "shuffle_dataset": done("the seed shuffles the samples"),
    "truncation_mode": by({"keep_start": "", "keep_end": off("the end is cut off, not the start")}),
    "num_of_sequences": no("dataset.packing=bfd packs whole rows"),
    "model_init_kwargs": no("write each of them as a setting of model"),
    "dataset_skip_prepare": no("sft tokenises the rows"),
    "embedding_learning_rate": to("train.embedding_learning_rate", example=1e-5),  # of Unsloth
}


def first(value: Any) -> Any:
    """Return the path of the first data set; an import converts all of them."""
    item = value[0] if isinstance(value, list) else value
    path = item.get("path") if isinstance(item, dict) else item
    return path if isinstance(path, str) else off("dataset.path=FILE_OR_HUB_ID")


KEYS: dict[str, Key] = {**CONFIG, **MODEL, **SCRIPT}

# FastLanguageModel.from_pretrained, get_peft_model and for_inference.
UNSLOTH: dict[str, Key] = {
    **CONFIG,
    **LORA,
    **QUANTIZED,
    "model_name": to("model.name_or_path"),
    "dtype": DTYPE,
    "load_in_16bit": by({True: "quantization=none", False: ""}),
    "full_finetuning": by({True: "lora=none", False: ""}),
    "token": secret("HF_TOKEN in the environment"),
    "r": to("lora.r"),
    "use_gradient_checkpointing": by(
        {
            "unsloth": Outcome(
                DIFFERS, {"train.gradient_checkpointing": True}, "activations stay on the GPU"
            )
        },
        rest=to("train.gradient_checkpointing"),
    ),
    "random_state": to("seed"),
    "loftq_config": no("sft does not run the pass over data that LoftQ needs"),
    "use_exact_model_name": done("the model is the one that is named"),
    "rope_scaling": no("model.config.rope_scaling={rope_type: ..., factor: ...}"),
    "fix_tokenizer": done("the tokenizer is the model's own"),
    **dict.fromkeys(("fast_inference", "gpu_memory_utilization", "max_lora_rank"), no(FUSED)),
    **dict.fromkeys(("float8_kv_cache", "disable_log_stats", "unsloth_vllm_standby"), no(FUSED)),
    **dict.fromkeys(("finetune_vision_layers", "finetune_language_layers"), no(VISION, True)),
    **dict.fromkeys(("finetune_attention_modules", "finetune_mlp_modules"), no(VISION, True)),
    **dict.fromkeys(
        ("instruction_part", "response_part"),
        done("the assistant's turns are found from what the chat template writes"),
    ),
    "save_method": no("sft merge run=DIR writes the full weights"),
    "push_to_hub_merged": no(PUSH),
}
