"""Leave out the adapters that the first pass does not reach, or refuse the run.

An adapter that no gradient reaches stays zero: that of a vision tower in a run on text, or that of
a layer whose weight a kernel reads without calling the layer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from sft.errors import ConfigError, Problem
from sft.model.adapter import EXCLUDE, excluding
from sft.training.first_pass import unreached

if TYPE_CHECKING:
    from sft.data.prepared import Prepared
    from sft.training.trainer import Trainer

logger = logging.getLogger("sft")

BASE = "base_model.model."  # PEFT's prefix of the names in the base model


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
    _require_saved(model)
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
    _require_saved(model)
    if not missing or not isinstance(model, PeftModel):
        return  # a weight without gradient stays as it is
    layers = _layers(model, missing)
    pattern = _checked(model, missing, layers)
    rule = f"no gradient reaches {len(layers)} of the adapters"
    everything = excluding(model.peft_config[model.active_adapter].exclude_modules, [pattern])
    raise ConfigError(
        [Problem("lora.target_modules", rule, f"'{EXCLUDE}=\"{everything}\"' overwrite=true")]
    )


def _require_saved(model: Any) -> None:
    """Require that every trained parameter belongs to the adapter, which alone is saved.

    Raises:
        ConfigError: The run would train a parameter of the base model too.
    """
    if not isinstance(model, PeftModel):
        return
    parameters = dict(model.named_parameters(remove_duplicate=False))  # tied ones have two names
    saved = {
        id(value)
        for value in get_peft_model_state_dict(
            model, parameters, save_embedding_layers=False
        ).values()
    }
    for name, parameter in parameters.items():
        if parameter.requires_grad and id(parameter) not in saved:
            path = name.removeprefix(BASE).rpartition(".")[0]
            rule = f"{path} would be trained, although it is not a part of the adapter"
            fix = f"lora.modules_to_save=[{path.rpartition('.')[2]}]"
            raise ConfigError([Problem("lora", rule, fix)])


def _layers(model: PeftModel, missing: Iterable[str]) -> dict[str, LoraLayer]:
    """Map the paths of LoRA layers, none of whose parameters is reached, to the layers."""
    unreached = set(missing)
    found = {}
    for path, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper):
            start = f"{BASE}{path}"
            own = {f"{start}.{name}" for name, p in module.named_parameters() if p.requires_grad}
            if own and own <= unreached:
                found[path] = module
    return found


def _checked(model: PeftModel, missing: list[str], layers: dict[str, LoraLayer]) -> str:
    """Return a regular expression that matches the paths of these layers and of no other.

    Raises:
        ConfigError: Other trained parameters are not reached either, or nothing is.
    """
    inside = tuple(f"{BASE}{path}." for path in layers)
    others = [name for name in missing if not name.startswith(inside)]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if len(missing) == len(trained):
        rule, fix = "no gradient reaches any of its adapters", "lora.target_modules=all-linear"
        raise ConfigError([Problem("lora.target_modules", rule, fix)])
    if others:
        raise ConfigError([_problem(model, others[0].removeprefix(BASE))])
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
