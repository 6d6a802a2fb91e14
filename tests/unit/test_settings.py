"""What is known of each setting stands beside it, and is what the rest of the code does."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from sft.config import compare
from sft.config.rules import declared, default_of, named
from sft.config.settings import Config, DatasetConfig, TemplateConfig
from sft.data import prepare

# The settings that may differ when a run is resumed, and those that samples in the cache do not
# depend on: a new setting joins them on purpose only.
MAY_DIFFER = {
    *("overwrite", "output_dir", "run_name", "resume.checkpoint", "resume.allow"),
    *("dataset.num_proc", "dataset.exact_match", "dataset.stop_above", "dataset.warn_above"),
    *("model.attn_implementation", "model.lm_head", "model.frozen_linear"),
    *("zero.config", "zero.overrides"),
    *("train.per_device_train_batch_size", "train.per_device_eval_batch_size"),
    *("train.padding_free", "train.pad_to_multiple_of", "train.gradient_checkpointing"),
    *("train.logging_steps", "train.eval_strategy", "train.eval_steps"),
    *("train.evals_per_epoch", "train.saves_per_epoch"),
    *("train.save_strategy", "train.save_steps", "train.save_total_limit"),
    *("train.dataloader_num_workers", "train.on_nan", "train.max_loss_jump", "train.merge"),
    *("train.metric", "train.greater_is_better", "train.load_best_model_at_end"),
    *("train.max_forgetting", "dataset.eval", "on_alert"),
    *(f"sample.{name}" for name in ("every", "prompts", "num", "max_new_tokens", "temperature")),
    *(f"sample.{name}" for name in ("top_k", "top_p", "repetition_penalty", "seed")),
    *(f"tracker.{name}" for name in ("tensorboard", "wandb", "mlflow", "trackio")),
    *(f"tracker.{name}" for name in ("project", "group", "uri")),
    *(f"profile.{name}" for name in ("torch", "system", "start", "steps", "interval")),
    *("report.every", "alert.loss_jump", "alert.stall", "alert.disk"),
}
NOT_IN_KEY = {"name", "exact_match", "num_proc", "stop_above", "warn_above", "max_bad_fraction"}


def other(value: Any) -> Any:
    """Give a value that is different from a default."""
    if isinstance(value, bool) or value is None:
        return "other" if value is None else not value
    if isinstance(value, dict):
        return {**value, "key": 0.5}
    if isinstance(value, list):
        return [*value, "item"]
    return value + 1 if isinstance(value, int | float) else f"{value}x"


def test_every_setting_has_its_verdict_on_resuming() -> None:
    before = dataclasses.asdict(Config())
    settings = dict(declared(Config))
    assert len(settings) >= 80
    assert named(Config, changes_training=False) == MAY_DIFFER
    for name, item in settings.items():
        now = dataclasses.asdict(Config())
        section, _, leaf = name.rpartition(".")
        (now[section] if section else now)[leaf] = other(default_of(item))
        assert bool(compare.differences(before, now)) is (name not in MAY_DIFFER), name


def test_every_setting_of_the_data_has_its_verdict_on_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prepare, "tokenizer_hash", lambda tokenizer: "")
    template: Any = SimpleNamespace(chat=None, config=TemplateConfig(), tokenizer=None)

    def key(dataset: DatasetConfig) -> str:
        return prepare._key(dataset, [], template, 0, None, "")

    usual = key(DatasetConfig())
    assert named(DatasetConfig, in_data_key=False) == NOT_IN_KEY
    for name, item in declared(DatasetConfig):
        changed = dataclasses.replace(DatasetConfig(), **{name: other(default_of(item))})
        assert (key(changed) != usual) is (name not in NOT_IN_KEY), name
