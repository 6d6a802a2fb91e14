"""Write into a model's generation settings at which tokens its answers end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sft.inference.answers import all_stop_ids

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase


def stop_at(
    generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]
) -> None:
    """Let ``generate`` stop where training ended an answer, whatever program calls it.

    Args:
        generation: The model's own settings, which are changed. The tokens at which they stop stay.
        tokenizer: Its EOS ends an answer too, and its pad token pads the answers of a batch.
        stop_ids: The tokens that end an answer in the template of training.
    """
    stops = all_stop_ids(generation, tokenizer, stop_ids)
    generation.eos_token_id = stops if len(stops) > 1 else stops[0]
    generation.pad_token_id = tokenizer.pad_token_id
    # Transformers refuses to save changed settings of which some have no effect, such as a
    # temperature without sampling. Published models have them.
    try:
        generation.validate(strict=True)
    except ValueError as error:
        for name in re.findall(r"^- `(\w+)`:", str(error), re.MULTILINE):
            setattr(generation, name, None)
