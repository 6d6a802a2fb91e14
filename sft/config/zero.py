"""Read a DeepSpeed JSON, merge the overrides into it, and size it to the model under stage 3."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.config.paths import DS_CONFIG_DIR
from sft.config.plain import read_json
from sft.config.rules import AS_SET, Choice
from sft.config.settings import Config, ZeroConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFETCH = 50_000_000  # largest prefetch bucket, in elements; DeepSpeed's own default


def json_path(zero: ZeroConfig) -> Path:
    """Return the path of the JSON: ``zero.config`` is a path, or a file name in ds_config/."""
    assert zero.config is not None
    path = Path(zero.config)
    return path if path.is_absolute() or path.is_file() else DS_CONFIG_DIR / zero.config


def read(zero: ZeroConfig) -> dict[str, Any] | None:
    """Read the DeepSpeed configuration with the overrides merged in; None without ZeRO.

    Raises:
        ValueError: The file cannot be read, or is not valid JSON.
    """
    if zero.config is None:
        return None
    ds_config = read_json(json_path(zero), finite=False)
    if not isinstance(ds_config, dict):
        raise ValueError("its top level must be an object")
    return _merged(ds_config, zero.overrides)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        below = result.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        # A copy, because Transformers and DeepSpeed write into what they are given.
        result[key] = _merged(below, value) if both and below is not None else copy.deepcopy(value)
    return result


def stage(ds_config: dict[str, Any] | None) -> int:
    """Return the ZeRO stage; 0 without DeepSpeed."""
    section = (ds_config or {}).get("zero_optimization")
    value = section.get("stage") if isinstance(section, dict) else 0
    return value if isinstance(value, int) else 0  # zero_checks reports other values


def choose(
    config: Config, architecture: PreTrainedModel
) -> tuple[Choice | None, dict[str, Any] | None]:
    """Read the DeepSpeed configuration of a run and, under stage 3, size it to the model.

    Args:
        config: The run's config, already checked.
        architecture: The model, with or without weights.

    Returns:
        The choice of ``zero.config`` and the configuration; both are None without ZeRO.
    """
    given = read(config.zero)
    if given is None:
        return None, None
    ds_config, reason = given, AS_SET
    if stage(given) == 3:
        lora = config.lora
        rank = max([lora.r, *lora.rank_pattern.values()]) if lora.enabled else 0
        ds_config = sized(given, architecture, rank)
        before, now = given["zero_optimization"], ds_config["zero_optimization"]
        sizes = [f"{key}={now[key]}" for key in now if now[key] != before[key]]
        if sizes:
            reason += f"; sizes in elements, chosen for the model: {', '.join(sizes)}"
    return Choice("zero.config", config.zero.config, reason), ds_config


def sized(ds_config: dict[str, Any], architecture: PreTrainedModel, rank: int) -> dict[str, Any]:
    """Replace sizes that are ``auto`` under stage 3; the Trainer derives them from the width only.

    Args:
        ds_config: A configuration of stage 3 with the overrides merged in.
        architecture: The model, with or without weights.
        rank: The largest LoRA rank; 0 without an adapter.

    Returns:
        The configuration. Tensors below the persistence threshold are not partitioned: biases,
        norms, and adapter tensors that are smaller than every matrix of the base model. A rank
        prefetches at most one decoder layer.
    """
    text = architecture.config.get_text_config()
    apart = {id(module.weight) for module in _ends(architecture)}
    body = [weight for weight in architecture.parameters() if id(weight) not in apart]
    matrices = [weight for weight in body if weight.dim() > 1]
    of_adapter = rank * max(max(weight.shape) for weight in matrices)
    smallest = min(weight.numel() for weight in matrices)
    layer = sum(weight.numel() for weight in body) // text.num_hidden_layers
    sizes = {
        "stage3_param_persistence_threshold": max(
            10 * text.hidden_size,  # the Trainer's value, for biases and norms
            min(of_adapter, smallest - 1),
        ),
        "stage3_prefetch_bucket_size": min(layer, PREFETCH),
    }
    section = ds_config["zero_optimization"]
    chosen = {name: size for name, size in sizes.items() if section.get(name) == "auto"}
    return {**ds_config, "zero_optimization": {**section, **chosen}}


def _ends(architecture: PreTrainedModel) -> list[Any]:
    """Return the embedding and the LM head, whose size depends on the vocabulary."""
    ends = architecture.get_input_embeddings(), architecture.get_output_embeddings()
    return [end for end in ends if end is not None]
