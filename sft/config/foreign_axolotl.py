"""Keys of Axolotl's YAML for model, adapter and rows (axolotl.utils.schemas, July 2026)."""

from __future__ import annotations

from typing import Any

from sft.config.foreign import (
    CONVERTED,
    DEFAULT,
    DIFFERS,
    Key,
    Outcome,
    by,
    done,
    fn,
    listed,
    no,
    off,
    to,
)
from sft.config.foreign_axolotl_training import TRAINING_KEYS
from sft.config.foreign_common import (
    EMBEDDING_RATE,
    HELD_OUT,
    LORA,
    ORDER,
    QUANTIZED,
    TRAINING,
    targets,
)

SAMPLES = "sample=held-out"

TEMPLATES = {
    "chatml": "template=chatml",
    "tokenizer_default": "",
    "jinja": "",
    **{name: f"template.chat_template={name}" for name in ("llama3", "gemma", "gemma3", "gemma4")},
    **{name: f"template.chat_template={name}" for name in ("cohere", "qwen3")},
    "qwen_25": "template.chat_template=qwen2_5",
    "phi_3": "template.chat_template=phi3",
    "phi_35": "template.chat_template=phi3_5",
    "deepseek_v3": "template.chat_template=deepseekv3",
}
OWN = "the tokenizer's own chat template is used, not Axolotl's copy of one"
OVERLONG = "Axolotl leaves out longer rows, and sft stops: dataset.overlong=drop"


def special_tokens(value: Any) -> Outcome:
    """Convert tokens by their role."""
    if not isinstance(value, dict):
        return off("must be a mapping such as {pad_token: TOKEN}")
    names = {
        "eos_token": "model.eos_token",
        "pad_token": "model.pad_token",
        "additional_special_tokens": "model.new_tokens",
    }
    given = {key: token for key, token in value.items() if token}
    settings = {names[key]: token for key, token in given.items() if key in names}
    others = [key for key in given if key not in names]
    if not others:
        return Outcome(CONVERTED, settings)
    note = f"{' and '.join(others)}: the tokenizer's own are used"
    return Outcome(DIFFERS if settings else DEFAULT, settings, note)


def bnb_config(value: Any) -> Outcome:
    """Convert arguments of BitsAndBytesConfig."""
    if not isinstance(value, dict) or not value.keys() <= QUANTIZED.keys():
        return off("write each of them as quantization.NAME")
    settings: dict[str, Any] = {}
    for name, item in value.items():
        settings |= QUANTIZED[name].of(item).settings
    return Outcome(CONVERTED, settings)


def model_config(value: Any) -> Outcome:
    """Convert values of the model's config; the loss of the routers is a setting of training."""
    if not isinstance(value, dict):
        return off("must be a mapping such as {rope_theta: 500000}")
    decided = {"output_router_logits", "router_aux_loss_coef", "use_cache"}
    settings = {f"model.config.{name}": item for name, item in value.items() if name not in decided}
    balance = "train.extra.router_aux_loss_coef"
    if value.get("output_router_logits") is False:
        settings[balance] = 0.0
    elif value.get("router_aux_loss_coef") is not None:
        settings[balance] = value["router_aux_loss_coef"]
    note = "the experts are balanced with the coefficient of the model's config"
    return Outcome(CONVERTED, settings) if settings else Outcome(DEFAULT, note=note)


def first_path(value: Any) -> Any:
    """Return the path of the first of Axolotl's data sets; an import converts all of them."""
    first = value[0] if isinstance(value, list) else value
    path = first.get("path") if isinstance(first, dict) else first
    return path if isinstance(path, str) else off("dataset.path=FILE_OR_HUB_ID")


