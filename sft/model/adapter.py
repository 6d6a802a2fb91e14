"""Make PEFT's config of the adapter, and try it on the architecture before any weight loads."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from sft.config import zero
from sft.config.rules import named
from sft.config.settings import Config, LoraSection
from sft.errors import ConfigError, Problem
from sft.model.adapter_checks import (
    missing_layers,
    problems,
    require_quick_patterns,
    target_modules,
    targeted,
)
from sft.model.base import load_architecture
from sft.model.quantization import head_problems
from sft.model.shared_weights import new_token_problems
from sft.model.tokenizer import NO_TOKENS, NewTokens, load_tokens
from sft.model.tokens import grow, trained_beside

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel


logger = logging.getLogger("sft")

EXCLUDE = "lora.extra.exclude_modules"
GROUPS = ("all-linear", "attention")  # values of lora.target_modules that stand for many modules


def lora_config(
    config: Config, architecture: PreTrainedModel, new: NewTokens = NO_TOKENS
) -> LoraConfig | None:
    """Make PEFT's config; None if the run trains no adapter.

    Args:
        config: The run's config.
        architecture: The model on the meta device, with the rows of the new tokens.
        new: The new tokens, whose rows the adapter trains.

    Raises:
        ConfigError: Entries match no module or cannot be trained; all of them are listed.
    """
    import torch
    from peft import LoraConfig

    lora = config.lora
    if not lora.enabled:
        return None
    require_quick_patterns(lora, architecture)
    refused = sorted(_refused_names(architecture, targeted(lora, architecture)))
    found = list(problems(lora, architecture, zero.stage(zero.read(config.zero))))
    found += new_token_problems(lora, architecture, new, targeted(lora, architecture))
    found += head_problems(config, architecture, new)
    if refused and lora.target_modules not in GROUPS:
        found.append(_cannot_carry(lora, refused, targeted(lora, architecture)))
    found += missing_layers(lora, targeted(lora, architecture))
    if lora.use_dora and config.quantization.load_in_8bit and not torch.cuda.is_available():
        # PEFT's DoRA quantises the layer's weight again on a CPU, and loses its scales.
        rule = "PEFT cannot compute DoRA on 8-bit layers on a CPU"
        found.append(Problem("lora.use_dora=true", rule, "quantization=nf4"))
    if found:
        raise ConfigError(found)
    values = dataclasses.asdict(lora)  # copies, because PEFT writes into its config
    fields = {name: values[name] for name in named(LoraSection, ours=False)} | values["extra"]
    if new:
        fields |= trained_beside(architecture, new, lora)
    if refused:
        fields["exclude_modules"] = excluding(
            fields.get("exclude_modules"), map(ending_in, refused)
        )
        logger.info(
            "lora.target_modules=%s: %s left out, because PEFT refuses adapters there",
            lora.target_modules,
            ", ".join(refused),
        )
    try:
        fields["target_modules"] = target_modules(lora, architecture)
        made = LoraConfig(task_type="CAUSAL_LM", **fields)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ConfigError([_refused_extra(lora, error)]) from error
    _try(lora, made, architecture)
    return made


def _refused_extra(lora: LoraSection, error: Exception) -> Problem:
    """Return the problem of an adapter's ``extra`` with which PEFT makes no LoraConfig."""
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    about = {key: value for key, value in lora.extra.items() if key in reason} or lora.extra
    setting = " ".join(f"lora.extra.{key}={value}" for key, value in about.items()) or "lora"
    return Problem(setting, f"PEFT refuses it: {reason}", "leave it out")


def _try(lora: LoraSection, made: LoraConfig, architecture: PreTrainedModel) -> PeftModel:
    """Put the adapter on a copy of the model without weights, where PEFT checks it.

    Raises:
        ConfigError: PEFT refuses the adapter.
    """
    try:
        tried = attached(made, architecture)
        _require_own_start(made.init_lora_weights, tried)
        return tried
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        written = f"lora.target_modules={lora.target_modules}"
        excluded = "exclude_modules" in lora.extra
        fix = f"remove {EXCLUDE}" if excluded else "lora.target_modules=attention"
        if "ParamWrapper" in reason:  # PEFT's adapter of a parameter, such as stacked experts
            fix += ", which leaves the experts out"
            for name in ("lora_dropout", "use_dora"):
                if value := getattr(lora, name):
                    written = f"lora.{name}={value}".lower()
                    fix = f"lora.{name}={type(value)(0)}, or {fix}".lower()
        rule = f"PEFT cannot put this adapter on {type(architecture).__name__}: {reason}"
        raise ConfigError([Problem(written, rule, fix)]) from error


