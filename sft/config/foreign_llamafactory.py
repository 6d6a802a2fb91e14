"""Keys of LLaMA-Factory's YAML (llamafactory.hparams, as of August 2026)."""

from __future__ import annotations

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
from sft.config.foreign_common import (
    EMBEDDING_RATE,
    FUSED,
    GALORE,
    HELD_OUT,
    LORA,
    ORDER,
    PREFERENCE,
    PUSH,
    QUANTIZED,
    TRACKER,
    TRAINING,
    VISION,
    replaced,
    targets,
)

OWN = "the tokenizer's own chat template is used, not LLaMA-Factory's copy of one"
TEMPLATES: dict[str, str | Outcome] = {
    "chatml": "template=chatml",
    **{name: f"template.chat_template={name}" for name in ("llama3", "gemma", "gemma3", "gemma4")},
    **{name: f"template.chat_template={name}" for name in ("qwen3", "qwen3_6", "cohere", "lfm2")},
    "qwen": "template.chat_template=qwen2_5",
    "qwen3_nothink": "template.chat_template=qwen3_instruct_2507",
    "qwen3_5": "template.chat_template=qwen3_5_think",
    "qwen3_5_nothink": "template.chat_template=qwen3_5_nothink",
    "deepseek3": "template.chat_template=deepseekv3",
    "phi": "template.chat_template=phi3",
    "gpt_oss": "template.chat_template=gptoss",
    "glm4_moe": "template.chat_template=glm4moe",
}
TEMPLATE = Key(DIFFERS, lambda value: Outcome(DIFFERS, note=OWN), "template.kind", OWN)
CUT = "LLaMA-Factory shortens prompt and answer of longer rows; dataset.overlong=truncate cuts off"
CUT += " the end, and error, the default, stops"
NAMES = "dataset_info.json says where NAME is: sft import reads it; dataset.path=FILE_OR_HUB_ID"


def datasets(value: Any) -> Outcome:
    """Convert a name of a data set, which is a path only together with dataset_info.json."""
    names = [str(name) for name in listed(value)]
    return Outcome(DIFFERS, {"dataset.path": names[0]}, NAMES) if len(names) == 1 else off(NAMES)


def attention(value: Any) -> Outcome:
    """Choose the attention kernel by LLaMA-Factory's short names."""
    kernels = {"fa2": "flash_attention_2", "fa3": "flash_attention_3", "disabled": "eager"}
    name = kernels.get(str(value), str(value))
    if name == "auto":
        return same()
    return Outcome(CONVERTED, {"model.attn_implementation": name})


def quantized(value: Any) -> Outcome:
    """Choose the quantisation of the base by its bits."""
    options = {"4": "nf4", "8": "int8"}
    if str(value) not in options:
        return off(f"bitsandbytes stores weights in 4 or 8 bits, not {value}: quantization=nf4")
    return Outcome(CONVERTED, {"quantization": options[str(value)]})