KEYS: dict[str, Key] = {
    **QUANTIZED,
    **TRAINING_KEYS,
    # model and tokenizer
    "base_model": to("model.name_or_path"),
    "revision_of_model": to("model.revision"),
    **dict.fromkeys(
        ("overrides_of_model_config", "model_config"),
        fn("model.config", model_config, example={"rope_theta": 500000}),
    ),
    "overrides_of_model_kwargs": no("sft loads the model itself"),
    **dict.fromkeys(
        ("model_type", "type_of_model", "tokenizer_type", "cls_model_config"),
        done("the architecture is that of the model's config"),
    ),
    **dict.fromkeys(
        ("base_model_config", "tokenizer_config"),
        no("config and tokenizer are those of model.name_or_path: copy them into one folder"),
    ),
    **dict.fromkeys(
        (
            *("is_falcon_derived_model", "is_llama_derived_model", "is_qwen_derived_model"),
            *("is_mistral_derived_model", "tokenizer_use_fast", "tokenizer_legacy"),
            *("tokenizer_save_jinja_files", "low_cpu_mem_usage", "device_map", "device"),
            *("experimental_skip_move_to_device", "hf_use_auth_token", "strict", "lora_on_cpu"),
        ),
        done("sft decides it from the model and the machine"),
    ),
    "trust_remote_code": TRAINING["trust_remote_code"],
    "special_tokens": fn(
        "model.eos_token, model.pad_token, model.new_tokens",
        special_tokens,
        example={"pad_token": "<pad>"},
    ),
    "tokens": to("model.new_tokens", change=listed, example=["<tool>"]),
    "max_packed_sequence_len": no("dataset.max_length is the length of a packed row"),
    "tokenizer_use_mistral_common": no("the tokenizer is the one that Transformers loads"),
    **dict.fromkeys(
        (
            *("gptq", "gptq_groupsize", "gptq_model_v1", "gptq_disable_exllama"),
            *("model_quantization_config", "model_quantization_config_kwargs"),
        ),
        no("a base that is quantised already is recognised by its config.json"),
    ),
    **dict.fromkeys(
        ("quantize_moe_experts", "llama4_linearized_experts"),
        no("the experts are stored as Transformers loads them"),
    ),
    "reinit_weights": no("model.pretrained=false starts from random weights"),
    "added_tokens_overrides": no("model.new_tokens adds tokens; it replaces none"),
    "resize_token_embeddings_to_32x": no("the embedding has as many rows as tokens"),
    "fix_untrained_tokens": no("rows of model.new_tokens begin as the mean of the embedding"),
    "shrink_embeddings": no("the embedding keeps its rows"),
    "max_memory": no("a rank holds the model, or its share under zero=stage3"),
    "gpu_memory_limit": no("a rank holds the model, or its share under zero=stage3"),
    # adapter
    "adapter": by(
        {"lora": "", "qlora": "quantization=nf4", "full": "lora=none"},
        rest=no("sft trains LoRA adapters, or every weight with lora=none"),
    ),
    "lora_model_dir": to("lora.init_from"),
    "lora_r": to("lora.r"),
    "lora_alpha": to("lora.lora_alpha"),
    "lora_dropout": to("lora.lora_dropout", example=0.05),
    "lora_target_modules": to("lora.target_modules", change=targets, example=["q_proj", "v_proj"]),
    "lora_target_linear": by({True: "lora.target_modules=all-linear", False: ""}),
    "lora_target_parameters": to("lora.extra.target_parameters", example=["experts.down_proj"]),
    "lora_modules_to_save": to("lora.modules_to_save", change=listed, example=["lm_head"]),
    "lora_rank_pattern": to("lora.rank_pattern", example={"q_proj": 16}),
    "lora_alpha_pattern": to("lora.alpha_pattern", example={"q_proj": 32}),
    "lora_fan_in_fan_out": LORA["fan_in_fan_out"],
    "peft_use_dora": to("lora.use_dora", example=True),
    "peft_use_rslora": to("lora.use_rslora", example=True),
    "peft_layers_to_transform": LORA["layers_to_transform"],
    "peft_layers_pattern": LORA["layers_pattern"],
    "peft_layer_replication": LORA["layer_replication"],
    "peft_init_lora_weights": LORA["init_lora_weights"],
    "peft_trainable_token_indices": LORA["trainable_token_indices"],
    "peft_ensure_weight_tying": LORA["ensure_weight_tying"],
    "peft": no("sft does not run the pass over data that LoftQ needs"),
    "peft_autocast_adapter_dtype": done("adapters are trained in float32"),
    "bnb_config_kwargs": fn(
        "quantization", bnb_config, example={"bnb_4bit_use_double_quant": False}
    ),
    "loraplus_lr_ratio": to("train.loraplus_lr_ratio", example=16.0),
    "loraplus_lr_embedding": EMBEDDING_RATE,
    "unfrozen_parameters": to("model.trainable", change=listed, example=["layers.1."]),
    "merge_lora": to("train.merge", example=True),
    **dict.fromkeys(
        ("relora", "relora_prune_ratio", "relora_cpu_offload", "relora_prune_method"),
        no("sft has no ReLoRA; a second run with lora.init_from goes on from an adapter"),
    ),
    # rows
    "datasets": to("dataset.path", change=first_path, example=[{"path": "x"}]),
    "test_datasets": to("dataset.eval_path", change=first_path, example=[{"path": "x"}]),
    "pretraining_dataset": to("dataset.path", change=first_path),
    "dataset_prepared_path": done("samples are cached by content; sft data output=DIR keeps them"),
    "val_set_size": HELD_OUT,
    "sequence_len": to("dataset.max_length", OVERLONG, also="dataset.overlong=drop", example=2048),
    "excess_length_strategy": by(
        {
            "drop": "dataset.overlong=drop",
            "truncate": "dataset.overlong=truncate",
            "raise": "dataset.overlong=error",
        }
    ),
    "eval_sequence_len": no("held-out rows have dataset.max_length too"),
    "sample_packing": by({True: "dataset.packing=bfd", False: "dataset.packing=none"}),
    "eval_sample_packing": done("packing does not change sft's evaluation loss"),
    **dict.fromkeys(
        (
            *("sample_packing_group_size", "sample_packing_bin_size", "multipack_real_batches"),
            *("sample_packing_mp_start_method", "pad_to_sequence_len", "batch_flattening"),
            *("sample_packing_eff_est", "pretrain_multipack_buffer_size"),
            *("streaming_multipack_buffer_size", "total_num_tokens", "pretrain_multipack_attn"),
        ),
        done("best-fit packing over all rows, without padding"),
    ),
    "generate_samples": by({True: SAMPLES, False: ""}, "every 100 steps; sample.every=N"),
    "num_generation_samples": to("sample.num", also=SAMPLES, example=5),
    "generation_max_new_tokens": to("sample.max_new_tokens", also=SAMPLES, example=50),
    "generation_temperature": to(
        "sample.temperature", change=lambda value: value or None, also=SAMPLES, example=0.7
    ),
    **dict.fromkeys(
        ("generation_top_p", "generation_top_k"),
        no("sample.top_p=0.9 sample.top_k=50, with sample.temperature=1"),
    ),
    "generation_do_sample": no("sample.temperature=1 samples; without it, answers are greedy"),
    "generation_prompt_ratio": no("the prompt of a held-out row is what precedes its answer"),
    "sample_packing_sequentially": no("dataset.packing=bfd packs by length"),
    "curriculum_sampling": no(ORDER),
    "group_by_length": no(ORDER),
    "min_sample_len": no("leave short rows out of the file"),
    "train_on_inputs": by({True: "template.train_on=all", False: ""}),
    "chat_template": by(
        TEMPLATES, rest=Key(DIFFERS, lambda value: Outcome(DIFFERS, note=OWN), "template.kind", OWN)
    ),
    "chat_template_jinja": to("template.chat_template"),
    "chat_template_kwargs": to("template.kwargs", example={"enable_thinking": False}),
    "default_system_message": to("template.system"),
    "eot_tokens": done("the token that ends a turn is found from what the chat template writes"),
    "shuffle_merged_datasets": by({True: "", False: off(ORDER)}),
    "shuffle_before_merging_datasets": done("the samples of all sources are shuffled together"),
    "dataset_exact_deduplication": no("dataset.warn_above.duplicates counts exact copies"),
    "dataset_keep_in_memory": done("samples are read from the cache as they are needed"),
    **dict.fromkeys(("dataset_processes", "dataset_num_proc"), to("dataset.num_proc", example=8)),
    **dict.fromkeys(
        ("dataset_shard_num", "dataset_shard_idx"), no("dataset.max_rows reads fewer rows")
    ),
    "streaming": to("dataset.streaming", example=True),
    "skip_prepare_dataset": no("sft reads, tokenises and audits every row"),
    "push_dataset_to_hub": no("sft data output=DIR writes the samples to a folder"),
    "remove_unused_columns": TRAINING["remove_unused_columns"],
}
