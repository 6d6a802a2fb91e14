"""Convert a configuration of TRL's ``trl sft``, or the keywords of SFTConfig in a script."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.config.foreign import CONVERTED, DIFFERS, UNKNOWN, Outcome, no, off, same
from sft.config.foreign_trl import WHOLE
from sft.config.plain import parse_json
from sft.convert.axolotl_rows import put_sources
from sft.convert.conversion import Conversion, Special, batch, texts
from sft.convert.held_out import held_out
from sft.convert.llamafactory import overwrite

LONGEST_ROW = 1 << 20  # characters
CHOSEN = "PEFT chooses query and value of most models; lora=attention adapts the key and output too"
ENTRY = {
    "columns": no("columns are chosen by the format; dataset.columns renames them"),
    "fraction": no("dataset.max_rows=N reads fewer rows"),
    "data_dir": no("dataset.path=FOLDER"),
}
FIELDS = {"path": "path", "name": "subset", "split": "split"}


def defaults(keys: dict[str, Any]) -> dict[str, Any]:
    """Return what TRL does where the file says nothing, if it changes what is trained."""
    values: dict[str, Any] = {
        "learning_rate": 5e-5 if "TrainingArguments" in keys else 2e-5,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_length": 1024,
        "save_strategy": "steps",
        "eval_strategy": "no",
    }
    if "max_seq_length" in keys or "SFTTrainer.max_seq_length" in keys:
        del values["max_length"]
    if "FastLanguageModel.max_seq_length" in keys:
        values.pop("max_length", None)
    if keys.get("warmup_ratio") is None:
        values["warmup_steps"] = 0
    if "evaluation_strategy" in keys:
        del values["eval_strategy"]
    evaluates = keys.get("eval_strategy", keys.get("evaluation_strategy")) in ("steps", "epoch")
    if evaluates and keys.get("dataset_name"):
        values["dataset_test_split"] = "test"
    if any(name.startswith("LoraConfig.") for name in keys):
        values |= {"LoraConfig.r": 8, "LoraConfig.lora_alpha": 8}
        values["LoraConfig.target_modules"] = None
    elif any(name.startswith("get_peft_model.") for name in keys):
        values |= {"get_peft_model.r": 16, "get_peft_model.lora_alpha": 16}
    elif keys.get("use_peft"):
        values |= {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
        values["lora_target_modules"] = None
    elif "model_name_or_path" in keys:
        values["use_peft"] = False
    if keys.get("load_in_4bit") or keys.get("BitsAndBytesConfig.load_in_4bit"):
        script = "BitsAndBytesConfig.load_in_4bit" in keys
        name = "BitsAndBytesConfig.bnb_4bit_use_double_quant" if script else "use_bnb_nested_quant"
        values[name] = False
        if script:
            values["BitsAndBytesConfig.bnb_4bit_quant_type"] = "fp4"
    if keys.get("FastLanguageModel.model_name"):
        values["FastLanguageModel.load_in_4bit"] = True
    return values


def chosen_modules(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Choose the attention's layers where PEFT chooses by the architecture."""
    if value is None:
        settings = {"lora.target_modules": "attention"}
        conversion.add(name, value, Outcome(DIFFERS, settings, CHOSEN), given)
    else:
        conversion.plain(name, value, given)