def _require_own_start(init: bool | str, tried: PeftModel) -> None:
    """Refuse first values that PEFT cannot compute from the weights of the adapted layers.

    Raises:
        ConfigError: A layer has no such weight, or one of a smaller rank than its adapter's.
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    if not isinstance(init, str) or init == "gaussian":
        return
    key = "lora.extra.init_lora_weights"
    for name, module in tried.named_modules():
        path = name.removeprefix("base_model.model.")
        if isinstance(module, ParamWrapper):
            rule = f"PEFT computes it for linear layers only, and {path} is none"
            raise ConfigError([Problem(f"{key}={init}", rule, f"{key}=true")])
        if isinstance(module, LoraLayer) and init in ("pissa", "olora", "mica"):
            rank = max(module.r.values())
            most = min(module.in_features, module.out_features)
            if rank > most:
                leaf = path.rpartition(".")[2]
                rule = f"{path} has the rank {most}, less than that of its adapter, {rank}"
                fix = f"'lora.rank_pattern={{{leaf}: {most}}}'"
                raise ConfigError([Problem(f"{key}={init}", rule, fix)])


def attached(made: LoraConfig, architecture: PreTrainedModel) -> PeftModel:
    """Put an adapter on a copy of the model without weights."""
    from peft import get_peft_model

    made = copy.deepcopy(made)
    made.init_lora_weights = True  # the others compute with the model's weights
    with warnings.catch_warnings(action="ignore"):  # training shows them
        return get_peft_model(copy.deepcopy(architecture), made, low_cpu_mem_usage=True)


def count_parameters(config: Config) -> int | None:
    """Count the parameters of the adapter on a model without weights.

    Returns:
        None if no adapter is trained, or if it cannot be built, for the reason that is logged: the
        model's config cannot be read, or the adapter's settings do not fit.
    """
    if not config.lora.enabled:
        return None
    try:
        _, new = load_tokens(config.model)
        architecture = load_architecture(config.model)
        grow(architecture, new.needed)
        lora = lora_config(config, architecture, new)
        assert lora is not None
        model = _try(config.lora, lora, architecture)
    except Exception as error:  # an audit of the data needs no adapter, so PEFT must not stop it
        logger.info("the adapter's parameters are not counted: %s", error)
        return None
    trained = (weight.numel() for weight in model.parameters() if weight.requires_grad)
    return int(sum(trained))


def excluding(given: str | Iterable[str] | None, patterns: Iterable[str]) -> str:
    """Add patterns to PEFT's ``exclude_modules``.

    Args:
        given: What is excluded already: a regular expression, or names that PEFT compares with the
            end of a module's path.
        patterns: Regular expressions that match the whole path of a module.

    Returns:
        One regular expression.
    """
    first = [given] if isinstance(given, str) else map(ending_in, sorted(given or ()))
    return "|".join([*first, *patterns])


def ending_in(name: str) -> str:
    """Return a regular expression of the paths that end in a name; it has no backslash."""
    return f"(.*[.])?{name.replace('.', '[.]')}"


def _refused_names(model: PreTrainedModel, paths: Iterable[str]) -> set[str]:
    """List the last parts of the paths at which PEFT refuses an adapter in this architecture.

    Mamba's kernels read the weight of such a layer without calling the layer (peft#2556).
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    refused = set()
    for name in {path.rpartition(".")[2] for path in paths}:
        try:
            _check_lora_target_modules_mamba(LoraConfig(), model, name)
        except ValueError:
            refused.add(name)
    return refused


def _cannot_carry(lora: LoraSection, refused: list[str], paths: list[str]) -> Problem:
    targets, names = lora.target_modules, ",".join(refused)
    rule = f"PEFT refuses adapters on {names} in this architecture"
    fix = "lora.target_modules=all-linear"
    if isinstance(targets, str):
        if any(path.rpartition(".")[2] not in refused for path in paths):
            fix = f"{EXCLUDE}=[{names}]"
        return Problem(f"lora.target_modules={targets}", rule, fix)
    kept = [name for name in targets if name.rpartition(".")[2] not in refused]
    if kept:
        fix = f"lora.target_modules=[{','.join(kept)}]"
    return Problem(f"lora.target_modules=[{','.join(targets)}]", rule, fix)
