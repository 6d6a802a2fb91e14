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

    from sft.model.tokenizer import NewTokens

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


def freeze_architecture(model: ModelConfig, architecture: PreTrainedModel, new: NewTokens) -> None:
    """Check the patterns, and freeze the model without weights as it will be trained.

    Args:
        model: The model's settings.
        architecture: The model on the meta device, with the rows of the new tokens.
        new: The new tokens.

    Raises:
        ConfigError: A pattern is no regular expression, takes long, or matches nothing; or the
            rows of new tokens would stay as they begin.
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
    if new:
        _require_rows(patterns, architecture)


def _require_rows(patterns: list[str], architecture: PreTrainedModel) -> None:
    """Require that embedding and head are trained, which hold the rows of new tokens.

    Raises:
        ConfigError: One of them is not.
    """
    ends = (architecture.get_input_embeddings(), architecture.get_output_embeddings())
    frozen = [
        f"{path}.weight"
        for path, module in architecture.named_modules()
        if any(module is end for end in ends) and not module.weight.requires_grad
    ]
    if frozen:
        rule = f"leaves {' and '.join(frozen)} as they are, with the rows of model.new_tokens"
        # Two names of one shared weight are one too many.
        added = list({id(architecture.get_parameter(name)): name for name in frozen}.values())
        fix = f"{SETTING}=[{', '.join([*patterns, *added])}]"
        raise ConfigError([Problem(f"{SETTING}=[{', '.join(patterns)}]", rule, f"'{fix}'")])
