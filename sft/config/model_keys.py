"""Check which entries of a model's config.json ``model.config`` replaces. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sft.config.rules import typed
from sft.config.settings import Config, ModelConfig
from sft.errors import Problem

SETTING = "model.config"
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
# Entries that are decided elsewhere, and where.
OWNED = {
    **dict.fromkeys(("dtype", "torch_dtype"), "set precision=bf16"),
    "attn_implementation": "set model.attn_implementation=sdpa",
    "quantization_config": "set quantization=nf4",
    **dict.fromkeys(
        ("output_router_logits", "router_aux_loss_coef"),
        "set train.extra.router_aux_loss_coef=0.001",
    ),
    "gradient_checkpointing": "set train.gradient_checkpointing=true",
    "eos_token_id": "set model.eos_token=TOKEN",
    "pad_token_id": "set model.pad_token=TOKEN",
    "name_or_path": "set model.name_or_path=HUB_ID_OR_FOLDER",
    **dict.fromkeys(
        ("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
        "training sets it",
    ),
    **dict.fromkeys(
        ("auto_map", "architectures", "model_type", "transformers_version", "is_encoder_decoder"),
        "it says what the files are",
    ),
}
# Entries that decide which weights there are, or how a weight is divided among heads.
SHAPES = frozenset(
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "num_key_value_heads head_dim n_embd n_layer n_head n_inner d_model num_heads num_layers "
    "ffn_dim word_embed_proj_dim num_experts num_local_experts n_routed_experts "
    "moe_intermediate_size tie_word_embeddings".split()
)


def problems(config: Config) -> Iterator[Problem]:
    """Find the entries that must not be replaced."""
    return refused(config.model, config.model.config, f"{SETTING}.")


def refused(model: ModelConfig, given: dict[str, Any], prefix: str) -> Iterator[Problem]:
    """Yield the problems of some entries, and of those nested in them.

    Args:
        model: The model's settings.
        given: The entries.
        prefix: The name of the setting that holds them.
    """
    for key, value in given.items():
        written = f"{prefix}{key}={typed(value)}"
        if key in OWNED:
            rule = "is not decided by the model's config in training"
            yield Problem(written, rule, f"leave it out: {OWNED[key]}")
        elif key.startswith("_"):
            yield Problem(written, "is internal to Transformers", "leave it out")
        elif key in SHAPES and model.pretrained:
            rule = "changes the shapes of weights, which are loaded from files"
            yield Problem(written, rule, "leave it out, or model.pretrained=false lora=none")
        elif isinstance(value, dict):
            yield from refused(model, value, f"{prefix}{key}.")
