"""The steps of a run, and its warm-up."""

from __future__ import annotations

import math

from sft.config.rules import Choice
from sft.config.settings import TrainConfig
from sft.errors import ConfigError, Problem
from sft.process import world_size


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
