"""Trains only the weights whose names ``model.trainable`` matches, and freezes the others."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sft.config.settings import ModelConfig
from sft.errors import ConfigError, Problem
from sft.limits import slow_pattern

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SETTING = "model.trainable"
RANGE = re.compile(r".*\[\d*:\d*\]$")  # Axolotl's notation for some rows of a weight


def freeze(model: PreTrainedModel, patterns: Iterable[str]) -> None:
    """Freeze each weight none of whose names begins with a match (``re.match``).

    A weight that two modules share has two names, and is trained if one of them matches.
    """
    trained = {
        id(parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if any(re.match(pattern, name) for pattern in patterns)
    }
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def freeze_architecture(model: ModelConfig, architecture: PreTrainedModel) -> None:
    """Check the patterns, and freeze the model without weights as it will be trained.

    Args:
        model: The model's settings.
        architecture: The model on the meta device.

    Raises:
        ConfigError: A pattern is no regular expression, takes long, or matches nothing.
    """
    patterns = model.trainable
    if patterns is None:
        return
    names = [name for name, _ in architecture.named_parameters(remove_duplicate=False)]
    if not patterns:
        rule = "must have a regular expression, or nothing is trained"
        raise ConfigError([Problem(f"{SETTING}=[]", rule, f"{SETTING}=null")])
    found = []
    for pattern in patterns:
        rule, fix = "", f"{SETTING}=[EXPRESSION], such as {SETTING}=[{names[-1]}]"
        if RANGE.match(pattern):
            rule = "names some rows of a weight, and sft trains or freezes whole weights"
            fix = f"{SETTING}=['{pattern.rpartition('[')[0]}']"
        elif reason := slow_pattern([pattern], names):
            rule = reason
        elif not any(re.match(pattern, name) for name in names):
            close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            rule = f"matches the beginning of no weight's name; close are {', '.join(close)}"
            fix = f"{SETTING}=['{re.escape(close[0])}']"
        if rule:
            found.append(Problem(f"{SETTING}: {pattern}", rule, fix))
    if found:
        raise ConfigError(found)
    freeze(architecture, patterns)
