"""Refuse a sweep before its first trial for what a trial would refuse at its own start."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import OmegaConf

from sft.config.checks import check
from sft.config.paths import expand_paths
from sft.config.settings import Config, fill_names
from sft.config.typed import merge
from sft.data import artefact
from sft.errors import ConfigError, Problem
from sft.sweep.trial import Trial


def require(trials: Sequence[Trial], ranks: int) -> None:
    """Check each trial's settings, and that the files that they name exist.

    A combination of values that other trials can use in other combinations stops nothing: in a grid
    there may be no other way to leave it out. Its own process refuses it.

    Args:
        trials: The trials, planned.
        ranks: Ranks of each trial.

    Raises:
        ConfigError: With the problems of the values that no trial can use.
        SftError: A model's folder or the data of a trial do not exist.
    """
    from sft.train import require_files

    with _world_size(ranks):
        checked = [(trial, *_checked(trial.config)) for trial in trials]
    usable = [trial for trial, _, found in checked if not found]
    good = {override for trial in usable for override in trial.overrides}
    problems = [
        _with_usable_values(problem, trial, usable)
        for trial, _, found in checked
        if not usable or not good.issuperset(trial.overrides)
        for problem in found
    ]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    files = {
        f"{config.model} {config.dataset} {config.template}": config
        for _, config, found in checked
        if not found
    }
    for config in files.values():
        require_files(config, artefact.template_of(config.dataset.path) is not None)


def _checked(values: dict[str, Any]) -> tuple[Config, list[Problem]]:
    """Return a trial's typed config and its problems, as its own process would find them."""
    typed = OmegaConf.structured(Config)
    problems = merge(typed, values, Config)
    config: Any = OmegaConf.to_object(typed)
    expand_paths(config)
    problems += check(config)
    if not problems:
        try:
            fill_names(config)
        except ConfigError as error:
            problems += error.problems
    return config, problems


def _with_usable_values(problem: Problem, trial: Trial, usable: Sequence[Trial]) -> Problem:
    """Fix the problem of a swept setting by the values that other trials may use."""
    key, _, _ = problem.setting.partition("=")

    def values(of: Trial) -> list[str]:
        return [item.removeprefix(f"{key}=") for item in of.overrides if item.startswith(f"{key}=")]

    left = dict.fromkeys(value for other in usable for value in values(other))
    if not values(trial) or not left:
        return problem
    return dataclasses.replace(problem, fix=f"{key}={','.join(left)}")


@contextlib.contextmanager
def _world_size(ranks: int) -> Iterator[None]:
    """Let the checks see the number of ranks that a trial's torchrun will have."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(ranks)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before
