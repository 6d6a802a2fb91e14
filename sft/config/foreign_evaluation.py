"""Keys of transformers.TrainingArguments and its callbacks that use an evaluation."""

from __future__ import annotations

from typing import Any

from sft.config.evaluation import RESULT
from sft.config.foreign import CONVERTED, DIFFERS, Key, Outcome, by, fn, off, same, to


def metric(value: Any) -> Outcome:
    """Choose the figure of the best evaluation; Transformers puts eval_ before its name."""
    name = f"eval_{str(value).removeprefix('eval_')}"
    if name == "eval_loss":
        return same("eval_loss is the default")
    if name in ("eval_mean_token_accuracy", "eval_entropy"):
        note = "sft's is that of the trained batches, as it was logged last"
        return Outcome(DIFFERS, {"train.metric": name.removeprefix("eval_")}, note)
    if not RESULT.fullmatch(name):
        return off("train.metric=eval_perplexity, eval_NAME_loss or exact_match: sft has no other")
    return Outcome(CONVERTED, {"train.metric": name})


EVALUATION: dict[str, Key] = {
    "load_best_model_at_end": by({True: "train.load_best_model_at_end=true", False: ""}),
    "metric_for_best_model": fn("train.metric", metric, example="eval_hard_loss"),
    "greater_is_better": by({False: ""}, rest=to("train.greater_is_better", example=True)),
    "early_stopping_patience": to("train.early_stopping_patience", example=3),
    "early_stopping_threshold": to("train.early_stopping_threshold", example=0.01),
}
