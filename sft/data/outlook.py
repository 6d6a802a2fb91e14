"""Tell what follows from the counts: the tokens of the whole training, the adapter's capacity."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from sft.config.settings import Config
from sft.data.audit import Counts


@dataclass
class Outlook:
    """What a run trains, as its settings say.

    Attributes:
        steps: Optimizer steps.
        epochs: Passes over the samples; a fraction if the last step is within an epoch.
        tokens: Tokens in all epochs.
        trained_tokens_per_epoch: Tokens in the loss, in one epoch.
        trained_tokens: Tokens in the loss, in all epochs.
        distinct_trained_tokens: Tokens in the loss, each once: neither further epochs nor copies
            add anything that the adapter would have to store.
        adapter_parameters: Trained parameters; None if no adapter is trained, or if the model's
            config cannot be read.
        parameters_per_trained_token: Of the distinct trained tokens.
    """

    steps: int
    epochs: float
    tokens: int
    trained_tokens_per_epoch: int
    trained_tokens: int
    distinct_trained_tokens: int
    adapter_parameters: int | None = None
    parameters_per_trained_token: float | None = None

    def figures(self) -> dict[str, Any]:
        """Return what is known, by name."""
        return {key: v for key, v in dataclasses.asdict(self).items() if v is not None}


def outlook(config: Config, counts: Counts, parameters: int | None) -> Outlook:
    """Compute the outlook of a run.

    Args:
        config: The run's config.
        counts: Counts of the samples to train on.
        parameters: Those of the adapter; None if unknown.
    """
    train = config.train
    per_epoch = max(1, math.ceil(counts.samples / train.global_batch_size))
    whole = train.max_steps <= 0
    steps = math.ceil(train.num_train_epochs * per_epoch) if whole else train.max_steps
    full, rest = divmod(steps, per_epoch)
    visited = full * counts.samples + rest * train.global_batch_size
    epochs = visited / max(1, counts.samples)
    distinct = counts.distinct_trained
    known = parameters is not None and distinct > 0
    return Outlook(
        steps,
        round(epochs, 3),
        round(counts.tokens * epochs),
        counts.trained_tokens,
        round(counts.trained_tokens * epochs),
        distinct,
        parameters if known else None,
        round(float(parameters or 0) / distinct, 3) if known else None,
    )


def warning(found: Outlook, rank: int) -> str | None:
    """Return a warning if the adapter has fewer parameters than there are trained tokens.

    LoRA learns as full fine-tuning does until the data exceeds the adapter's capacity, and falls
    behind from there (Schulman et al. 2025, "LoRA Without Regret",
    https://thinkingmachines.ai/blog/lora). One parameter per token is a rule of thumb.

    Args:
        found: The outlook.
        rank: ``lora.r``.
    """
    parameters, tokens = found.adapter_parameters, found.distinct_trained_tokens
    if not parameters or parameters >= tokens:
        return None
    return (
        f"the adapter has {parameters:,} parameters for {tokens:,} distinct trained tokens, "
        f"{parameters / tokens:.2g} per token; with fewer than 1 it may learn less than full "
        "fine-tuning (Schulman et al. 2025, LoRA Without Regret, Thinking Machines)\n    fix: a "
        f"higher lora.r (lora.r={math.ceil(rank * tokens / parameters)} has 1 per token), or "
        "lora=none train=full"
    )
