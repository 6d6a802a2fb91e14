"""Keys of ms-swift and torchtune, and short names that users try; no file of these is imported."""

from __future__ import annotations

from typing import Any

from sft.config.foreign import (
    CONVERTED,
    Key,
    Outcome,
    by,
    done,
    fn,
    listed,
    no,
    off,
    secret,
    to,
)
from sft.config.foreign_common import (
    ACCUMULATION,
    DTYPE,
    FUSED,
    HELD_OUT,
    ORDER,
    PREFERENCE,
    QUANTIZED,
    TRACKER,
    TRAINING,
    VISION,
    replaced,
    targets,
)
from sft.config.foreign_llamafactory import quantized

CUT = "ms-swift leaves out longer rows, and sft stops: dataset.overlong=drop"


def truncation(value: Any) -> Outcome:
    """Choose what becomes of rows that are too long."""
    names = {"delete": "drop", "left": "", "right": "truncate", "raise": "error", "split": "split"}
    if not names.get(str(value)):
        return off("dataset.overlong=truncate cuts off the end")
    return Outcome(CONVERTED, {"dataset.overlong": names[str(value)]})


SWIFT: dict[str, Key] = {
    **TRAINING,
    "model": to("model.name_or_path"),
    "model_id_or_path": to("model.name_or_path"),
    "model_type": done("the architecture is that of the model's config"),
    "model_revision": to("model.revision"),
    "torch_dtype": DTYPE,
    "attn_impl": by(
        {"flash_attn": "model.attn_implementation=flash_attention_2"},
        rest=to("model.attn_implementation", example="sdpa"),
    ),
    "new_special_tokens": to("model.new_tokens", change=listed, example=["<tool>"]),
    "rope_scaling": fn(
        "model.config.rope_scaling", replaced("rope_scaling"), example={"factor": 2.0}
    ),
    "local_repo_path": no("model.name_or_path=FOLDER"),
    "use_hf": done("models are those of the Hugging Face hub"),
    **dict.fromkeys(
        ("train_type", "tuner_type", "sft_type"),
        by({"lora": "", "full": "lora=none"}, rest=no("lora=all-linear or lora=none")),
    ),
    "adapters": to("lora.init_from"),
    "resume_only_model": no("lora.init_from=FOLDER starts from an adapter's weights"),
    "lora_rank": to("lora.r"),
    "lora_alpha": to("lora.lora_alpha"),
    "lora_dropout": to("lora.lora_dropout", example=0.05),
    "lora_dtype": done("adapters are trained in float32"),
    "lora_bias": by({"none": ""}, rest=to("lora.extra.bias")),
    **dict.fromkeys(
        ("target_modules", "lora_target_modules"),
        to("lora.target_modules", change=targets, example="all-linear"),
    ),
    "target_regex": to("lora.target_modules", example=".*_proj"),
    "target_parameters": to("lora.extra.target_parameters", example=["experts.down_proj"]),
    "modules_to_save": to("lora.modules_to_save", change=listed, example=["lm_head"]),
    "init_weights": by({"true": ""}, rest=to("lora.extra.init_lora_weights", example="pissa")),
    "lorap_lr_ratio": to("train.loraplus_lr_ratio", example=16.0),
    "use_rslora": to("lora.use_rslora", example=True),
    "use_dora": to("lora.use_dora", example=True),
    "trainable_parameters_regex": to("model.trainable", change=listed, example=["layers.1."]),
    **dict.fromkeys(
        ("trainable_parameters", "freeze_parameters", "freeze_parameters_ratio"),
        no("lora=none model.trainable=[REGEX] trains chosen layers"),
    ),
    "quant_bits": fn("quantization", quantized, example=4),
    "quant_method": by({"bnb": ""}, rest=no("quantization=nf4")),
    **QUANTIZED,
    "dataset": to("dataset.path", change=lambda value: listed(value)[0], example="rows.jsonl"),
    "val_dataset": to("dataset.eval_path", change=lambda value: listed(value)[0]),
    "split_dataset_ratio": HELD_OUT,
    "columns": to("dataset.columns", example={"prompt": "question"}),
    "custom_dataset_info": no("dataset.path and dataset.columns describe a file"),
    "dataset_num_proc": to("dataset.num_proc", example=8),
    "dataset_shuffle": no(ORDER, True),
    "train_dataloader_shuffle": no(ORDER, True),
    "streaming": to("dataset.streaming", example=True),
    **dict.fromkeys(("lazy_tokenize", "load_from_cache_file"), done("samples are cached")),
    "strict": done("dataset.max_bad_fraction=0 is the default"),
    "interleave_prob": no("dataset.mix.NAME.weight=W draws more of a source"),
    "max_length": to("dataset.max_length", CUT, also="dataset.overlong=drop", example=2048),
    "truncation_strategy": fn("dataset.overlong", truncation, example="delete"),
    "packing": by({True: "dataset.packing=bfd", False: "dataset.packing=none"}),
    "padding_free": to("train.padding_free", example=True),
    "system": to("template.system"),
    "use_chat_template": by({True: "", False: "template=completion"}),
    "loss_scale": by(
        {
            "default": "",
            "last_round": "template.train_on=last_assistant",
            "all": "template.train_on=all",
        }
    ),
    "enable_thinking": by({True: "", False: "template.kwargs.enable_thinking=false"}),
    "template_backend": no("template=chat is the tokenizer's own chat template"),
    "agent_template": no("tools are written as the tokenizer's chat template writes them"),
    **dict.fromkeys(
        ("model_author", "model_name"), no("names in self-cognition data: edit the rows")
    ),
    "gradient_accumulation_steps": ACCUMULATION,
    "enable_dft_loss": by({True: "train.extra.loss_type=dft", False: ""}),
    **dict.fromkeys(("lisa_activated_layers",), no("sft has no LISA; model.trainable=[REGEX]")),
    **dict.fromkeys(("freeze_vit", "freeze_aligner", "vit_lr", "max_pixels"), no(VISION, True)),
    **dict.fromkeys(("add_version", "create_checkpoint_symlink"), done("the run's name is kept")),
    **dict.fromkeys(("check_model", "ignore_args_error"), done("every setting is checked")),
    "acc_strategy": done("the token accuracy is logged"),
    "sequence_parallel_size": no("zero=stage3 splits the model, not the row", 1),
    "swanlab_token": secret(TRACKER),
    "rlhf_type": no(PREFERENCE),
}