KEYS: dict[str, Key] = {
    **TRAINING,
    **{name: QUANTIZED[name] for name in ("bnb_4bit_compute_dtype",)},
    # model
    "model_name_or_path": to("model.name_or_path"),
    "model_revision": to("model.revision", change=lambda name: same() if name == "main" else name),
    "adapter_name_or_path": to("lora.init_from"),
    "adapter_folder": no("lora.init_from=FOLDER is the adapter's folder itself"),
    "create_new_adapter": no("lora.init_from goes on from the adapter; sft merge makes a new base"),
    "cache_dir": no("HF_HOME=DIR in the environment, for the hub's files; SFT_CACHE_DIR for data"),
    **dict.fromkeys(
        (
            *("use_fast_tokenizer", "low_cpu_mem_usage", "device_map", "offload_folder"),
            *("use_kv_cache", "infer_backend", "infer_dtype", "print_param_status"),
            *("split_special_tokens", "upcast_layernorm", "upcast_lmhead_output"),
        ),
        done("sft decides it from the model and the machine"),
    ),
    "resize_vocab": done("the embedding grows with model.new_tokens"),
    **dict.fromkeys(
        ("add_tokens", "add_special_tokens", "new_special_tokens"),
        to("model.new_tokens", change=listed, example=["<tool>"]),
    ),
    "new_special_tokens_config": to("model.new_tokens"),
    "init_special_tokens": by(
        {"desc_init": "", "noise_init": off("rows of new tokens begin as a mean, without noise")}
    ),
    "rope_scaling": fn(
        "model.config.rope_scaling",
        replaced("rope_scaling"),
        example={"type": "linear", "factor": 2.0},
    ),
    "flash_attn": fn("model.attn_implementation", attention, example="fa2"),
    "moe_aux_loss_coef": TRAINING["router_aux_loss_coef"],
    "disable_gradient_checkpointing": by(
        {
            True: "train.gradient_checkpointing=false",
            False: "train.gradient_checkpointing=true",
        }
    ),
    "use_reentrant_gc": done("Transformers chooses it; the result is the same"),
    "enable_liger_kernel": by({True: "train.extra.use_liger_kernel=true", False: ""}),
    "train_from_scratch": by({True: "model.pretrained=false lora=none", False: ""}),
    **dict.fromkeys(
        ("shift_attn", "mixture_of_depths"), no("it changes the model; sft trains it as it is")
    ),
    **dict.fromkeys(("use_unsloth", "use_unsloth_gc", "use_v1_kernels", "use_kt"), no(FUSED)),
    **dict.fromkeys(
        ("hf_hub_token", "ms_hub_token", "om_hub_token"), secret("HF_TOKEN in the environment")
    ),
    "quantization_bit": fn("quantization", quantized, example=4),
    "quantization_method": by(
        {**dict.fromkeys(("bnb", "bitsandbytes"), "")},
        rest=no("sft quantises by bitsandbytes: quantization=nf4"),
    ),
    "quantization_type": to("quantization.bnb_4bit_quant_type", example="nf4"),
    "double_quantization": to("quantization.bnb_4bit_use_double_quant", example=True),
    "compute_dtype": QUANTIZED["bnb_4bit_compute_dtype"],
    "model_max_length": done("dataset.max_length bounds the rows"),
    # method
    "stage": by({"sft": "", "pt": "template=text"}, rest=no(PREFERENCE)),
    "finetuning_type": by(
        {
            "lora": "",
            "full": "lora=none",
            "freeze": off("lora=none model.trainable=[REGEX] trains chosen layers"),
        },
        rest=no("sft trains LoRA adapters, or every weight with lora=none"),
    ),
    "pure_bf16": by({True: "precision=bf16", False: ""}, "adapters stay in float32"),
    "lora_rank": to("lora.r"),
    "lora_alpha": to("lora.lora_alpha"),
    "lora_dropout": to("lora.lora_dropout", example=0.05),
    "lora_target": to("lora.target_modules", change=targets, example="all"),
    "additional_target": to("lora.modules_to_save", change=listed, example=["lm_head"]),
    "loraplus_lr_ratio": to("train.loraplus_lr_ratio", example=16.0),
    "loraplus_lr_embedding": EMBEDDING_RATE,
    "use_rslora": LORA["use_rslora"],
    "use_dora": LORA["use_dora"],
    "pissa_init": by({True: "lora.extra.init_lora_weights=pissa", False: ""}),
    "pissa_iter": by({16: off("the exact decomposition is used"), -1: ""}, rest=no("exact SVD")),
    "pissa_convert": no("the adapter is saved as it was trained; sft merge knows PiSSA"),
    **dict.fromkeys(
        ("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules"),
        no("lora=none model.trainable=[REGEX] trains chosen layers"),
    ),
    "use_dft_loss": by({True: "train.extra.loss_type=dft", False: ""}),
    **dict.fromkeys(("use_asft_loss", "use_eaft_loss"), no("the losses are nll and dft")),
    **dict.fromkeys(("use_galore", "galore_target", "galore_rank", "galore_layerwise"), no(GALORE)),
    **dict.fromkeys(
        ("galore_update_interval", "galore_scale", "use_apollo", "apollo_rank"), no(GALORE)
    ),
    **dict.fromkeys(
        ("use_badam", "badam_mode", "badam_switch_interval", "badam_switch_mode"),
        no("sft has no BAdam; model.trainable=[REGEX] trains chosen layers"),
    ),
    "use_adam_mini": no("train.optim=adamw_8bit makes the optimizer's state small"),
    "use_muon": no("sft has the optimizers of Transformers: train.optim=NAME"),
    "use_llama_pro": no("sft does not add layers to the model"),
    **dict.fromkeys(("use_mca", "use_megatron_bridge"), no("zero=stage3 splits the model")),
    **dict.fromkeys(
        ("pref_beta", "pref_loss", "pref_ftx", "ref_model", "reward_model"), no(PREFERENCE)
    ),
    **dict.fromkeys(("ppo_epochs", "simpo_gamma", "kto_chosen_weight"), no(PREFERENCE)),
    **dict.fromkeys(
        ("freeze_vision_tower", "freeze_multi_modal_projector", "image_max_pixels", "media_dir"),
        no(VISION, True),
    ),
    **dict.fromkeys(("video_max_pixels", "image_min_pixels", "freeze_language_model"), no(VISION)),
    "compute_accuracy": done("the token accuracy is logged"),
    "disable_shuffling": no(ORDER),
    "early_stopping_steps": TRAINING["early_stopping_patience"],
    "plot_loss": Key(
        DIFFERS,
        lambda value: (
            Outcome(DIFFERS, note="metrics.jsonl has every loss; no picture is drawn")
            if value
            else same()
        ),
        "metrics.jsonl",
        "metrics.jsonl has every loss; no picture is drawn",
        True,
    ),
    "include_effective_tokens_per_second": done("tokens per second are logged"),
    # rows
    "dataset": fn("dataset.path", datasets, NAMES, "rows.jsonl"),
    "eval_dataset": to("dataset.eval_path", NAMES),
    "dataset_dir": no("sft import reads DIR/dataset_info.json; dataset.path=FILE_OR_HUB_ID"),
    "template": by(TEMPLATES, rest=TEMPLATE),
    "cutoff_len": to("dataset.max_length", CUT, also="dataset.overlong=truncate", example=2048),
    "train_on_prompt": by({True: "template.train_on=all", False: ""}),
    "mask_history": by({True: "template.train_on=last_assistant", False: ""}),
    "packing": by({True: "dataset.packing=bfd", False: "dataset.packing=none"}),
    "neat_packing": by({True: "dataset.packing=bfd", False: ""}),
    "max_samples": to("dataset.max_rows"),
    "val_size": HELD_OUT,
    "preprocessing_num_workers": to("dataset.num_proc", example=8),
    **dict.fromkeys(
        ("overwrite_cache", "preprocessing_batch_size", "data_shared_file_system"),
        done("samples are cached by content, and made again when rows or settings change"),
    ),
    "tokenized_path": done("samples are cached by content; sft data output=DIR keeps them"),
    "streaming": to("dataset.streaming", example=True),
    "buffer_size": no("the buffer of streamed rows is sft's own"),
    "mix_strategy": by({"concat": ""}, rest=no("dataset.mix.NAME.weight=W draws more of a source")),
    "interleave_probs": no("dataset.mix.NAME.weight=W draws more of a source"),
    "default_system": to("template.system"),
    "enable_thinking": by({True: "", False: "template.kwargs.enable_thinking=false"}),
    "preserve_thinking": to("template.kwargs.preserve_thinking", example=True),
    "tool_format": no("tools are written as the tokenizer's chat template writes them"),
    "ignore_pad_token_for_loss": done("padding is never trained"),
    "eval_on_each_dataset": no("all held-out rows make one loss"),
    "reserved_label_len": no("dataset.overlong=truncate keeps the beginning"),
    "overwrite_output_dir": by({True: "overwrite=true", False: ""}),
    # logs and the rest
    "use_swanlab": by({True: "train.extra.report_to=swanlab", False: ""}),
    **dict.fromkeys(
        ("swanlab_project", "swanlab_run_name", "swanlab_workspace", "swanlab_mode"), no(TRACKER)
    ),
    **dict.fromkeys(
        ("swanlab_api_key", "swanlab_lark_webhook_url", "swanlab_lark_secret"), secret(TRACKER)
    ),
    **dict.fromkeys(("export_dir", "export_size"), no("sft merge run=DIR writes the full weights")),
    "export_hub_model_id": no(PUSH),
    **dict.fromkeys(("fp8", "fp8_backend"), no("sft trains in bf16, fp16 or fp32")),
    **dict.fromkeys(("ray_run_name", "ray_num_workers", "ray_storage_path"), no("torchrun")),
    **dict.fromkeys(
        ("max_new_tokens", "top_p", "top_k", "temperature", "do_sample", "num_beams"),
        no("sft generate run=DIR has the settings of generation"),
    ),
}
