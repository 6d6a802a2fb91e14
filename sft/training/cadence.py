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

    def due(self, args: Any, state: Any) -> dict[str, int]:
        """Count the evaluations and saves to come, with those after the step that has just ended.

        Returns:
            ``evaluation`` and ``saving``.
        """
        return {
            "evaluation": self._due(state, args.eval_strategy, state.eval_steps, self.evals),
            "saving": self._due(state, args.save_strategy, state.save_steps, self.saves),
        }

    def _due(self, state: Any, strategy: str, every: int, within: frozenset[int]) -> int:
        if strategy == "no":
            return 0
        period, inner = (every, frozenset()) if strategy == "steps" else (self.per_epoch, within)

        def until(step: int) -> int:
            rounds, rest = divmod(step, period)
            return rounds * (len(inner) + 1) + sum(point <= rest for point in inner)

        last, before = state.max_steps, state.global_step - 1
        # The last step is always followed by both.
        return until(last - 1) - until(before) + 1 if before < last else 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for both; after the run's last step, the Trainer does them as the epoch ends."""
        step = state.global_step
        if step >= state.max_steps:
            return
        if self.evaluates_after(step) and args.eval_delay <= state.epoch:
            control.should_evaluate = True
        if step % self.per_epoch in self.saves:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Do not evaluate again after an early stop within the epoch, as the Trainer would."""
        if control.should_training_stop and state.global_step < state.max_steps:
            control.should_evaluate = False