TUNE = "torchtune has one file for each recipe"
TORCHTUNE: dict[str, Key] = {
    "batch_size": to("train.per_device_train_batch_size"),
    "epochs": to("train.num_train_epochs"),
    "max_steps_per_epoch": no("train.max_steps=N bounds the whole run"),
    "gradient_accumulation_steps": ACCUMULATION,
    "compile": to("train.extra.torch_compile", example=True),
    "log_every_n_steps": to("train.logging_steps"),
    "clip_grad_norm": to("train.max_grad_norm"),
    "enable_activation_checkpointing": to("train.gradient_checkpointing", example=True),
    "enable_activation_offloading": to("train.extra.activation_offloading", example=True),
    "optimizer_in_bwd": no("zero=stage2_offload or quantization=nf4 saves memory"),
    "custom_sharded_layers": no("zero=stage3 splits every layer"),
    "fsdp_cpu_offload": by({True: "zero=stage3_offload", False: ""}),
    "save_adapter_weights_only": done("a checkpoint of a LoRA run holds the adapter only"),
    "log_peak_memory_stats": done("the peak memory is logged"),
    "profiler": no("profile=torch records steps; profile.start=N and profile.steps=N choose them"),
    "device": done("the GPU, or CPU, of each rank"),
    "dtype": DTYPE,
    "lora_attn_modules": to("lora.target_modules", change=targets, example=["q_proj", "v_proj"]),
    **dict.fromkeys(("apply_lora_to_mlp", "apply_lora_to_output"), no("lora.target_modules=[...]")),
    "quantize_base": by({True: "quantization=nf4", False: ""}),
    "checkpoint_dir": to("model.name_or_path"),
    "train_on_input": by({True: "template.train_on=all", False: ""}),
    "packed": by({True: "dataset.packing=bfd", False: "dataset.packing=none"}),
    "max_seq_len": to("dataset.max_length", example=2048),
    "num_warmup_steps": to("train.warmup_steps"),
    "new_system_prompt": to("template.system"),
    "column_map": to("dataset.columns", example={"prompt": "question"}),
    "conversation_column": to("dataset.columns.messages", example="turns"),
}

# Not the names of one tool: what users write for a setting, in any section.
SHORT: dict[str, Key] = {
    **dict.fromkeys(("rank", "lora.rank"), to("lora.r")),
    "alpha": to("lora.lora_alpha"),
    **dict.fromkeys(("dropout", "drop_out"), to("lora.lora_dropout", example=0.05)),
    "lr": to("train.learning_rate"),
    "batch_size": to("train.global_batch_size"),
    **dict.fromkeys(
        ("model_id", "base_model_name_or_path", "model_path"), to("model.name_or_path")
    ),
    **dict.fromkeys(("block_size", "context_length"), to("dataset.max_length", example=2048)),
    **dict.fromkeys(("data_path", "train_file"), to("dataset.path")),
    "validation_file": to("dataset.eval_path"),
    **dict.fromkeys(("val_ratio", "test_size", "validation_split_percentage"), HELD_OUT),
    "train_ratio": to(
        "dataset.eval_fraction",
        change=lambda value: round(1 - value, 6) if isinstance(value, float) else value,
        example=0.9,
    ),
    "system_prompt": to("template.system"),
    "gradient_clipping": to("train.max_grad_norm"),
    "qlora": by({True: "quantization=nf4", False: ""}),
    "mixed_precision": by(
        {"bf16": "precision=bf16", "fp16": "precision=fp16", "no": "precision=fp32"}
    ),
    "cache_dir": no("HF_HOME=DIR in the environment, for the hub's files; SFT_CACHE_DIR for data"),
    "wandb_api_key": secret("WANDB_API_KEY in the environment"),
    "unsloth": no(FUSED),
}
# Keys that mean something only in their section, by full name.
NESTED: dict[str, Key] = {
    **dict.fromkeys(("model.path", "model.id", "model.name_or_id"), to("model.name_or_path")),
    **dict.fromkeys(
        ("model.tokenizer", "model.tokenizer_name_or_path", "tokenizer.path"),
        no("the tokenizer is that of model.name_or_path"),
    ),
    "optimizer.lr": to("train.learning_rate"),
    "optimizer.weight_decay": to("train.weight_decay"),
    "lr_scheduler.num_warmup_steps": to("train.warmup_steps"),
    "dataset.source": to("dataset.path"),
    "dataset.type": by(
        {
            "alpaca": "template=alpaca",
            "chat_template": "template=chat",
            "sharegpt": "template=chat",
            "completion": "template=text",
        },
        rest=no("a template of your own: template.prompts, template.completions"),
    ),
    "zero.stage": by({stage: f"zero=stage{stage}" for stage in (1, 2, 3)} | {0: "zero=none"}),
    "template.template": no("template=NAME chooses a template"),
    "template.name_or_path": to("template.chat_template"),
    "lora.target": to("lora.target_modules", change=targets, example="all"),
}
