"""What a run sums and counts between logged lines, kept in a checkpoint so that it goes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from sft.trainer import Trainer


class RunningMetrics:
    """Of this rank, since the last logged line.

    Attributes:
        tokens: Seen, padding not among them where a mask tells; an int, or a tensor on the device.
        sums: Entropy, right guesses and trained tokens of the steps that will be logged, (3,) in
            float64; None: no such step yet.
    """

    def __init__(self) -> None:
        self.tokens: Any = 0
        self.sums: torch.Tensor | None = None

    def see(self, inputs: dict[str, Any]) -> None:
        """Count a micro-batch."""
        mask = inputs.get("attention_mask")
        self.tokens += inputs["input_ids"].numel() if mask is None else mask.sum()

    def add(self, output: Any) -> None:
        """Sum what the head found out in a micro-batch."""
        found = [output.entropy, output.is_top1, output.label_mask]
        sums = torch.stack([values.sum(dtype=torch.float64) for values in found]).detach()
        self.sums = sums if self.sums is None else self.sums + sums

    def flush(self, seen: int) -> dict[str, Any]:
        """Give the means over all ranks, and begin anew.

        Args:
            seen: Tokens that all ranks saw before.

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


def kept(trainer: Trainer) -> dict[str, Any]:
    """Give what this rank summed and counted, for a checkpoint."""
    counts, guard = trainer.counts, trainer.guard
    return {
        "loss": trainer._tr_loss.item(),
        "logged_at": trainer._globalstep_last_logged,
        "sums": None if counts.sums is None else counts.sums.tolist(),
        "tokens": int(counts.tokens),
        "all_tokens": trainer._total_train_tokens,
        "metrics": {key: list(values) for key, values in trainer._metrics["train"].items()},
        "recent": list(guard.recent) if guard else [],
        "skipped": guard.skipped if guard else 0,
    }


def restore(trainer: Trainer, saved: Sequence[dict[str, Any]]) -> None:
    """Go on summing and counting, and log as often as this command says.

    Args:
        trainer: Whose.
        saved: What each rank kept. Where ranks are as many as they were, each takes its own again;
            else they share.
    """
    # The intervals in the state are those of the command that saved it.
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)
    ranks = trainer.args.world_size
    if len(saved) == ranks:
        own = saved[trainer.args.process_index]
    else:
        sums = [count["sums"] for count in saved if count["sums"] is not None]
        own = {
            **saved[0],
            "loss": sum(count["loss"] for count in saved) / len(saved),
            "sums": [sum(column) / ranks for column in zip(*sums, strict=True)] if sums else None,
            "tokens": sum(count["tokens"] for count in saved) / ranks,
        }
    device = trainer.args.device
    trainer._tr_loss = torch.tensor(own["loss"], device=device)
    trainer._globalstep_last_logged = own["logged_at"]
    if own["sums"] is not None:
        trainer.counts.sums = torch.tensor(own["sums"], dtype=torch.float64, device=device)
    trainer.counts.tokens, trainer._total_train_tokens = own["tokens"], own["all_tokens"]
    trainer._metrics["train"].update(own["metrics"])
    if trainer.guard:
        trainer.guard.recent.extend(own["recent"])
        trainer.guard.skipped = own["skipped"]
