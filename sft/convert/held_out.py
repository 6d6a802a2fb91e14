"""What an import holds out for evaluation, and the settings that use an evaluation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from sft.config.foreign import DIFFERS, Outcome, off
from sft.convert.conversion import Conversion

JUDGED = ("early_stopping_patience", "early_stopping_threshold")


def held_out(conversion: Conversion) -> None:
    """Write what is held out, and drop when to evaluate where nothing is."""
    settings = conversion.settings
    if settings.get("dataset.eval_path") or settings.get("dataset.eval_split"):
        settings["dataset.eval_fraction"] = 0.0
    settings.setdefault("dataset.eval_fraction", 0.0)
    if any(
        settings.get(f"dataset.{name}") for name in ("eval_path", "eval_split", "eval_fraction")
    ):
        if "train.evals_per_epoch" in settings and "train.eval_strategy" in settings:
            conversion.drop("train.eval_strategy", "evaluations per epoch decide")
        if settings.get("train.eval_strategy") == "no":
            for name in (*JUDGED, "load_best_model_at_end"):
                conversion.drop(f"train.{name}", "nothing is evaluated while training")
        return
    judged = (*JUDGED, "load_best_model_at_end", "metric", "greater_is_better")
    for name in ("eval_strategy", "eval_steps", "evals_per_epoch", *judged):
        conversion.wanted.pop(f"train.{name}", None)
        conversion.drop(f"train.{name}", "no rows are held out, so nothing is evaluated")


def more_sets(conversion: Conversion, key: str, paths: list[Any]) -> None:
    """Convert the held-out files after the first, each to a set of its own."""
    named = {set_name(path): {"path": path} for path in paths if isinstance(path, str)}
    if len(named) < len(paths):
        conversion.add(key, paths, off("dataset.eval={NAME: {path: FILE}} for each of them"))
        return
    note = "each is evaluated by itself, as eval_NAME_loss, and not with the first one"
    conversion.add(key, paths, Outcome(DIFFERS, {"dataset.eval": named}, note))


def set_name(path: str) -> str:
    """Return the name of a held-out set for a path."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path.rstrip("/")).stem)[:64].strip("-") or "set"
