"""The DeepSpeed configuration of a run, which under stage 3 is sized to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft.config import zero_json
from sft.config.rules import AS_SET, Choice
from sft.config.settings import Config, ZeroConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFETCH = 50_000_000  # largest prefetch bucket, in elements; DeepSpeed's own default


def read(zero: ZeroConfig) -> dict[str, Any] | None:
    """Read the DeepSpeed configuration with the overrides merged in.

    Returns:
        None without ZeRO, and for a JSON of stage 0, which is plain DDP.

    Raises:
        ValueError: The file cannot be read, or is not valid JSON.
    """
    ds_config = None if zero.config is None else zero_json.given(zero)
    return ds_config if stage(ds_config) else None


def stage(ds_config: dict[str, Any] | None) -> int:
    """Return the ZeRO stage; 0 without DeepSpeed."""
    section = (ds_config or {}).get("zero_optimization")
    value = section.get("stage") if isinstance(section, dict) else 0
    return int(value) if value in (1, 2, 3) else 0  # zero_checks reports other values


def choose(
    config: Config, architecture: PreTrainedModel, precision: str
) -> tuple[Choice | None, dict[str, Any] | None]:
    """Read the DeepSpeed configuration of a run and, under stage 3, size it to the model.

    Args:
        config: The run's config, already checked.
        architecture: The model, with or without weights.
        precision: fp32, bf16 or fp16, as the run computes.

    Returns:
        The choice of ``zero.config``, whose reason lists what the run decides otherwise, and the
        configuration. Both are None without ZeRO, and the configuration alone under stage 0.
    """
    if config.zero.config is None:
        return None, None
    given, lines = zero_json.settled(zero_json.given(config.zero), config, precision)
    if not stage(given):
        reason = f"{config.zero.config} has ZeRO stage 0, so that the run is one of zero=none"
        return Choice("zero.config", None, "\n".join([reason, *lines])), None
    ds_config, reason = given, AS_SET
    if stage(given) == 3:
        lora = config.lora
        rank = max([lora.r, *lora.rank_pattern.values()]) if lora.enabled else 0
        ds_config = sized(given, architecture, rank)
        before, now = given["zero_optimization"], ds_config["zero_optimization"]
        sizes = [f"{key}={now[key]}" for key in now if now[key] != before[key]]
        if sizes:
            reason += f"; sizes in elements, chosen for the model: {', '.join(sizes)}"
    return Choice("zero.config", config.zero.config, "\n".join([reason, *lines])), ds_config


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
