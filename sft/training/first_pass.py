"""Find out before the first step which parameters the loss depends on, in one short pass."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sft.errors import ModelError

if TYPE_CHECKING:
    from sft.data.collator import Collator
    from sft.data.prepared import Prepared
    from sft.training.trainer import Trainer

SHORT, LONG = 9, 1024  # tokens of the first text, and at most of a second one
# Attributes that are changed during the pass. Reentrant checkpointing hides the parameters from
# autograd's graph, and layerdrop leaves out layers at random.
SWITCHED_OFF = {"gradient_checkpointing": False, "layerdrop": 0.0}


def unreached(trainer: Trainer, wrapped: Any, prepared: Prepared) -> list[str]:
    """Run a short text forwards, and list the trained parameters that its loss does not depend on.

    Autograd's graph of the loss holds every parameter that a backward pass would reach, so no
    backward pass is made. Nothing else is left behind: weights, gradients, counters and random
    generators stay as they are.

    Args:
        trainer: The trainer.
        wrapped: The model, as it is or as training wrapped it.
        prepared: The data, from which the text is taken.

    Returns:
        Names in ``trainer.model``.
    """
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    sample = prepared.train.dataset[0]["input_ids"]
    longest = min(LONG, max(SHORT, prepared.train.counts.longest))
    missing: list[str] = []
    for length in (SHORT, longest):
        ids = (list(sample) * length)[:length]
        found = {id(parameter) for parameter in _parameters_of(_loss(trainer, wrapped, ids))}
        # A short text is sent to few of the experts, so one of them speaks for all.
        reached = {_expert(name) for name, p in trained.items() if id(p) in found}
        missing = [name for name in trained if _expert(name) not in reached]
        if not missing:
            break  # otherwise a longer text decides: some layers need more tokens
    return missing


def _expert(name: str) -> str:
    """Return a parameter's name without the number of its expert, the last of several numbers."""
    numbers = list(re.finditer(r"(?<=\.)\d+(?=\.)", name))
    return (
        name if len(numbers) < 2 else f"{name[: numbers[-1].start()]}*{name[numbers[-1].end() :]}"
    )


def _loss(trainer: Trainer, wrapped: Any, ids: list[int]) -> torch.Tensor:
    """Return the loss of one text, computed as in training.

    An architecture with a mask of its own cannot take the bounds of documents. Its text is computed
    without them here; the proof of isolation pads its samples, or refuses the run, later.

    Raises:
        ModelError: The model cannot compute a text of this length.
    """
    collator = trainer.data_collator
    try:
        try:
            return _computed(trainer, wrapped, ids, collator)
        except ModelError:
            collator = dataclasses.replace(collator, padding_free=False, documents=False)
            return _computed(trainer, wrapped, ids, collator)
    except ValueError as error:
        raise ModelError(
            f"{trainer.bare_model.config.model_type} cannot be trained on a text of {len(ids)} "
            f"tokens: {error}\n    fix: model.name_or_path of a model of a different architecture"
        ) from error


def _computed(trainer: Trainer, wrapped: Any, ids: list[int], collator: Collator) -> torch.Tensor:
    """Return the loss of one text that a collator makes a batch of."""
    batch = collator([{"input_ids": ids, "labels": ids, "seq_lengths": [len(ids)]}])
    inputs = {
        key: value.to(trainer.args.device) if isinstance(value, torch.Tensor) else value
        for key, value in batch.items()
    }
    with _undisturbed(wrapped), trainer.accelerator.autocast(), torch.enable_grad():
        loss: torch.Tensor = wrapped(**inputs, use_cache=False, fused_lm_head=True).loss
    return loss


@contextlib.contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Run the model as in training, and restore its state and the random generators."""
    before = [
        (module, name, getattr(module, name))
        for module in model.modules()
        for name in SWITCHED_OFF
        if isinstance(getattr(module, name, None), bool | float)
    ]
    was_training, drawn, numbers = model.training, random.getstate(), np.random.get_state()
    try:
        for module, name, _ in before:
            setattr(module, name, SWITCHED_OFF[name])
        with torch.random.fork_rng():
            model.train()  # a fused kernel may be used in training only
            yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)
        model.train(was_training)
        random.setstate(drawn)
        np.random.set_state(numbers)


def _parameters_of(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the leaves of autograd's graph."""
    seen: set[Any] = set()
    todo = [loss.grad_fn]
    while todo:
        node: Any = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if type(node).__name__ == "AccumulateGrad":
            yield node.variable
        todo += [parent for parent, _ in node.next_functions]
