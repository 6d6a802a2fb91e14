"""Draw tokens so that an answer depends on its prompt and the seed, and on nothing else.

``generate`` draws from PyTorch's global generators, which training uses for dropout, and draws the
tokens of a batch together. Here each prompt has a generator of its own. The processor adds Gumbel
noise to the scores; the highest sum is then distributed as a token drawn from their softmax, so the
greedy search of ``generate`` samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sft.config.settings import SampleConfig


class Draw(LogitsProcessor):  # type: ignore[misc]
    """Applies the settings of sampling to the scores of a batch, row by row."""

    def __init__(
        self,
        settings: SampleConfig,
        lengths: Sequence[int],
        numbers: Sequence[int],
        device: torch.device,
    ) -> None:
        """Make the rows' generators.

        Args:
            settings: The section sample.
            lengths: Tokens of each row's prompt, without padding.
            numbers: Each row's number among all prompts; with the seed, it decides what is drawn.
            device: Where the scores are.
        """
        self.lengths, self.width = lengths, max(lengths)
        self.steps = LogitsProcessorList()
        if settings.repetition_penalty != 1:
            self.steps.append(RepetitionPenaltyLogitsProcessor(float(settings.repetition_penalty)))
        self.generators: list[torch.Generator] = []
        if settings.temperature is not None:
            self.steps.append(TemperatureLogitsWarper(float(settings.temperature)))
            if settings.top_k:
                self.steps.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1:
                self.steps.append(TopPLogitsWarper(settings.top_p))
            for number in numbers:
                [seed] = np.random.SeedSequence((settings.seed, number)).generate_state(1)
                self.generators.append(torch.Generator(device).manual_seed(int(seed)))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Return the scores whose highest is the next token; both are (rows, ...)."""
        rows = []
        for row, length in enumerate(self.lengths):
            # Without the padding, whose token may be EOS: it has not occurred in the text.
            text = input_ids[row : row + 1, self.width - length :]
            found = self.steps(text, scores[row : row + 1].float())
            if self.generators:
                drawn = torch.empty_like(found).exponential_(generator=self.generators[row])
                found = found - drawn.clamp(min=torch.finfo(drawn.dtype).tiny).log()
            rows.append(found)
        return torch.cat(rows)
