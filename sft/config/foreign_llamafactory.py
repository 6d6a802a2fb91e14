"""Keys of LLaMA-Factory's YAML for model and method (llamafactory.hparams, August 2026)."""

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
    same,
    secret,
    to,
)
from sft.config.foreign_common import (
    EMBEDDING_RATE,
    FUSED,
    GALORE,
    LORA,
    ORDER,
    PREFERENCE,
    QUANTIZED,
    TRAINING,
    VISION,
    replaced,
    targets,
)
from sft.config.foreign_llamafactory_rows import ROWS


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
    **ROWS,
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
    **dict.fromkeys(
        (
            "use_unsloth",
            "use_unsloth_gc",
            "use_v1_kernels",
            "use_kt",
            "kt_config",
            "kt_weight_path",
        ),
        no(FUSED),
    ),
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
        (
            *("galore_update_interval", "galore_scale", "use_apollo", "apollo_rank"),
            *("apollo_layerwise", "apollo_target", "apollo_scale", "apollo_scale_type"),
        ),
        no(GALORE),
    ),
    **dict.fromkeys(
        ("use_badam", "badam_mode", "badam_switch_interval", "badam_switch_mode", "badam_verbose"),
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
    **dict.fromkeys(
        (
            "video_max_pixels",
            "image_min_pixels",
            "freeze_language_model",
            "video_fps",
            "video_maxlen",
        ),
        no(VISION),
    ),
    "compute_accuracy": done("the token accuracy is logged"),
    "disable_shuffling": no(ORDER),
    "early_stopping_steps": TRAINING["early_stopping_patience"],
    "plot_loss": done("report.html in the run's folder shows the curves"),
    "enable_torch_profiler": by({True: "profile=torch", False: ""}),
    "profiler_active_steps": to("profile.steps"),
    **dict.fromkeys(
        ("profiler_wait_steps", "profiler_warmup_steps"),
        no("profile.start=N is the first step that is recorded"),
    ),
    "profiler_repeat": no("a run records its steps once", 1),
    "profiler_output_dir": done("the traces are in the folder of the run"),
    "profiler_record_shapes": done("the trace has the shapes"),
    "profiler_profile_memory": done("the memory of a GPU is recorded"),
    "profiler_with_stack": no("the trace has no lines of Python"),
    "include_effective_tokens_per_second": done("tokens per second are logged"),
}
