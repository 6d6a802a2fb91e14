"""Judges the evaluations of a run: which is the best, and whether training stops early."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sft.config import evaluation
from sft.config.settings import TrainConfig


@dataclass(frozen=True)
class Verdict:
    """What the evaluations up to now say.

    Attributes:
        step: The step of the best evaluation; None: there is none with a finite figure.
        value: The figure there.
        waited: Evaluations since the last one that was better by more than the threshold.
        stops: Whether that is ``train.early_stopping_patience``.
    """

    step: int | None
    value: float | None
    waited: int
    stops: bool


class Best:
    """Judges by ``train.metric`` what a run has logged.

    A verdict follows from the logged records alone, which every checkpoint stores. So a resumed run
    stops where the uninterrupted run does, and needs no counters of its own. A run that is resumed
    with a different ``train.metric`` judges its earlier evaluations by the new one, too.
    """

    def __init__(self, train: TrainConfig) -> None:
        self.metric = train.metric
        self.sign = -1.0 if evaluation.greater_is_better(train) else 1.0
        self.patience = train.early_stopping_patience
        self.threshold = train.early_stopping_threshold or 0.0
        self.loads = train.load_best_model_at_end

    def judge(
        self, history: Sequence[Mapping[str, Any]], steps: Collection[int] | None = None
    ) -> Verdict:
        """Judge all evaluations in the order in which they were made.

        As in Transformers, an evaluation resets the patience if it is better than all before it by
        more than the threshold.

        Args:
            history: The logged records, each with its step.
            steps: The steps that may be the best; None: all.
        """
        best: tuple[int, float] | None = None
        waited = 0
        for at, figure in self._judged(history):
            gain = math.inf if best is None else self.sign * (best[1] - figure)
            finite = math.isfinite(figure)
            waited = 0 if finite and gain > self.threshold else waited + 1
            if finite and gain > 0 and (steps is None or at in steps):
                best = at, figure
        stops = self.patience is not None and waited >= self.patience
        step, value = best or (None, None)
        return Verdict(step, value, waited, stops)

    def _judged(self, history: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, float]]:
        """Yield step and figure of each evaluation after a step.

        The figure of an evaluation is in its record; one of the trained batches was logged before.
        """
        trained: float | None = None
        for record in history:
            if evaluation.is_evaluation(record):
                value = record.get(self.metric, trained)
                if record["step"] > 0 and value is not None:
                    yield record["step"], value
            else:
                trained = record.get(self.metric, trained)
