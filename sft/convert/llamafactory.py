"""Convert a configuration of LLaMA-Factory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.config.foreign import CONVERTED, DIFFERS, Outcome, off, same
from sft.config.foreign_common import PREFERENCE
from sft.convert.conversion import (
    Conversion,
    Special,
    batch,
    embedding_rate,
    texts,
    tokens,
)
from sft.convert.held_out import held_out
from sft.convert.llamafactory_rows import INFO, Rows
from sft.errors import ConfigError, Problem


def defaults(keys: dict[str, Any]) -> dict[str, Any]:
    """Return what LLaMA-Factory does where the file says nothing, if it changes the training."""
    values: dict[str, Any] = {
        "learning_rate": 5e-5,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "cutoff_len": 2048,
        "save_strategy": "steps",
        "eval_strategy": "no",
        "val_size": 0.0,
    }
    if keys.get("warmup_ratio") is None:
        values["warmup_steps"] = 0
    if "evaluation_strategy" in keys:
        del values["eval_strategy"]
    if keys.get("finetuning_type") in (None, "lora"):
        rank = keys.get("lora_rank") or 8
        values |= {"lora_rank": 8, "lora_target": "all"}
        values["lora_alpha"] = 2 * rank if isinstance(rank, int) else 16
    return values


def stage(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Refuse stages that are no supervised fine-tuning."""
    if value not in (None, "sft", "pt"):
        raise ConfigError([Problem(f"stage={value}", PREFERENCE, "stage: sft")])
    if value == "pt":
        outcome = Outcome(CONVERTED, {}, "template=text")
    else:
        outcome = same("sft trains by supervised fine-tuning")
    conversion.add(name, value, outcome, given)


def method(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Refuse methods of training that would become another one."""
    if value not in (None, "lora", "full"):
        rule = "sft trains LoRA adapters, every weight, or the weights that are named"
        parts = "finetuning_type: full, then model.trainable=[REGEX] beside the result"
        fix = parts if value == "freeze" else "finetuning_type: lora"
        raise ConfigError([Problem(f"finetuning_type={value}", rule, fix)])
    conversion.plain(name, value, given)


def template(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Choose the template: LLaMA-Factory's texts that are not of a chat have other words."""
    if value in ("alpaca", "default", "vicuna", "empty", "fewshot"):
        conversion.kind = "alpaca" if value == "alpaca" else "chat"
        ours = "alpaca" if value == "alpaca" else "plain-chat"
        note = f"template={ours} is the nearest; its words are not quite LLaMA-Factory's"
        settings = {} if value == "alpaca" else {"template": ours}
        conversion.add(name, value, Outcome(DIFFERS, settings, note), given)
    else:
        conversion.plain(name, value, given)


def packing(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Convert packing, which leaves out rows that are too long, and may mix documents."""
    if value is True:
        conversion.wanted["dataset.overlong"] = "drop"
        note = "" if conversion.get("neat_packing") else "documents never attend to each other"
        outcome = Outcome(DIFFERS if note else CONVERTED, {"dataset.packing": "bfd"}, note)
        conversion.add(name, value, outcome, given)
    else:
        conversion.plain(name, value, given)


def overwrite(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Leave out the consent to delete a run, which a file must not give at every start."""
    note = "give overwrite=true on the command line when you mean it: it deletes the run"
    conversion.add(name, value, off(note) if value else same(), given)


def dataset_dir(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Leave out the folder of dataset_info.json, which has been read."""
    conversion.add(name, value, same(f"{INFO} has been read"), given)


def finish(conversion: Conversion) -> None:
    """Settle what several keys decide together."""
    if conversion.kind != "chat":
        for name in ("prompts", "completions"):
            conversion.wanted.pop(f"template.{name}", None)
    if conversion.kind == "text" and conversion.get("packing") is None:
        conversion.wanted["dataset.packing"] = "wrapped"  # stage pt joins texts and cuts them
        conversion.wanted.pop("dataset.overlong", None)
    texts(conversion, "template")
    held_out(conversion)


def special(folder: Path) -> dict[str, Special]:
    """Return the functions for keys that need more than the table.

    Args:
        folder: The folder of the configuration.
    """
    rows = Rows(folder)
    return {
        **batch("per_device_train_batch_size", "gradient_accumulation_steps"),
        "stage": stage,
        "finetuning_type": method,
        **tokens("add_tokens", "add_special_tokens", "new_special_tokens"),
        "template": template,
        "loraplus_lr_embedding": embedding_rate,
        "dataset": rows.train,
        "eval_dataset": rows.held_out,
        "dataset_dir": dataset_dir,
        "packing": packing,
        "overwrite_output_dir": overwrite,
    }
