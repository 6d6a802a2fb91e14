"""Find a model's attention, and how its scores are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# Fields of configs with the number of query heads and the width of the model.
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
WIDTHS = ("hidden_size", "n_embd", "d_model")
OTHER_ATTENTION = ("Linear", "Lightning", "Rwkv")  # in names of classes: it has no scores


def is_attention(module: nn.Module) -> bool:
    """Return whether a module is that of a layer's attention, by the name of its class."""
    name = type(module).__name__
    return name.endswith("Attention") and not (
        any(other in name for other in OTHER_ATTENTION)
        or any(type(child).__name__.endswith("Attention") for child in module.children())
    )


def heads_of(config: Any, module: nn.Module) -> tuple[int, int, int]:
    """Return the number of query heads of a layer, and the width of a key and of a value.

    Args:
        config: The config of the text model.
        module: Its attention.
    """
    heads = _first(config, HEADS)
    size = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
    size = size or _first(config, WIDTHS) // heads
    key, value = (getattr(config, name, None) for name in ("qk_head_dim", "v_head_dim"))
    return heads, key or size, value or size


def stores_scores(output: torch.Tensor, inputs: list[torch.Tensor]) -> bool:
    """Return whether autograd has stored the scores of attention: no fused kernel computed them.

    PyTorch uses none for eager attention, for dropout on a CPU, and for values of another width
    than the keys.
    """
    seen, found = {x.grad_fn for x in inputs}, [output.grad_fn]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        if "Softmax" in node.name():
            return True
        seen.add(node)
        found.extend(before for before, _ in node.next_functions)
    return False


def window_of(module: nn.Module) -> int:
    """Return how many tokens a token of a layer attends to; 0: to all before it.

    Layers without a window of their own, such as those of Mistral, take it from the config.
    """
    own = getattr(module, "config", None)
    window = getattr(module, "sliding_window", getattr(own, "sliding_window", None))
    return window if isinstance(window, int) and window > 0 else 0


def _first(config: Any, names: tuple[str, ...]) -> int:
    """Return the first of a config's fields that it has; 1 if it has none."""
    return next((found for name in names if (found := getattr(config, name, None))), 1)
