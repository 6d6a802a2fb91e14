"""Check which settings, and which combinations of settings, cannot be used. Imports no torch.

Checks that need the model's architecture (does ``target_modules`` match anything?) are in
``sft.model.adapter_checks`` and run on a model without weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from sft.config import (
    data_checks,
    evaluation,
    lora_checks,
    model_keys,
    names,
    no_effect,
    packages,
    sample_checks,
    upstream,
    zero_checks,
)
from sft.config.compare import CONTENTS, flatten
from sft.config.new_tokens import read_new_tokens
from sft.config.rules import (
    HUB_KERNEL,
    LONGEST_NAME,
    declared,
    default_of,
    name_fault,
    rule_problems,
)
from sft.config.settings import Config, TrainConfig
from sft.errors import ConfigError, Problem
from sft.process import world_size

MIN_RATES = {"min_lr", "min_lr_rate"}
OWN_GROUPS = ("galore_", "apollo_", "lomo", "adalomo")  # these group parameters themselves


def check(config: Config) -> list[Problem]:
    """Find every problem of a config whose keys and types have been checked."""
    problems = [_meant(problem) for problem in rule_problems(config)]
    for find in (
        _names,
        _tokens,
        _resume,
        data_checks.problems,
        evaluation.problems,
        _batch,
        _schedule,
        _optimizer,
        _precision,
        lora_checks.lora,
        lora_checks.quantization,
        model_keys.problems,
        names.extra_problems,
        packages.problems,
        no_effect.problems,
        sample_checks.problems,
    ):
        problems += find(config)
    problems += zero_checks.problems(config.zero, config.train.optim, not config.lora.enabled)
    return problems


def _meant(problem: Problem) -> Problem:
    """Let the fix be the value of ours for a value of other tools, such as packing=true."""
    key, _, value = problem.setting.partition("=")
    item = dict(declared(Config)).get(key)
    if item is None or not item.metadata["rule"] or not item.metadata["rule"].choices:
        return problem
    hint = names.foreign_hint(key, Config, value)
    return dataclasses.replace(problem, fix=hint) if hint.startswith(f"{key}=") else problem


def _names(config: Config) -> Iterator[Problem]:
    if config.output_dir == "":
        yield Problem("output_dir=", "must not be empty", "output_dir=DIR, or leave it out")
    if not config.model.name_or_path:
        yield Problem(
            "model.name_or_path=null", "a base model is needed", "model.name_or_path=HUB_ID_OR_DIR"
        )
    if config.run_name is not None and (fault := name_fault(config.run_name)):
        short = f"run_name={config.run_name[: LONGEST_NAME // 4]}"
        fix = short if fault.startswith("a name") else "output_dir=DIR"
        yield Problem(f"run_name={config.run_name}", fault, fix)
    for key in ("model.name", "dataset.name"):  # parts of run_name if that is null
        section, _, leaf = key.partition(".")
        name = getattr(getattr(config, section), leaf)
        if name is not None and (fault := name_fault(name)):
            yield Problem(f"{key}={name}", fault, f"{key}=NAME")


def _tokens(config: Config) -> Iterator[Problem]:
    """Check the settings of tokens, whatever the tokenizer is."""
    try:
        new = read_new_tokens(config.model.new_tokens)
    except ConfigError as error:
        yield from error.problems
        return
    for name in ("eos_token", "pad_token"):
        if getattr(config.model, name) == "":
            rule = "has no value; it must be the text of a token, or null"
            yield Problem(f"model.{name}=", rule, f"model.{name}=null")
    if new and config.lora.extra.get("trainable_token_indices") is not None:
        rule = "model.new_tokens chooses the rows to train by itself"
        fix = "leave lora.extra.trainable_token_indices out"
        yield Problem("lora.extra.trainable_token_indices", rule, fix)


def _resume(config: Config) -> Iterator[Problem]:
    settings = flatten(dataclasses.asdict(config))
    # The run that is resumed may have other entries than this command, such as model.config's.
    mappings = tuple(f"{n}." for n, item in declared(Config) if isinstance(default_of(item), dict))
    for name in config.resume.allow:
        if not (
            name in CONTENTS
            or name.startswith(mappings)
            or any(key == name or key.startswith(f"{name}.") for key in settings)
        ):
            known = [*settings, *CONTENTS]
            yield Problem(
                f"resume.allow=[{name}]",
                f"{name} is neither a setting, nor base, data or adapter",
                upstream.did_you_mean(name, known),
            )


def _batch(config: Config) -> Iterator[Problem]:
    train, ranks = config.train, world_size()
    micro = train.per_device_train_batch_size
    per_forward = micro * ranks
    if micro >= 1 and train.global_batch_size % per_forward:
        nearest = max(1, round(train.global_batch_size / per_forward)) * per_forward
        yield Problem(
            f"train.global_batch_size={train.global_batch_size}",
            f"must be a multiple of per_device_train_batch_size x ranks = {micro} x {ranks}",
            f"train.global_batch_size={nearest}, or change train.per_device_train_batch_size",
        )


def _schedule(config: Config) -> Iterator[Problem]:
    train, data = config.train, config.dataset
    held_out = evaluation.held_out(data)
    if train.eval_strategy == "steps" and train.eval_steps is None:
        yield Problem("train.eval_strategy=steps", "needs train.eval_steps", "train.eval_steps=100")
    evaluations = {
        "train.eval_strategy=steps": train.eval_strategy == "steps",
        f"train.evals_per_epoch={train.evals_per_epoch}": train.evals_per_epoch is not None,
    }
    for asked in (name for name, wanted in evaluations.items() if wanted and not held_out):
        yield Problem(asked, "there are no held-out rows", "dataset.eval_fraction=0.05")
    for name in ("eval", "save"):
        count = getattr(train, f"{name}s_per_epoch")
        if count is not None and data.streaming:
            yield Problem(
                f"train.{name}s_per_epoch={count}",
                "with dataset.streaming the length of an epoch is not known",
                f"train.{name}s_per_epoch=null train.{name}_strategy=steps train.{name}_steps=0.1",
            )
    if train.max_steps == 0:
        yield Problem("train.max_steps=0", "no step would be trained", "train.max_steps=-1")
    if train.max_steps > 0:
        yield from profile_problems(config, train.max_steps)
    if train.warmup_steps >= 1 and train.warmup_steps != int(train.warmup_steps):
        yield Problem(
            f"train.warmup_steps={train.warmup_steps}",
            "must be a whole number of steps, or a fraction below 1",
            "train.warmup_steps=0.03",
        )
    if 0 < train.max_steps <= train.warmup_steps:
        yield Problem(
            f"train.warmup_steps={train.warmup_steps:g}",
            f"the learning rate would not reach its peak within train.max_steps={train.max_steps}",
            "train.warmup_steps=0.03",
        )


def profile_problems(config: Config, last: int) -> Iterator[Problem]:
    """Check that the steps to record exist; ``last`` is the run's last step."""
    start = config.profile.start
    if config.profile.torch and start > last:
        rule = f"is after the last step, {last:,}"
        yield Problem(f"profile.start={start}", rule, f"profile.start={max(1, last - 2)}")


