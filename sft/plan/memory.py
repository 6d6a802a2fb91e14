"""An estimate of a step's memory, to choose ``train.gradient_checkpointing``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft.config.rules import AS_SET, Choice
from sft.errors import ConfigError, Problem
from sft.fast.mixers import largest
from sft.hardware import available
from sft.process import world_size
from sft.ranks import TIMEOUT, exchange

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sft.config.settings import Config

MARGIN = 1.3  # for memory that is not counted: buffers, fragmentation, an adapter's optimizer


def activation_bytes(config: Any, tokens: int, itemsize: int, scored: int = 0) -> int:
    """Estimate the bytes of activations that all layers store for the backward pass.

    Per token and layer: inputs and outputs of two norms, two residuals, the query, keys and values,
    the attention's output (whose heads may have a size of their own), and four tensors of the MLP's
    width; an MLP without a gate stores only two, so this is an upper bound. Only eager attention
    stores its scores. After Korthikanti et al. 2022 (arXiv 2205.05198), section 4.1, without
    dropout masks.

    Args:
        config: The model's text config.
        tokens: Tokens in a forward pass.
        itemsize: Bytes of a number.
        scored: Attention scores that are stored per token and head; 0 if they are not stored.
    """
    width = largest(config, "hidden_size", "d_model", "n_embd") or 1
    heads = largest(config, "num_attention_heads", "n_head") or 1
    size = largest(config, "head_dim") or width // heads
    shared = largest(config, "num_key_value_heads") or heads
    inner = largest(config, "intermediate_size", "ffn_dim", "n_inner") or 4 * width
    layers = largest(config, "num_hidden_layers", "n_layer") or 1
    numbers = 6 * width + 2 * heads * size + 2 * shared * size + 4 * inner + heads * scored
    return int(tokens * layers * numbers * itemsize)


def state_bytes(config: Config, parameters: int, itemsize: int, stage: int, frozen: int = 0) -> int:
    """Estimate the bytes of weights, gradients and optimizer state on one rank.

    An adapter's are small compared with the base model's weights and are not counted.

    Args:
        config: The run's config.
        parameters: Number of the model's parameters.
        itemsize: Bytes of a number in the run's precision.
        stage: ZeRO stage.
        frozen: How many of them model.trainable freezes.
    """
    ranks = world_size()
    if config.lora.enabled:
        if config.quantization.load_in_4bit:
            each = 0.57  # half a byte, and a scale for every 64 weights
        else:
            each = 1.0 if config.quantization.load_in_8bit else itemsize
        return int(parameters * each / (ranks if stage == 3 else 1))
    # Without DeepSpeed, frozen weights are stored in float32, too.
    held = frozen * (itemsize if stage else 4) / (ranks if stage == 3 else 1)
    parameters -= frozen
    # AdamW's two moments and the weights in float32; under DeepSpeed also a copy in the run's
    # precision.
    masters, copies = 12 / (ranks if stage else 1), itemsize * (1 if stage else 0)
    gradients = (itemsize if stage else 4) / (ranks if stage >= 2 else 1)
    each = masters + gradients + copies / (ranks if stage == 3 else 1)
    return int(parameters * each + held)


def choose_checkpointing(
    config: Config,
    architecture: PreTrainedModel,
    longest: int,
    itemsize: int,
    stage: int,
    keeps_scores: bool = False,
    taken: int = 0,
) -> Choice:
    """Choose ``train.gradient_checkpointing`` for this rank, from its free memory.

    Args:
        config: The run's config.
        architecture: The model, with or without weights.
        longest: Tokens of the longest sample.
        itemsize: Bytes of a number in the run's precision.
        stage: The ZeRO stage.
        keeps_scores: Whether attention stores its scores for the backward pass.
        taken: Bytes of the free memory that packed layers will take.

    Raises:
        ConfigError: It is set, and the architecture cannot recompute activations.
    """
    asked, name = config.train.gradient_checkpointing, "train.gradient_checkpointing"
    if not architecture.supports_gradient_checkpointing and asked in ("auto", True):
        rule = f"{architecture.config.model_type} cannot recompute activations"
        if asked == "auto":
            return Choice(name, False, rule)
        raise ConfigError([Problem(f"{name}=true", rule, f"{name}=false")])
    if asked != "auto":
        return Choice(name, asked, AS_SET)
    tokens = config.train.per_device_train_batch_size * longest
    text = architecture.config.get_text_config()
    kept = activation_bytes(text, tokens, itemsize, longest if keeps_scores else 0)
    every = architecture.num_parameters()
    frozen = every - architecture.num_parameters(only_trainable=True)
    state = state_bytes(config, every, itemsize, stage, frozen)
    room = available() - taken
    recomputes = MARGIN * (kept + state) > room
    fit = f"plus a margin of {MARGIN - 1:.0%} do not fit" if recomputes else "fit"
    reason = (
        f"{_size(kept)} of activations and {_size(state)} of weights and optimizer state {fit} "
        f"into {_size(room)} free"
    )
    return Choice(name, recomputes, reason)


def _size(number: int) -> str:
    return f"{number / 2**30:.1f} GiB" if number > 2**30 / 10 else f"{number / 2**20:.0f} MiB"


def same_on_all_ranks(config: Config, own: Choice) -> Choice:
    """Turn gradient checkpointing on for every rank if one of them has too little memory.

    Under ZeRO stage 3 the ranks gather each layer together: ranks that compute the layers in
    different orders would wait for each other forever.
    """
    if own.reason == AS_SET:
        return own
    timeout = config.train.extra.get("ddp_timeout", TIMEOUT)
    found = exchange([own.value, own.reason], timeout)
    for rank, (recomputes, reason) in enumerate(found):
        if recomputes and not own.value:
            reason = f"rank {rank} has too little memory, and all ranks must do the same: {reason}"
            return Choice(own.setting, True, reason)
    return own
