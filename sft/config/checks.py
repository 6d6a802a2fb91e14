"""Check which settings, and which combinations of settings, cannot be used. Imports no torch.

Checks that need the model's architecture (does ``target_modules`` match anything?) are in
``sft.model.adapter`` and run on a model without weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

from sft.config import lora_checks, names, upstream, zero_checks
from sft.config.compare import CONTENTS, flatten
from sft.config.rules import rule_problems, written
from sft.config.settings import (
    CHECKS,
    Config,
    DatasetConfig,
    TemplateConfig,
    TrainConfig,
    columns_of,
    packing_of,
)
from sft.errors import Problem
from sft.process import world_size

TRAIN_ON = {
    "completion": ("completion", "all"),
    "chat": ("assistant", "last_assistant", "all"),
    "text": ("all",),
}
MIX_KEYS = {"path", "subset", "split", "columns", "weight"}
MIN_RATES = {"min_lr", "min_lr_rate"}


def check(config: Config) -> list[Problem]:
    """Find every problem of a config whose keys and types have been checked."""
    problems = list(rule_problems(config))
    for find in (
        _names,
        _resume,
        _data,
        _batch,
        _schedule,
        _optimizer,
        _precision,
        lora_checks.lora,
        lora_checks.quantization,
        names.extra_problems,
    ):
        problems += find(config)
    problems += zero_checks.problems(config.zero, config.train.optim, not config.lora.enabled)
    return problems


def _names(config: Config) -> Iterator[Problem]:
    if config.output_dir == "":
        yield Problem("output_dir=", "must not be empty", "output_dir=DIR, or leave it out")
    if not config.model.name_or_path:
        yield Problem(
            "model.name_or_path=null", "a base model is needed", "model.name_or_path=HUB_ID_OR_DIR"
        )
    if config.run_name is not None and Path(config.run_name).name != config.run_name:
        yield Problem(
            f"run_name={config.run_name}", "must be a name without a folder", "output_dir=DIR"
        )


def _resume(config: Config) -> Iterator[Problem]:
    settings = flatten(dataclasses.asdict(config))
    for name in config.resume.allow:
        if name not in CONTENTS and not any(
            key == name or key.startswith(f"{name}.") for key in settings
        ):
            known = [*settings, *CONTENTS]
            yield Problem(
                f"resume.allow=[{name}]",
                f"{name} is neither a setting, nor base, nor data",
                upstream.did_you_mean(name, known),
            )


def _data(config: Config) -> Iterator[Problem]:
    data, template = config.dataset, config.template
    sources = {
        "dataset.eval_path": data.eval_path,
        "dataset.eval_split": data.eval_split,
        "dataset.eval_fraction": data.eval_fraction,
    }
    given = [f"{key}={value}" for key, value in sources.items() if value]
    prepared = _prepared_parts(data)
    if given and prepared:
        yield Problem(
            given[0],
            "has no effect on prepared data, whose held-out samples were chosen when it was made",
            "leave it out, or prepare the data again with it",
        )
    if len(given) > 1:
        yield Problem(
            ", ".join(given), "only one setting may choose the held-out rows", f"keep {given[0]}"
        )
    if data.exact_match and not given and "eval" not in prepared:
        yield Problem(
            f"dataset.exact_match={data.exact_match}",
            "needs held-out rows whose prompts the model answers",
            "dataset.eval_fraction=0.05",
        )
    if data.streaming and config.train.max_steps < 1:
        yield Problem(
            "dataset.streaming=true",
            "reads only the rows that train.max_steps needs, and train.max_steps is not set",
            "train.max_steps=1000",
        )
    yield from _sources(data)
    yield from _samples(data, template)
    if template.kind == "text" and data.exact_match:
        yield Problem(
            f"dataset.exact_match={data.exact_match}",
            "plain text has no prompt that the model could answer",
            "dataset.exact_match=0",
        )
    if template.kind != "chat":
        for key, what in (("system", "system message"), ("chat_template", "Jinja template")):
            if getattr(template, key) is not None:
                yield Problem(
                    f"template.{key}={getattr(template, key)!r}",
                    f"only a template of kind chat has a {what}",
                    "template=chat",
                )
    legal = TRAIN_ON.get(template.kind, ())
    if template.train_on is not None and template.train_on not in legal:
        yield Problem(
            f"template.train_on={template.train_on}",
            f"a template of kind {template.kind} trains on {' or '.join(legal)}",
            f"template.train_on={legal[0] if legal else 'null'}",
        )
    if template.kind == "completion" and not template.prompts:
        yield Problem(
            "template.prompts=[]",
            "a template of kind completion needs a prompt",
            "template=completion",
        )
    for text in [*template.prompts, *template.completions]:
        try:
            columns = columns_of(text)
        except ValueError as error:
            columns = (f"({error})",)
        wrong = [name for name in columns if not re.fullmatch(r"[\w .-]+", name)]
        if wrong:
            yield Problem(
                f"template {template.name}: {text!r}",
                f"the text between braces is not a column name: {wrong[0]}",
                "write {{ and }} for braces that are part of the text",
            )
    if not template.completions:
        yield Problem(
            "template.completions=[]",
            "a template needs completions, the texts that are trained",
            "template=completion",
        )


def _prepared_parts(data: DatasetConfig) -> set[str]:
    """Return the parts, train and eval, of a folder of prepared data; none if it is no such."""
    from sft.data.artefact import meta_of

    meta = meta_of(data.path)
    return set(meta["parts"]) if meta else set()


def _sources(data: DatasetConfig) -> Iterator[Problem]:
    """Check where rows come from."""
    if not data.path and not data.mix:
        yield Problem("dataset.path=null", "a dataset is needed", "dataset.path=FILE_OR_HUB_ID")
    if data.path and data.mix:
        yield Problem(
            "dataset.path, dataset.mix", "only one of the two may be set", "dataset.path=null"
        )
    if data.mix and data.eval_split:
        yield Problem(
            f"dataset.eval_split={data.eval_split}",
            "dataset.mix has several sources, which share no split to evaluate on",
            "dataset.eval_fraction=0.05, or dataset.eval_path=FILE",
        )
    for name, item in data.mix.items():
        key = f"dataset.mix.{name}"
        if not isinstance(item, dict) or not item.get("path"):
            yield Problem(f"{key}={item}", "needs a path", f"{key}={{path: FILE, weight: 1}}")
            continue
        for unknown in item.keys() - MIX_KEYS:
            yield Problem(
                f"{key}.{unknown}={item[unknown]}",
                f"the keys of a source are {', '.join(sorted(MIX_KEYS))}",
                upstream.did_you_mean(unknown, MIX_KEYS),
            )
        weight = item.get("weight", 1)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            yield Problem(f"{key}.weight={weight}", "must be above 0", f"{key}.weight=1")


def _samples(data: DatasetConfig, template: TemplateConfig) -> Iterator[Problem]:
    """Check how rows become samples."""
    default = DatasetConfig()
    joined = packing_of(data, template.kind).value in ("wrapped", "boundary")
    if joined and template.kind != "text":
        yield Problem(
            f"dataset.packing={data.packing}",
            "would separate prompts from their answers; it is for plain text only",
            "dataset.packing=bfd",
        )
    for key, holds, rule in (
        (
            "order",
            joined,
            "needs dataset.packing=wrapped or boundary; else the trainer shuffles samples",
        ),
        (
            "boundary",
            data.packing == "boundary",
            "has an effect only with dataset.packing=boundary",
        ),
        (
            "boundary_overlap",
            data.packing == "boundary",
            "has an effect only with dataset.packing=boundary",
        ),
        ("sanitize", template.kind == "text", "is for plain text only"),
    ):
        value = getattr(data, key)
        if value != getattr(default, key) and not holds:
            yield Problem(
                f"dataset.{key}={value!r}", rule, written(f"dataset.{key}", getattr(default, key))
            )
    for section in ("stop_above", "warn_above"):
        for check, share in getattr(data, section).items():
            key = f"dataset.{section}.{check}"
            if check not in CHECKS:
                hint = upstream.did_you_mean(check, CHECKS)
                yield Problem(f"{key}={share}", f"the checks are {', '.join(CHECKS)}", hint)
            elif not 0 <= share <= 1:
                yield Problem(f"{key}={share}", "must be a fraction from 0 to 1", f"{key}=1")


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
    held_out = data.eval_path or data.eval_split or data.eval_fraction
    held_out = held_out or "eval" in _prepared_parts(data)
    if train.eval_strategy == "steps" and train.eval_steps is None:
        yield Problem("train.eval_strategy=steps", "needs train.eval_steps", "train.eval_steps=100")
    if train.eval_steps is not None and train.eval_strategy != "steps":
        yield Problem(
            f"train.eval_steps={train.eval_steps}",
            f"has no effect with eval_strategy={train.eval_strategy}",
            "train.eval_strategy=steps",
        )
    if train.eval_strategy == "steps" and not held_out:
        yield Problem(
            "train.eval_strategy=steps", "there are no held-out rows", "dataset.eval_fraction=0.05"
        )
    if train.max_steps == 0:
        yield Problem("train.max_steps=0", "no step would be trained", "train.max_steps=-1")
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


def _optimizer(config: Config) -> Iterator[Problem]:
    train, default = config.train, TrainConfig()
    # Skip the check for defaults: reading the legal names from the library's source takes 0.1 s.
    if train.optim != default.optim and train.optim not in upstream.optimizer_names():
        yield Problem(
            f"train.optim={train.optim}",
            "the installed version of Transformers has no such optimizer",
            upstream.did_you_mean(train.optim, upstream.optimizer_names()),
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
    if kernel.startswith("flash_attention") and config.precision == "fp32":
        yield Problem(
            f"model.attn_implementation={kernel}",
            "has no float32 kernel, but precision=fp32 is set",
            "precision=bf16, or model.attn_implementation=sdpa",
        )
