"""Sums and counts since the last logged line; a checkpoint stores them for an exact resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class RunningMetrics:
    """Tokens and metrics of this rank since the last logged line.

    Attributes:
        tokens: Tokens seen, without padding where there is a mask; an int, or a tensor on the
            device.
        sums: Entropy, right predictions and trained tokens of the steps that will be logged,
            shape (3,), float64; None: no such step yet.
    """

    def __init__(self) -> None:
        self.tokens: Any = 0
        self.sums: torch.Tensor | None = None

    def state(self) -> dict[str, Any]:
        """Return both as JSON values, for a checkpoint."""
        sums = None if self.sums is None else self.sums.tolist()
        return {"sums": sums, "tokens": int(self.tokens)}

    def restore(self, saved: dict[str, Any], device: torch.device) -> None:
        """Continue from what ``state`` returned."""
        if saved["sums"] is not None:
            self.sums = torch.tensor(saved["sums"], dtype=torch.float64, device=device)
        self.tokens = saved["tokens"]

    def see(self, inputs: dict[str, Any]) -> None:
        """Count the tokens of a micro-batch."""
        mask = inputs.get("attention_mask")
        self.tokens += inputs["input_ids"].numel() if mask is None else mask.sum()

    def add(self, output: Any) -> None:
        """Add the head's metrics of a micro-batch."""
        found = [output.entropy, output.is_top1, output.label_mask]
        sums = torch.stack([values.sum(dtype=torch.float64) for values in found]).detach()
        self.sums = sums if self.sums is None else self.sums + sums

    def flush(self, seen: int) -> dict[str, Any]:
        """Return the means over all ranks, and reset. All ranks must call it.

        Args:
            seen: Tokens that all ranks saw before the last call.

        Returns:
            ``entropy`` in nats, ``mean_token_accuracy`` and ``num_tokens``; empty where nothing was
            summed.
        """
        if self.sums is None:
            return {}
        tokens = torch.tensor([float(self.tokens)], dtype=torch.float64)
        sums = torch.cat([self.sums, tokens.to(self.sums.device)])
        if dist.is_initialized():
            dist.all_reduce(sums)
        entropy, right, trained, new = sums.tolist()
        self.sums, self.tokens = None, 0
        trained = max(trained, 1)
        return {
            "entropy": entropy / trained,
            "mean_token_accuracy": right / trained,
            "num_tokens": seen + int(new),
        }


def share_of(saved: Sequence[dict[str, Any]], rank: int, ranks: int) -> dict[str, Any]:
    """Return the counts that one rank continues from.

    With as many ranks as before, each rank continues from its own counts; with a different number,
    each gets an equal share of the sums.

    Args:
        saved: What each rank had counted when the checkpoint was saved.
        rank: This rank.
        ranks: The number of ranks now.
    """
    if len(saved) == ranks:
        return saved[rank]
    sums = [count["sums"] for count in saved if count["sums"] is not None]
    return {
        **saved[0],
        "loss": sum(count["loss"] for count in saved) / len(saved),
        "sums": [sum(column) / ranks for column in zip(*sums, strict=True)] if sums else None,
        "tokens": sum(count["tokens"] for count in saved) / ranks,
    }
