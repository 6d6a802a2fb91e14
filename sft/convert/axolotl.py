"""Convert a configuration of Axolotl."""

from __future__ import annotations

import re
from typing import Any

from sft.config.foreign import CONVERTED, DIFFERS, Outcome, listed, off, same
from sft.convert.axolotl_rows import entry_of, put_sources
from sft.convert.conversion import (
    Conversion,
    Special,
    batch,
    embedding_rate,
    texts,
    tokens,
)
from sft.convert.held_out import held_out, more_sets
from sft.errors import ConfigError, Problem

BEST = "Axolotl ends with the weights of the best evaluation, where saves fall on evaluations"


def defaults(keys: dict[str, Any]) -> dict[str, Any]:
    """Return what Axolotl does where the file says nothing, if it changes what is trained."""
    values: dict[str, Any] = {
        "adapter": None,
        "num_epochs": 1,
        "micro_batch_size": 1,
        "sequence_len": 512,
        "val_set_size": 0.0,
    }
    if not keys.get("batch_size"):
        values["gradient_accumulation_steps"] = 1
    if not (keys.get("eval_steps") or keys.get("evals_per_epoch")):
        values["eval_strategy"] = "no"
    return values


def adapter(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Train every weight if there is no adapter; refuse adapters that are not LoRA's."""
    if not value:
        conversion.add(name, value, Outcome(CONVERTED, {"lora": "none"}), given)
    elif value not in ("lora", "qlora", "full"):
        rule = "sft trains LoRA adapters, or every weight"
        raise ConfigError([Problem(f"adapter={value}", rule, "adapter: lora")])
    else:
        conversion.plain(name, value, given)


def same_model(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Leave out the place of the config or tokenizer if it is the model's."""
    if value == conversion.get("base_model"):
        conversion.add(name, value, same("is model.name_or_path"), given)
    else:
        conversion.plain(name, value, given)


def batch_size(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Convert the batch of one GPU, from which Axolotl derives the accumulation."""
    if value and isinstance(value, int):
        note = f"{value} x {conversion.gpus} GPUs; sft's global batch is that of all GPUs"
        settings = {"train.global_batch_size": value * conversion.gpus}
        conversion.add(name, value, Outcome(DIFFERS, settings, note), given)
    else:
        conversion.plain(name, value, given)


def datasets(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Convert the list of data sets: one becomes dataset.path, several become dataset.mix."""
    entries = value if isinstance(value, list) else [value]
    sources = []
    for number, entry in enumerate(entries):
        if isinstance(entry, str):
            entry = {"path": entry}
        if not isinstance(entry, dict):
            conversion.add(f"{name}[{number}]", entry, off("is no mapping with a path"))
            entry = {}
        sources.append(entry_of(conversion, f"{name}[{number}]", entry))
    kinds = [source.pop("kind") for source in sources]
    conversion.kind = "chat" if "chat" in kinds else next(iter(kinds), "chat")
    note = f"one run has one template, and these rows get template={conversion.kind} too"
    for line in conversion.lines:
        place = re.match(rf"{name}\[(\d+)\]\.type", line.key)
        if place and kinds[int(place[1])] != conversion.kind:
            for setting in [*line.outcome.settings]:
                conversion.settings.pop(setting, None)
            line.outcome = Outcome(DIFFERS, {}, note)
    put_sources(conversion, sources)


def test_datasets(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Convert the held-out rows: another split of the same dataset, or a file."""
    first = value[0] if isinstance(value, list) and value else value
    if not isinstance(first, dict):
        conversion.plain(name, value, given)
        return
    trained = conversion.get("datasets")
    is_same = isinstance(trained, list) and trained[0].get("path") == first.get("path")
    is_file = re.search(r"\.\w+$", str(first.get("path"))) is not None
    for key, item in first.items():
        outcome = same("as the rows that are trained")
        if key == "split" and is_same and not is_file:
            outcome = Outcome(CONVERTED, {"dataset.eval_split": item})
        elif key == "path" and (is_file or not is_same):
            outcome = Outcome(CONVERTED, {"dataset.eval_path": item})
        conversion.add(f"{name}[0].{key}", item, outcome)
    if isinstance(value, list) and len(value) > 1:
        rest = [item.get("path") if isinstance(item, dict) else item for item in value[1:]]
        more_sets(conversion, f"{name}[1:]", rest)


def finish(conversion: Conversion) -> None:
    """Settle what several keys decide together."""
    texts(conversion, "chat_template")
    packing = {**conversion.wanted, **conversion.settings}.get("dataset.packing")
    if conversion.kind == "text" and packing == "none":
        conversion.wanted["dataset.overlong"] = "split"  # Axolotl cuts a text into rows
    if conversion.settings.get("dataset.streaming"):
        shares(conversion)
    held_out(conversion)
    if _saves_evaluations(conversion) and conversion.get("load_best_model_at_end") is None:
        best = Outcome(CONVERTED, {"train.load_best_model_at_end": True}, BEST)
        conversion.add("load_best_model_at_end", True, best, False)


def _saves_evaluations(conversion: Conversion) -> bool:
    """Return whether each save of Axolotl falls on an evaluation."""
    settings = conversion.settings
    saves, evaluates = (settings.get(f"train.{name}_steps") for name in ("save", "eval"))
    if saves and evaluates:
        return bool(round(saves / evaluates, 6) % 1 == 0)
    saves, evaluates = (settings.get(f"train.{name}s_per_epoch") for name in ("save", "eval"))
    return bool(saves and evaluates and evaluates % saves == 0)


def shares(conversion: Conversion) -> None:
    """Save and evaluate at shares of all steps, as Axolotl does; streamed epochs have no length."""
    for key, name in (("saves_per_epoch", "save"), ("evals_per_epoch", "eval")):
        times = conversion.settings.get(f"train.{key}")
        if isinstance(times, int) and times:
            share = 1 / (times * conversion.get("num_epochs", 1))
            steps = {f"train.{name}_strategy": "steps", f"train.{name}_steps": share}
            if share >= 1:
                steps = {f"train.{name}_strategy": "no"}
            conversion.mark(key, Outcome(DIFFERS, steps, "a share of all steps of the stream"))


def cadence(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Convert a number per epoch; of streamed rows, whose epochs are not counted, to a share."""
    epochs = conversion.get("num_epochs")
    per_run = value * epochs if _is_number(value) and _is_number(epochs) else 0
    if not conversion.get("streaming") or per_run <= 1:
        conversion.plain(name, value, given)
        return
    what = name.partition("s_")[0]
    settings = {f"train.{what}_strategy": "steps", f"train.{what}_steps": round(1 / per_run, 6)}
    note = "a share of all steps, as Axolotl computes it"
    conversion.add(name, value, Outcome(CONVERTED, settings, note), given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def fsdp(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Choose the ZeRO stage by ``fsdp``, and by its configuration, which says what to offload."""
    options = conversion.get("fsdp_config")
    if name == "fsdp" and value and "offload_params': True" in str(options):
        value = [*listed(value), "offload"]
    if name == "fsdp_config" and conversion.get("fsdp"):
        conversion.add(name, value, same("is part of what fsdp becomes"), given)
    else:
        conversion.plain(name, value, given)


SPECIAL: dict[str, Special] = {
    "saves_per_epoch": cadence,
    "evals_per_epoch": cadence,
    "fsdp": fsdp,
    "fsdp_config": fsdp,
    **tokens("tokens", "special_tokens"),
    **batch("micro_batch_size", "gradient_accumulation_steps"),
    "batch_size": batch_size,
    "loraplus_lr_embedding": embedding_rate,
    "adapter": adapter,
    "base_model_config": same_model,
    "tokenizer_config": same_model,
    "datasets": datasets,
    "pretraining_dataset": datasets,
    "test_datasets": test_datasets,
}
