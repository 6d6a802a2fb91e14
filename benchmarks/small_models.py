"""A model of a few thousand parameters of any type that Transformers builds, with random weights.

The sizes in a type's default config are replaced by small ones, by the names of its fields. Windows
and chunks become shorter than the rows that are trained, so that these reach beyond them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
)

TINY = Path(__file__).resolve().parents[1] / "assets" / "tiny"
WINDOW = 8  # tokens in windows and chunks of attention
LAYERS = 2  # more if a config names more kinds of layers
MOST_LAYERS = 6

# Sizes by the names of fields; a name that a config lacks is not used.
SIZES: dict[int, tuple[str, ...]] = {
    32: (
        *("hidden_size", "d_model", "n_embd", "embedding_size", "embedding_dim", "emb_dim"),
        *("word_embed_proj_dim", "attention_hidden_size", "lru_width", "input_embedding_size"),
        *("output_embedding_size", "hidden_size_global", "dim_model_base", "out_hidden_size"),
        *("dff", "dim_ff", "projector_input_dim", "projector_output_dim", "vision_output_dim"),
        *("shape_embed_dim", "pronunciation_embed_dim", "backbone_hidden_size", "ple_embed_dim"),
    ),
    48: (
        *("intermediate_size", "moe_intermediate_size", "ffn_dim", "decoder_ffn_dim", "d_inner"),
        *("encoder_ffn_dim", "ffn_hidden_size", "n_inner", "intermediate_size_mlp"),
        *("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", "mlp_dim"),
        *("dense_intermediate_size", "expert_ffn_hidden_size", "feed_forward_size"),
        *("shared_experts_intermediate_size", "shared_intermediate_size"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"),
        *("encoder_attention_heads", "num_encoder_attention_heads", "linear_num_heads"),
        *("num_decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"),
        *(
            "moe_num_experts",
            "swa_num_attention_heads",
            "linear_num_value_heads",
            "zero_expert_num",
        ),
        *("attention_heads", "mamba_n_heads", "n_mamba_heads", "time_step_rank", "mamba_dt_rank"),
        *(
            "conf_num_attention_heads",
            "index_n_heads",
            "laurel_rank",
            "gated_norm_rank",
            "hc_lowrank",
        ),
        *(
            "pronunciation_vocab_size",
            "shape_vocab_size",
            "adapter_rank",
            "d_rel",
            "altup_num_inputs",
        ),
    ),
    2: (
        *("num_key_value_heads", "num_kv_heads", "kv_n_heads", "num_experts_per_tok"),
        *("num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "swa_num_key_value_heads"),
        *(
            "linear_num_key_heads",
            "mamba_n_groups",
            "n_groups",
            "mamba_ngroups",
            "num_query_groups",
        ),
        *("heads_per_ngram", "index_topk_blocks", "o_groups"),
    ),
    1: (
        *("n_group", "topk_group", "num_expert_group", "first_k_dense_replace", "num_dense_layers"),
        *("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "max_window_layers"),
        *("num_nextn_predict_layers", "num_kv_shared_layers", "encoder_layers", "depth"),
        *("num_encoder_layers", "conf_num_hidden_layers", "num_mem_blocks", "num_blocks"),
    ),
    8: (
        *("head_dim", "qk_rope_head_dim", "v_head_dim", "qk_nope_head_dim", "attention_head_dim"),
        *("swa_head_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"),
        *(
            "kv_channels",
            "dim_head",
            "d_head",
            "attention_head_size",
            "index_head_dim",
            "rotary_dim",
        ),
        *("mamba_d_state", "state_size", "ssm_state_size", "router_hidden_size", "global_head_dim"),
        *("hidden_size_per_layer_input", "query_pre_attn_scalar"),
    ),
    16: (
        *("kv_lora_rank", "q_lora_rank", "qk_head_dim", "o_lora_rank", "mamba_d_head"),
        *("mamba_head_dim", "mamba_headdim"),
    ),
    512: (
        *("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"),
        *("model_max_length", "max_target_positions", "vocab_size_per_layer_input"),
        *("ngram_vocab_size_base", "encoder_hash_byte_group_vocab", "decoder_vocab_size"),
        *("max_source_positions", "original_max_position_embeddings"),
    ),
}
# Windows and chunks.
WINDOWS = (
    *("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"),
    *("sliding_window_size", "local_attention", "keep_window_size", "local_attention_window_len"),
    *("mamba_chunk_size", "chunk_size", "lsh_attn_chunk_length", "local_attn_chunk_length"),
    *("index_topk", "floor_scale", "rel_extent", "index_block_size"),
)
SIZE = {name: size for size, names in SIZES.items() for name in names}
SIZE |= dict.fromkeys(WINDOWS, WINDOW)
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
COUNTS += ("num_decoder_layers",)
# Lists with one entry for each layer.
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "block_types")

# Published with a vision tower, which the causal language model of the same config leaves out.
WHOLE = ("dots3_note", "emu3", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp")
# What the names do not tell, by the type of the config.
DECODERS = ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie")
DECODERS += ("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer")
DECODERS += ("xlm-roberta", "xlm-roberta-xl", "xmod")
SPECIAL: dict[str, dict[str, Any]] = {
    **{kind: {"is_decoder": True} for kind in DECODERS},
    "bamba": {"attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "cwm": {"bos_token_id": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 16},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_text": {"num_kv_shared_layers": 0},
    "flint": {"mlp_only_layers": [0]},
    "gptj": {"rotary_dim": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 4},
    "helium": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mistral": {"sliding_window": WINDOW},
    **{
        kind: {
            **{"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
            "layer_types": ["full_attention", "sliding_attention"],
        }
        for kind in ("qwen2", "qwen3")
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "qk_head_dim": None},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "mimo_v2_flash": {"attention_value_scale": 0.7},
    "modernbert-decoder": {"bos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "roc_bert": {
        "is_decoder": True,
        "pronunciation_vocab_size": 320,
        "shape_vocab_size": 320,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_text": {  # of the layers with sliding windows
        **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16},
        **{"swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
        **{"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16},
    },
    "dots3_note_vision_encoder": {
        **{"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense", "dense"]},
    },
    "emu3": {
        "vocabulary_map": {"<image>": 250, "<|extra_200|>": 251, "<|visual token 000000|>": 252},
    },
    "dbrx": {  # published configs have rope_theta there, which the class lacks
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "attn_pdrop": 0.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots1": {
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
        **{"n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    },
    "qwen4_exp_text": {
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 8, "indexer_compress_ratio": 2},
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 32],
        "axial_pos_embds_dim": [16, 16],
        "num_buckets": 4,
    },
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {
        **{"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 16},
        **{"hybrid_layer_ids": [1], "layers_block_type": ["linear_attention", "hybrid"]},
    },
}


def small_config(kind: str, **changed: Any) -> Any:
    """Make a small config of a type; ``changed`` replaces further fields."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    fields = _fields(CONFIG_MAPPING[kind], len(tokenizer))
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    fields |= {**ends, "pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False}
    return CONFIG_MAPPING[kind](**{**fields, **SPECIAL.get(kind, {}), **changed})


def _fields(kind: type, vocabulary: int) -> dict[str, Any]:
    """List the constructor's arguments of a small config of a class."""
    default = kind()  # type: ignore[call-arg]
    fields: dict[str, Any] = {}
    sub_configs = getattr(kind, "sub_configs", {})
    values = {**default.to_dict()}
    layers = LAYERS
    for name in KINDS:
        if isinstance(values.get(name), list) and values[name]:
            fields[name] = kinds = _each_once(values[name])
            layers = max(layers, len(kinds))
    for name in KINDS:
        if name in fields:  # all lists as long as the longest
            fields[name] = (fields[name] * layers)[:layers]
    for name, value in values.items():
        if name in sub_configs:
            inner = getattr(default, name)
            if inner is not None:
                fields[name] = _fields(type(inner), vocabulary)
        elif name in COUNTS:
            fields[name] = layers
        elif name == "vocab_size":
            fields[name] = vocabulary
        elif name == "pad_token_id" and isinstance(value, int) and value >= vocabulary:
            fields[name] = 0
        elif name in ("head_dim", "attention_head_dim") and value is None:
            fields[name] = 8
        elif name in SIZE and isinstance(value, int) and not isinstance(value, bool):
            fields[name] = min(SIZE[name], value) if value > 0 else value
        elif "dropout" in name or "jitter" in name or name.endswith("pdrop") or name == "layerdrop":
            fields[name] = 0.0 if isinstance(value, float) else value
    if "kv_lora_rank" in values or "encoder_layers" in values:
        for name, like in {"num_key_value_heads": 4, "encoder_layers": layers}.items():
            if name in fields:
                fields[name] = like
    return {**fields, **SPECIAL.get(getattr(kind, "model_type", ""), {})}


def _each_once(kinds: list[Any]) -> list[Any]:
    """Return the kinds of layers in their order, each once, and at least two layers."""
    once = [kind for index, kind in enumerate(kinds) if kind not in kinds[:index]]
    return (once if len(once) > 1 else once * LAYERS)[:MOST_LAYERS]


def build(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Path:
    """Write a small model with random weights, and the tiny tokenizer.

    Its matrices are wide and its biases are not zero, so that what a layer gets wrong shows.
    """
    torch.manual_seed(0)
    kinds = AutoModelForImageTextToText if kind in WHOLE else AutoModelForCausalLM
    model = kinds.from_config(small_config(kind, **changed))
    widen(model)
    model.to(dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(folder)
    return folder


@torch.no_grad()
def widen(model: torch.nn.Module) -> None:
    """Initialise matrices with a width of 1 / sqrt(inputs), and move biases away from zero."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and parameter.std() < 0.5 and parameter.shape[-1] > 1:
            inputs = math.prod(parameter.shape[1:]) if parameter.ndim > 2 else parameter.shape[-1]
            parameter.normal_(std=max(1 / math.sqrt(inputs), 0.1))
        elif name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)


def load_config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder)
