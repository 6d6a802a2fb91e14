"""Evaluate and save several times within an epoch."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from sft.config.settings import TrainConfig
from sft.plan.schedule import planned_steps, points


class WithinEpochs(TrainerCallback):  # type: ignore[misc]
    """Asks for evaluations and checkpoints within an epoch; the Trainer itself does at its end.

    The points depend on the number of samples and the global batch only, so a resumed run has the
    same ones with any number of ranks or steps.

    Attributes:
        per_epoch: Optimizer steps of an epoch.
        evals: Steps within an epoch after which it evaluates, without the last.
        saves: Steps within an epoch after which it saves, without the last.
    """

    def __init__(self, train: TrainConfig, samples: int) -> None:
        self.per_epoch, _ = planned_steps(train, samples)
        self.evals = frozenset(points(self.per_epoch, train.evals_per_epoch or 1)[:-1])
        self.saves = frozenset(points(self.per_epoch, train.saves_per_epoch or 1)[:-1])

    def evaluates_after(self, step: int) -> bool:
        """Return whether a step is one of ``evals``."""
        return step % self.per_epoch in self.evals

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for both; after the run's last step, the Trainer does them as the epoch ends."""
        step = state.global_step
        if step >= state.max_steps:
            return
        if self.evaluates_after(step) and args.eval_delay <= state.epoch:
            control.should_evaluate = True
        if step % self.per_epoch in self.saves:
            control.should_save = True
