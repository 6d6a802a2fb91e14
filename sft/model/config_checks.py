"""Entries of a model's config.json with which nothing could be built, or nothing right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft.config.settings import ModelConfig
from sft.errors import ModelError
from sft.model.quantization import unknown_method
from sft.model.source import named

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

MOST_LAYERS = 10_000  # the largest models have some hundreds
DROPOUTS = ("dropout", "dropout_prob", "pdrop")  # the ends of such entries' names


def require_plausible(model: ModelConfig, config: PreTrainedConfig) -> None:
    """Refuse entries that no model has, and that Transformers does not check.

    Raises:
        ModelError: There are more layers than any model has or no positions, a dropout is no
            probability, or the files are quantised in a way that Transformers would ignore.
    """
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", 1)
    if not isinstance(layers, int) or not 1 <= layers <= MOST_LAYERS:
        raise _wrong(model, f"num_hidden_layers={layers}", f"from 1 to {MOST_LAYERS:,}")
    positions = getattr(text, "max_position_embeddings", None)
    if positions == 0:  # None and XLNet's -1 stand for no limit
        raise _wrong(model, f"max_position_embeddings={positions}", "1 or more")
    for entry, value in vars(text).items():
        if entry.endswith(DROPOUTS) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise _wrong(model, f"{entry}={value}", "from 0 to 1")
    if method := unknown_method(config):
        raise ModelError(
            f"the config of {model.name_or_path} says that its files are quantised by {method}, "
            "which the installed Transformers does not know: it would take the stored numbers for "
            f"the weights\n    fix: {named().name}=THE_MODEL_THAT_WAS_QUANTISED, or remove "
            "quantization_config from its config.json if its weights are not quantised"
        )


def require_decoder(model: ModelConfig, config: PreTrainedConfig) -> None:
    """Refuse a decoder whose config says that it has an encoder.

    The decoders of encoder-decoder families set the entry to false when they are built.

    Raises:
        ModelError: It does.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise _wrong(model, "is_encoder_decoder=true", "false for a model that continues a text")


def require_stop_tokens(model: ModelConfig, generation: GenerationConfig | None) -> None:
    """Refuse stop tokens that are no token ids, which Transformers does not check.

    Raises:
        ModelError: ``eos_token_id`` in generation_config.json is neither an id nor a list of ids.
    """
    own = getattr(generation, "eos_token_id", None)
    for token in own if isinstance(own, list) else [own]:
        if token is not None and type(token) is not int:
            raise ModelError(
                f"the generation_config.json of {model.name_or_path} has eos_token_id={own!r}, "
                "which must be a token id or a list of them\n"
                "    fix: correct that file, or download it again"
            )


def _wrong(model: ModelConfig, entry: str, rule: str) -> ModelError:
    return ModelError(
        f"the config of {model.name_or_path} has {entry}, which must be {rule}\n"
        "    fix: correct its config.json, or download it again"
    )
