"""The steps of a run, its warm-up, and the steps after which it is logged, evaluated and saved."""

from __future__ import annotations

import math
from collections.abc import Iterator

from sft.config.checks import profile_problems
from sft.config.rules import Choice
from sft.config.settings import Config, TrainConfig
from sft.errors import ConfigError, Problem
from sft.process import world_size

SHARES = ("logging", "eval", "save")  # of whose train.NAME_steps a value below 1 is a fraction
LISTED = 12  # points of an epoch in a message, at most


def choose_warmup(train: TrainConfig, samples: int) -> Choice | None:
    """Choose ``train.warmup_steps`` for a run of one step.

    Transformers rounds a fraction up to a whole step, and the learning rate of the first step of a
    warm-up is 0: the only step would train nothing.

    Raises:
        ConfigError: A number of warm-up steps is set.
    """
    name = "train.warmup_steps"
    if planned_steps(train, samples)[1] > 1 or train.warmup_steps == 0:
        return None
    if train.warmup_steps >= 1:
        rule = "the run has one step, whose learning rate would be 0"
        raise ConfigError([Problem(f"{name}={train.warmup_steps:g}", rule, f"{name}=0")])
    return Choice(name, 0, "the run has one step, which a warm-up would train with a rate of 0")


def planned_steps(train: TrainConfig, samples: int) -> tuple[int, int]:
    """Count the optimizer steps of an epoch and of the run, as the Trainer does."""
    per_forward = train.per_device_train_batch_size * world_size()
    forwards = math.ceil(samples / per_forward)
    per_epoch = math.ceil(forwards / (train.global_batch_size // per_forward))
    if train.max_steps > 0:
        return per_epoch, train.max_steps
    return per_epoch, math.ceil(train.num_train_epochs * per_epoch)


def points(per_epoch: int, count: int) -> list[int]:
    """Space steps of an epoch evenly: point k is after k/count of it, the last at its end.

    Args:
        per_epoch: Optimizer steps of an epoch.
        count: Points, at most ``per_epoch``.

    Returns:
        The steps, counted from 1 within the epoch, shape (count,), ascending.
    """
    return [math.ceil(per_epoch * number / count) for number in range(1, count + 1)]


def choose_cadence(train: TrainConfig, samples: int, evaluates: bool) -> Iterator[Choice]:
    """Choose the steps of settings that are a fraction of all steps, or a count per epoch.

    A fraction is rounded up to a whole step, as Transformers does.

    Args:
        train: The train section.
        samples: Samples of an epoch.
        evaluates: Whether there are held-out rows.

    Raises:
        ConfigError: An epoch has fewer steps than the points that are set.
    """
    per_epoch, total = planned_steps(train, samples)
    strategies = {"logging": "steps", "eval": train.eval_strategy, "save": train.save_strategy}
    problems = []
    for name in SHARES:
        share, strategy = getattr(train, f"{name}_steps"), strategies[name]
        count = getattr(train, f"{name}s_per_epoch", None)
        if name == "eval" and not evaluates:
            continue
        if strategy == "steps" and share < 1:
            reason = f"{share:g} of {total:,} steps"
            yield Choice(f"train.{name}_steps", math.ceil(total * share), reason)
        elif strategy == "epoch" and count is not None and count > per_epoch:
            rule = f"is more than the {per_epoch:,} steps of an epoch"
            setting = f"train.{name}s_per_epoch"
            problems.append(Problem(f"{setting}={count}", rule, f"{setting}={per_epoch}"))
        elif strategy == "epoch" and count is not None:
            steps = ", ".join(map(str, points(per_epoch, count)[:LISTED]))
            more = ", ..." if count > LISTED else ""
            reason = f"after steps {steps}{more} of the {per_epoch:,} of each epoch"
            yield Choice(f"train.{name}s_per_epoch", count, reason)
    if problems:
        raise ConfigError(problems)
    if train.save_total_limit == 1 and train.save_strategy != "no" and evaluates:
        reason = "the newest checkpoint; the one with the best evaluation stays beside it"
        yield Choice("train.save_total_limit", 1, f"{reason}, if they differ")


def require(config: Config, samples: int) -> None:
    """Refuse what the number of samples rules out, before any weight loads.

    Raises:
        ConfigError: The micro-batch is larger than the data, so that most of it would be computed
            for nothing, or the steps to record are after the last one.
    """
    problems = list(profile_problems(config, planned_steps(config.train, samples)[1]))
    micro = config.train.per_device_train_batch_size
    if micro > max(64, samples):
        rule = f"is more than the {samples:,} samples of the data"
        fix = "train.per_device_train_batch_size=8 train.global_batch_size=8"
        problems.append(Problem(f"train.per_device_train_batch_size={micro}", rule, fix))
    if problems:
        raise ConfigError(problems)