def _optimizer(config: Config) -> Iterator[Problem]:
    train, default = config.train, TrainConfig()
    # Skip the check for defaults: reading the legal names from the library's source takes 0.1 s.
    if train.optim != default.optim and train.optim not in upstream.optimizer_names():
        yield Problem(
            f"train.optim={train.optim}",
            "the installed version of Transformers has no such optimizer",
            "train.optim=adamw_torch"
            if train.optim.lower() in ("adam", "adamw")
            else upstream.did_you_mean(train.optim, upstream.optimizer_names()),
        )
    if train.optim.startswith(OWN_GROUPS):
        for name in ("loraplus_lr_ratio", "embedding_learning_rate"):
            if getattr(train, name) is not None:
                yield Problem(
                    f"train.{name}={getattr(train, name):g}",
                    f"has no effect with train.optim={train.optim}, which groups the parameters",
                    "train.optim=adamw_torch_fused",
                )
    schedule, given = train.lr_scheduler_type, train.lr_scheduler_kwargs
    if schedule == default.lr_scheduler_type and not given:
        return
    written_type = f"train.lr_scheduler_type={schedule}"
    if schedule not in upstream.scheduler_names():
        yield Problem(
            written_type,
            "the installed version of Transformers has no such schedule",
            upstream.did_you_mean(schedule, upstream.scheduler_names()),
        )
        return
    legal = upstream.scheduler_kwargs(schedule)
    if legal is None:
        return
    for key in given.keys() - legal.keys():
        hint = upstream.did_you_mean(key, legal)
        yield Problem(
            f"train.lr_scheduler_kwargs.{key}={given[key]}",
            f"the schedule {schedule} has no argument {key}",
            "train.lr_scheduler_type=cosine_with_min_lr" if key in MIN_RATES else hint,
        )
    for key, required in legal.items():
        if required and key not in given:
            yield Problem(
                written_type, f"needs the argument {key}", f"train.lr_scheduler_kwargs.{key}=..."
            )
    if MIN_RATES <= legal.keys() and len(MIN_RATES & given.keys()) != 1:
        yield Problem(
            written_type,
            "needs exactly one of the arguments min_lr and min_lr_rate",
            "train.lr_scheduler_kwargs.min_lr_rate=0.1",
        )


def _precision(config: Config) -> Iterator[Problem]:
    kernel = config.model.attn_implementation or ""
    of_hub = HUB_KERNEL.fullmatch(kernel) is not None
    flash = kernel.startswith("flash_attention") or (of_hub and "flash" in kernel)
    if flash and config.precision == "fp32":
        yield Problem(
            f"model.attn_implementation={kernel}",
            "has no float32 kernel, but precision=fp32 is set",
            "precision=bf16, or model.attn_implementation=sdpa",
        )
    # Transformers takes a flash attention that is not installed from the hub.
    of = packages.ATTENTION.get(kernel)
    instead = of is not None and not packages.installed(of[0][0]) and packages.installed("kernels")
    if (of_hub or instead) and not config.model.trust_remote_code:
        yield Problem(
            f"model.attn_implementation={kernel}",
            "downloads code from the hub and runs it, which needs your consent",
            "read that code, then model.trust_remote_code=true on the command line",
        )
