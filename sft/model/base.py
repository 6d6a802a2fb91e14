"""The base model: find it, load it, and check that it fits the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.config.settings import Config, ModelConfig, QuantizationConfig
from sft.errors import ModelError
from sft.limits import OutOfTime, TimeLimit
from sft.model import config_checks, overrides, trainable, weights
from sft.model.precision import dtype_of, needs_masters
from sft.model.quantization import keep_training_layout
from sft.model.source import loading, source

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sft.data.audit import Counts

BUILDING = 120  # seconds for a model's modules; those of the largest models take ten


def commit_of(model: ModelConfig) -> str | None:
    """Return the commit of a hub model's cached config; None for a local folder.

    Raises:
        ModelError: The model does not exist or cannot be reached.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    name = source(model)["pretrained_model_name_or_path"]
    with loading("config", model):
        path = cached_file(name, "config.json", revision=model.revision)
    commit: str | None = extract_commit_hash(path, None)
    return None if Path(name).is_dir() else commit


def load_config(model: ModelConfig) -> PreTrainedConfig:
    """Load the model's config, and refuse one with which nothing could be built.

    Raises:
        ModelError: It does not exist, cannot be reached, has more layers than any model or no
            positions, or its files are quantised in a way that Transformers would ignore; or there
            is an adapter beside it, which Transformers would load with the model, unchecked.
    """
    from transformers import AutoConfig
    from transformers.utils import find_adapter_config_file

    with loading("config", model):
        config = AutoConfig.from_pretrained(**source(model))
        name = str(model.name_or_path)
        beside = find_adapter_config_file(name, revision=model.revision)
    if beside is not None:
        raise ModelError(
            f"{name} holds an adapter beside the model (adapter_config.json)\n"
            "    fix: put the adapter into a folder of its own, and merge it into the model"
        )
    config = overrides.replaced(model, config)
    config_checks.require_plausible(model, config)
    if not model.pretrained:
        for part in (config, config.get_text_config(decoder=True)):
            vars(part).pop("quantization_config", None)  # which is of the files' weights
    return config


def load_architecture(model: ModelConfig, buffers: bool = False) -> PreTrainedModel:
    """Build the model on the meta device: every module and shape, no weights, no memory.

    Args:
        model: The model's name and revision.
        buffers: Create the buffers on the CPU, such as rotary frequencies: a forward pass needs
            them.

    Raises:
        ModelError: The config does not exist or cannot be reached.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = load_config(model)
    options: dict[str, Any] = {"dtype": torch.float32} if buffers else {}
    empty = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
    try:
        with loading("config", model), no_init_weights(), empty, TimeLimit(BUILDING):
            built = AutoModelForCausalLM.from_config(
                config, trust_remote_code=model.trust_remote_code, **options
            )
    except OutOfTime:
        raise ModelError(
            f"the modules of {model.name_or_path} take more than {BUILDING} s to build, without "
            "any weight\n    fix: correct its config.json, or download it again"
        ) from None
    config_checks.require_decoder(model, built.config)
    if model.config and model.pretrained:
        plain = load_architecture(dataclasses.replace(model, config={}))
        overrides.require_same_shapes(model, plain, built)
    return built


def check_fits(
    architecture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parts: Iterable[Counts]
) -> None:
    """Check that the model has an embedding for each token id and each position.

    Raises:
        ModelError: The tokenizer belongs to a different model, or a sample has more tokens than the
            model has positions.
    """
    rows = architecture.get_input_embeddings().weight.shape[0]
    counts = list(parts)
    largest = max(tokenizer.pad_token_id, *(part.largest_id for part in counts))
    if largest >= rows:
        raise ModelError(
            f"the data has token id {largest}, but the model's embedding has {rows} rows\n"
            "    fix: use the model's own tokenizer"
        )
    longest = max(part.longest for part in counts)
    positions = getattr(architecture.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < longest:  # XLNet has -1
        raise ModelError(
            f"a sample has {longest} tokens, but the model has {positions} positions\n"
            f"    fix: dataset.max_length={positions}, or a model with a longer context"
        )


def load_base(
    config: Config, architecture: PreTrainedConfig, precision: str, kernel: str | None
) -> PreTrainedModel:
    """Load the base model, or initialise one with random weights.

    Under ZeRO-3 the trainer's config must exist already, so that each rank loads only its share.

    Args:
        config: The run's config.
        architecture: The model's Transformers config.
        precision: fp32, bf16 or fp16.
        kernel: The attention implementation; None: the architecture's own.

    Raises:
        ModelError: The weights do not exist or cannot be reached.
    """
    from transformers import AutoModelForCausalLM, set_seed
    from transformers.integrations import is_deepspeed_zero3_enabled

    dtype = dtype_of("fp32" if needs_masters(config) else precision)
    options: dict[str, Any] = {"dtype": dtype}
    if kernel is not None:
        options["attn_implementation"] = kernel
        if "/" in kernel:  # of the hub; model.trust_remote_code consents to its code
            options["allow_all_kernels"] = True
    set_seed(config.seed)
    with loading("weights", config.model):
        if config.model.pretrained:
            stored = load_config(config.model)
            options |= weights.stored_as(stored, config.quantization, dtype)
            if is_deepspeed_zero3_enabled():  # it places the weights itself
                options.pop("device_map", None)
            model = weights.whole(config.model, **options)
        else:
            model = AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=config.model.trust_remote_code, **options
            )
    if getattr(model, "is_loaded_in_4bit", False):  # set so, or its files are 4-bit
        keep_training_layout(model)
    if config.model.trainable is not None:
        trainable.freeze(model, config.model.trainable)
    return model


def load_frozen(
    model: ModelConfig, quantization: QuantizationConfig, dtype: Any = "auto"
) -> PreTrainedModel:
    """Load a base model without training it, to generate text or to verify a merge.

    Args:
        model: The model's name and revision.
        quantization: How training stored its weights.
        dtype: ``auto`` for the precision of its files, or a torch dtype.

    Raises:
        ModelError: The model does not exist or cannot be reached.
    """
    import torch

    config = load_config(model)
    with loading("weights", model):
        computed = torch.float32 if dtype == "auto" else dtype
        options = weights.stored_as(config, quantization, computed)
        if torch.cuda.is_available() and dtype == "auto":
            options["device_map"] = weights.device_map()
        loaded = weights.whole(model, dtype=dtype, **options).eval()
        config_checks.require_decoder(model, loaded.config)
        return loaded
