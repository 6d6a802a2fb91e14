"""Refuse a setting that another setting switches off; ``NEEDS`` says what each of them needs.

Settings of the data are checked in ``data_checks``. ``train.num_train_epochs`` may be set together
with ``train.max_steps``, whose help says that it decides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sft.config.rules import declared, default_of, named, written
from sft.config.settings import Config, LoraSection, SampleConfig
from sft.config.watch_settings import TrackerConfig
from sft.errors import Problem


@dataclass(frozen=True)
class Need:
    """What a setting needs to have an effect.

    Attributes:
        setting: The setting's full name; one of an ``extra`` too.
        other: The setting that may switch it off.
        holds: Whether a value of ``other`` lets it have an effect.
        fix: What to set instead; None: leave the setting out.
        rule: What is wrong otherwise.
        same: A value besides the default that asks for what happens anyway.
        instead: A setting that decides the same; where it is set, this one is to be left out.
    """

    setting: str
    other: str
    holds: Callable[[Any], bool]
    fix: str | None = None
    rule: str = "has no effect"
    same: Any = None
    instead: str | None = None


def _is(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


def _is_not(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value not in values


LORA = sorted(named(LoraSection) - {"enabled"})
NEEDS = (
    *(
        Need(
            f"train.{name}_steps",
            f"train.{name}_strategy",
            _is("steps"),
            f"train.{name}_strategy=steps",
            instead=f"train.{name}s_per_epoch",
        )
        for name in ("eval", "save")
    ),
    *(
        Need(
            f"train.{name}s_per_epoch",
            f"train.{name}_strategy",
            _is("epoch"),
            f"train.{name}_strategy=epoch",
        )
        for name in ("eval", "save")
    ),
    Need("train.save_total_limit", "train.save_strategy", _is("steps", "epoch")),
    Need(
        "train.warmup_steps",
        "train.lr_scheduler_type",
        _is_not("constant"),
        "train.lr_scheduler_type=constant_with_warmup",
        same=0,
    ),
    *(
        Need(f"train.{name}", "train.eval_strategy", _is("steps", "epoch"))
        for name in ("load_best_model_at_end", "early_stopping_patience")
    ),
    Need("train.early_stopping_threshold", "train.early_stopping_patience", _is_not(None)),
    Need("train.loraplus_lr_ratio", "lora.enabled", _is(True), "lora=all-linear"),
    Need("train.extra.eval_delay", "train.eval_strategy", _is("steps", "epoch")),
    *(
        Need(f"train.extra.dataloader_{name}", "train.dataloader_num_workers", lambda n: n > 0)
        for name in ("persistent_workers", "prefetch_factor")
    ),
    *(
        Need(
            f"train.extra.{name}_checkpointing_kwargs",
            "train.gradient_checkpointing",
            _is_not(False),
        )
        for name in ("gradient", "activation")
    ),
    *(
        Need(f"train.extra.ddp_{name}", "zero.config", _is(None), "zero=none")
        for name in ("broadcast_buffers", "bucket_cap_mb", "static_graph", "find_unused_parameters")
    ),
    Need("tracker.uri", "tracker.mlflow", _is(True), "tracker=mlflow"),
    # The noise is scaled by the length of a row, which joined rows change (transformers#34659).
    Need(
        "train.extra.neftune_noise_alpha",
        "train.padding_free",
        _is(False),
        "train.padding_free=false",
        "scales its noise by the length of joined rows",
    ),
    Need(
        "train.extra.neftune_noise_alpha",
        "dataset.packing",
        _is_not("bfd", "bfd_split"),
        "dataset.packing=none",
        "scales its noise by the length of joined rows",
    ),
    *(Need(f"lora.{name}", "lora.enabled", _is(True), "lora=all-linear") for name in LORA),
    *(
        Need(f"quantization.{name}", "quantization.load_in_4bit", _is(True), "quantization=nf4")
        for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    ),
    *(
        Need(f"profile.{name}", "profile.torch", _is(True), "profile=torch")
        for name in ("start", "steps")
    ),
    Need("profile.interval", "profile.system", _is(True), "profile=system"),
    *(
        Need(f"sample.{name}", "sample.every", _is_not(None), "sample.every=100")
        for name in sorted(named(SampleConfig) - {"every"})
    ),
    *(
        Need(f"sample.{name}", "sample.temperature", _is_not(None), "sample.temperature=1")
        for name in ("top_k", "top_p", "seed")
    ),
)


def problems(config: Config) -> Iterator[Problem]:
    """Find the settings that are set and have no effect."""
    settings = dict(declared(Config))
    for need in NEEDS:
        value, other = value_of(config, need.setting), value_of(config, need.other)
        item = settings.get(need.setting)
        if value in (None if item is None else default_of(item), need.same) or need.holds(other):
            continue
        default = "leave it out" if item is None else written(need.setting, default_of(item))
        decided = need.instead is not None and value_of(config, need.instead) is not None
        yield Problem(
            written(need.setting, value),
            f"{need.rule} with {written(need.other, other)}",
            default if decided else need.fix or default,
        )
    yield from _tracker(config)


def _tracker(config: Config) -> Iterator[Problem]:
    """Find names for trackers that are not chosen."""
    tracker = config.tracker
    if tracker.wandb or tracker.mlflow or tracker.trackio:
        return
    for name in ("project", "group"):
        value = getattr(tracker, name)
        if value != getattr(TrackerConfig(), name):
            rule = "has no effect without one of the trackers wandb, mlflow and trackio"
            yield Problem(written(f"tracker.{name}", value), rule, "tracker=wandb")


def value_of(config: Config, name: str) -> Any:
    """Return a setting's value by its full name; None for an entry that an ``extra`` lacks."""
    node: Any = config
    for part in name.split("."):
        node = node.get(part) if isinstance(node, dict) else getattr(node, part)
    return node
