"""Find out before the first step what the loss depends on, and leave out adapters that it does not.

An adapter that no gradient reaches stays zero: that of a vision tower in a run on text, or that of
a layer whose weight a fused kernel reads without calling the layer.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from sft.errors import ConfigError, Problem
from sft.model.adapter import EXCLUDE, excluding

if TYPE_CHECKING:
    from sft.data.prepared import Prepared
    from sft.training.trainer import Trainer

logger = logging.getLogger("sft")

SHORT, LONG = 9, 1024  # tokens of the first text, and at most of a second one
# Attributes that are changed during the pass. Reentrant checkpointing hides the parameters from
# autograd's graph, and layerdrop leaves out layers at random.
SWITCHED_OFF = {"gradient_checkpointing": False, "layerdrop": 0.0}


def leave_out(trainer: Trainer, prepared: Prepared) -> None:
    """Remove the adapters that the loss does not depend on; the model is not wrapped yet.

    Without an adapter, freeze the weights that it does not depend on.

    Raises:
        ConfigError: Nothing would be trained, or what would not cannot be left out.
    """
    model = trainer.model
    if not getattr(model, "is_quantized", False):
        model.to(trainer.args.device)  # DeepSpeed would do it later
    missing = unreached(trainer, model, prepared)
    if not missing:
        return
    if not isinstance(model, PeftModel):
        _freeze(model, missing)
        return
    layers = _layers(model, missing)
    pattern = _checked(model, missing, layers)
    for path in layers:
        parent, _, name = path.rpartition(".")
        setattr(model.base_model.model.get_submodule(parent), name, layers[path].base_layer)
    settings = model.peft_config[model.active_adapter]
    settings.exclude_modules = excluding(settings.exclude_modules, [pattern])
    logger.info(
        "%d adapters are left out, because no gradient reaches them, as with '%s=\"%s\"'",
        *(len(layers), EXCLUDE, pattern),
    )


def require_reached(trainer: Trainer, prepared: Prepared) -> None:
    """Require that the loss depends on every trained parameter, under ZeRO-3.

    There the model can only be run once DeepSpeed has wrapped it, when nothing can be left out.

    Raises:
        ConfigError: It does not; the fix leaves the adapters out.
    """
    model = trainer.model
    missing = unreached(trainer, trainer.model_wrapped, prepared)
    if not missing or not isinstance(model, PeftModel):
        return  # a weight without gradient stays as it is
    layers = _layers(model, missing)
    pattern = _checked(model, missing, layers)
    rule = f"no gradient reaches {len(layers)} of the adapters"
    everything = excluding(model.peft_config[model.active_adapter].exclude_modules, [pattern])
    raise ConfigError(
        [Problem("lora.target_modules", rule, f"'{EXCLUDE}=\"{everything}\"' overwrite=true")]
    )


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
    """Return the loss of one text, computed as in training."""
    batch = trainer.data_collator([{"input_ids": ids, "labels": ids, "seq_lengths": [len(ids)]}])
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


def _layers(model: PeftModel, missing: Iterable[str]) -> dict[str, LoraLayer]:
    """Map the paths of LoRA layers, none of whose parameters is reached, to the layers."""
    unreached = set(missing)
    found = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            start = f"base_model.model.{path}"
            own = {f"{start}.{name}" for name, p in module.named_parameters() if p.requires_grad}
            if own and own <= unreached:
                found[path] = module
    return found


def _checked(model: PeftModel, missing: list[str], layers: dict[str, LoraLayer]) -> str:
    """Return a regular expression that matches the paths of these layers and of no other.

    Raises:
        ConfigError: Other trained parameters are not reached either, or nothing is.
    """
    inside = tuple(f"base_model.model.{path}." for path in layers)
    others = [name for name in missing if not name.startswith(inside)]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(missing) == len(trained):
        rule, fix = "no gradient reaches any of its adapters", "lora.target_modules=all-linear"
        raise ConfigError([Problem("lora.target_modules", rule, fix)])
    if others:
        raise ConfigError([_problem(model, others[0].removeprefix("base_model.model."))])
    kept = {
        path
        for path, module in model.base_model.model.named_modules()
        if isinstance(module, LoraLayer) and path not in layers
    }
    return "|".join(patterns(layers, kept))


def _problem(model: PeftModel, name: str) -> Problem:
    """Return the problem of a trained parameter that no gradient reaches, outside LoRA layers."""
    path, _, inside = name.partition(".modules_to_save.")
    rule = f"no gradient reaches {path}"
    if not inside:
        return Problem("lora.target_modules", rule, "lora.target_modules=attention")
    names = model.peft_config[model.active_adapter].modules_to_save or ()
    kept = [entry for entry in names if not (path == entry or path.endswith(f".{entry}"))]
    fix = f"[{','.join(kept)}]" if kept else "null"
    return Problem("lora.modules_to_save", rule, f"lora.modules_to_save={fix}")


def patterns(left: Iterable[str], kept: Iterable[str]) -> list[str]:
    """Describe paths by short regular expressions that match none of the paths that are kept.

    ``vision.layers.0.fc1`` and what is beside it become ``vision.*`` if no path below ``vision`` is
    kept. A dot matches itself too; without backslashes the result can be typed on a command line.
    """
    found: list[str] = []
    kept = list(kept)
    for path in sorted(left):
        if any(re.fullmatch(pattern, path) for pattern in found):
            continue
        parts = path.split(".")
        above = [".".join(parts[:count]) + ".*" for count in range(1, len(parts))]
        numbered = re.sub(r"(?<=\.)\d+(?=\.)", "[0-9]+", path)
        found.append(
            next(
                pattern
                for pattern in (*above, numbered, path)
                if not any(re.fullmatch(pattern, other) for other in kept)
            )
        )
    return found


def _freeze(model: Any, missing: list[str]) -> None:
    parameters = dict(model.named_parameters())
    if len(missing) == sum(parameter.requires_grad for parameter in parameters.values()):
        raise ConfigError(
            [Problem("lora=none", "no gradient reaches any weight", "lora=attention")]
        )
    for name in missing:
        parameters[name].requires_grad_(False)
    logger.info(
        "%d weights are not trained, because no gradient reaches them: %s",
        len(missing),
        ", ".join(patterns(missing, parameters.keys() - set(missing))),
    )
