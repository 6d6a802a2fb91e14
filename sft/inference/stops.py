"""Write into a model's generation settings at which tokens its answers end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sft.config.settings import ModelConfig
from sft.inference.card import GENERATION, damaged
from sft.model.config_checks import require_stop_tokens

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def all_stop_ids(
    generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> list[int]:
    """List the tokens that end an answer: the tokenizer's EOS, the model's and ``stop_ids``."""
    own = generation.eos_token_id
    found = [tokenizer.eos_token_id, *stop_ids, *(own if isinstance(own, list) else [own])]
    return sorted({token for token in found if token is not None})


def stop_at(
    generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> None:
    """Let ``generate`` stop where training ended an answer, whatever program calls it.

    Args:
        generation: The model's own settings, which are changed. The tokens at which they stop stay.
        tokenizer: Its EOS ends an answer too, and its pad token pads the answers of a batch.
        stop_ids: The tokens that end an answer in the template of training.
    """
    generation.eos_token_id = all_stop_ids(generation, tokenizer, stop_ids)
    generation.pad_token_id = tokenizer.pad_token_id
    # Transformers refuses to save changed settings of which some have no effect, such as a
    # temperature without sampling. Published models have them.
    try:
        generation.validate(strict=True)
    except ValueError as error:
        for name in re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE):
            setattr(generation, name, None)


def generation_of(folder: Path) -> GenerationConfig | None:
    """Read the generation settings in a folder; None if it has none.

    Raises:
        ModelError: They are damaged.
    """
    from transformers import GenerationConfig

    path = folder / GENERATION
    if not path.is_file():
        return None
    try:
        found = GenerationConfig.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise damaged(path, error) from error
    require_stop_tokens(ModelConfig(name_or_path=str(folder)), found)
    return found