def datasets(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Convert the list of data sets."""
    sources = []
    for number, entry in enumerate(value if isinstance(value, list) else [value]):
        source: dict[str, Any] = {"columns": {}}
        for key, item in (entry if isinstance(entry, dict) else {"path": entry}).items():
            place = f"{name}[{number}].{key}"
            files = entry.get("data_files") if isinstance(entry, dict) else None
            if key in FIELDS and item is not None:
                ours = files if key == "path" and isinstance(files, str) else item
                source[FIELDS[key]] = ours
                outcome = Outcome(CONVERTED, {}, f"dataset.{FIELDS[key]}={ours}")
            elif key == "data_files":
                is_one = isinstance(item, str)
                outcome = same("is the path") if is_one else off("dataset.path is one pattern")
            else:
                unknown = Outcome(UNKNOWN, note="unknown to sft import")
                outcome = ENTRY[key].of(item) if key in ENTRY else unknown
            conversion.add(place, item, outcome)
        sources.append(source)
    put_sources(conversion, sources)


def held_out_split(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Convert the split that is evaluated, which TRL reads only if it evaluates."""
    strategy = conversion.get("eval_strategy", conversion.get("evaluation_strategy", "no"))
    if strategy in ("no", False):
        conversion.add(name, value, same("nothing is evaluated: eval_strategy=no"), given)
    else:
        conversion.plain(name, value, given)


def text_field(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Train on plain text, from the column that is named; a mask of answers needs a chat."""
    if "train_on_responses_only" in conversion.calls:
        note = "dataset.path=FILE of the conversations of which the script makes this text"
        conversion.add(name, value, Outcome(DIFFERS, {}, note), given)
        return
    conversion.kind = "text"
    note = "every token of the text is trained (template=text)"
    settings = {} if value in (None, "text") else {"dataset.columns.text": value}
    conversion.add(name, value, Outcome(CONVERTED, settings, note), given)


def model_arguments(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Convert the arguments that TRL passes on when it loads the model."""
    for key, item in value.items() if isinstance(value, dict) else ():
        conversion.plain(f"{name}.{key}", item, given)
    if not isinstance(value, dict):
        conversion.plain(name, value, given)


def device_map(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Leave out where weights are put."""
    conversion.add(name, value, same("each rank has its GPU"), given)


def first_row(path: str) -> dict[str, Any]:
    """Return the first row of a file of JSON lines on this machine, or {}."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            row = parse_json(file.readline(LONGEST_ROW))
    except (OSError, ValueError):
        return {}
    return row if isinstance(row, dict) else {}


def trained(conversion: Conversion) -> None:
    """Train what TRL trains, which the columns of the rows decide unless a key does.

    TRL trains every token of messages, and the completion of rows with a prompt and a completion;
    texts of these get no chat template. Of a dataset of the hub, the columns are not known.
    """
    row = first_row(str(conversion.settings.get("dataset.path", "")))
    if isinstance(row.get("prompt"), str) and "completion" in row:
        conversion.kind = "completion"
        conversion.wanted["template.prompts"] = ["{prompt}"]
        conversion.wanted["template.completions"] = ["{completion}"]
    elif isinstance(row.get("text"), str) and "messages" not in row:
        conversion.kind = "text"
    elif "train_on_responses_only" in conversion.calls:
        conversion.drop("template.train_on", "train_on_responses_only trains the assistant's turns")
    elif "completion" not in row and conversion.get("completion_only_loss") is None:
        if conversion.get("assistant_only_loss") is None:
            outcome = Outcome(DIFFERS, {"template.train_on": "all"}, WHOLE)
            conversion.add("assistant_only_loss", False, outcome, False)
        return
    if conversion.get("completion_only_loss") is not False:
        conversion.drop("template.train_on", "the rows have other columns")


def finish(conversion: Conversion) -> None:
    """Settle what several keys decide together."""
    packs = conversion.get("packing", conversion.get("SFTTrainer.packing"))
    if not packs:
        name = next((line.key for line in conversion.lines if "packing_strategy" in line.key), "")
        conversion.drop("dataset.packing", "nothing is packed") if name else None
    if conversion.kind == "chat":
        trained(conversion)
    texts(conversion, "chat_template_path")
    held_out(conversion)


SPECIAL: dict[str, Special] = {
    **batch("per_device_train_batch_size", "gradient_accumulation_steps"),
    "lora_target_modules": chosen_modules,
    "LoraConfig.target_modules": chosen_modules,
    "datasets": datasets,
    "dataset_test_split": held_out_split,
    "dataset_text_field": text_field,
    "model_init_kwargs": model_arguments,
    "device_map": device_map,
    "overwrite_output_dir": overwrite,
}
