"""Which modules of a model mix positions, and how far: windows, chunks, convolutions and states."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sft.config.packages import installed

# Fields of configs that limit how far a token sees, in tokens.
REACHES = (
    *("sliding_window", "sliding_window_size", "attention_window_size", "attention_chunk_size"),
    *("window_size", "local_attention", "keep_window_size", "index_topk", "rel_extent"),
    *("local_attn_chunk_length", "lsh_attn_chunk_length", "chunk_size", "mamba_chunk_size"),
)
# How many tokens an indexer chooses for a token to attend to.
INDEXED = ("index_topk", "index_topk_blocks", "indexer_budget", "keep_window_size")
# Types that train, but whose merge cannot be verified.
REFUSED = {
    "blt": "Transformers makes no cache for it, so that it can generate no text",
    "prophetnet": "its head predicts several tokens at once, so that no merge can be verified",
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# Kinds of layers, as configs name them, whose mixing of positions is not attention.
KINDS = ("linear", "conv", "mamba", "recurrent", "ssm", "kda", "hybrid")
PACKAGES = ("causal_conv1d", "fla", "mamba_ssm")


def text_config(model: Any) -> Any:
    """Return the config of a model's text part."""
    return model.config.get_text_config(decoder=True)


def largest(config: Any, *names: str) -> int:
    """Return the largest value of the first field that a config has; 0 if it has none of them.

    A field may have a value for each layer: a list, or in a heterogeneous config (Gemma 4) the
    configs of the layers, where reading the field of the whole model raises.
    """
    layers = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else []
    for name in names:
        found: list[Any] = []
        for each in layers or [config]:
            value = getattr(each, name, None)
            found += value if isinstance(value, list) else [value]
        if numbers := [value for value in found if isinstance(value, int) and value > 0]:
            return max(numbers)
    return 0


def reach(model: Any) -> int:
    """Return the largest window or chunk of a model's attention in tokens; 0 without one."""
    return max(largest(text_config(model), name) for name in REACHES)


def experts(model: Any) -> bool:
    """Return whether tokens of a batch are sorted by expert, which changes the order of sums."""
    return largest(text_config(model), *EXPERTS) > 0


def mixers(model: Any) -> list[str]:
    """List the classes of the modules that mix positions and are not attention.

    These are convolutions over positions and layers with a recurrent state. They separate documents
    in a row only if they get the boundaries, and only with kernels that take them.

    Args:
        model: The model, with or without weights, or with an adapter.
    """
    decoder = text_decoder(model)
    found = {
        type(decoder.get_submodule(path.rpartition(".")[0])).__name__
        for path, module in decoder.named_modules()
        if isinstance(module, nn.Conv1d) and module.kernel_size[0] > 1
    }
    config = text_config(model)
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds = getattr(config, name, None) or []
        found |= {
            f"{kind} layers"
            for kind in kinds
            if isinstance(kind, str) and any(part in kind for part in KINDS)
        }
    return sorted(found, key=lambda name: (name.endswith(" layers"), name))


def scans(model: Any) -> list[str]:
    """List those of ``mixers`` that have a recurrent state: all but the convolutions."""
    return [name for name in mixers(model) if "conv" not in name.lower()]


def text_decoder(model: Any) -> nn.Module:
    """Return the part of a model that text passes through."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    find = getattr(base, "get_decoder", None)
    found = find() if find is not None else None
    return found if isinstance(found, nn.Module) else base


def lacking(model: Any) -> str:
    """Return why the boundaries of documents do not reach a model's mixers; "" if they do.

    Transformers passes the boundaries to kernels of packages that run on a GPU; its own PyTorch
    code refuses them. Whether a kernel respects them is proven on the model before the first step.

    Args:
        model: The model, with or without weights.
    """
    found = mixers(model)
    if not found:
        return ""
    if not torch.cuda.is_available():
        why = "on a CPU nothing passes them the boundaries of documents"
    elif missing := [name for name in PACKAGES if name in _asked(model) and not installed(name)]:
        why = f"their kernels, which get the boundaries, need {' and '.join(missing)}"
    else:
        return ""
    return f"{found[0]} mixes positions and is not attention; {why}"


def _asked(model: Any) -> set[str]:
    """Return the packages whose kernels the model's code would use."""
    import inspect
    import sys

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    source = inspect.getsource(sys.modules[type(base).__module__])
    return {name for name in PACKAGES if f'"{name}' in source}
