"""Convert the entries of Axolotl's ``datasets``."""

from __future__ import annotations

import re
from typing import Any

from sft.config.foreign import CONVERTED, DIFFERS, UNKNOWN, Outcome, done, listed, no, off, same
from sft.config.foreign_axolotl import TEMPLATES
from sft.config.foreign_common import PREFERENCE
from sft.convert.conversion import Conversion
from sft.data.messages import ROLES

PROMPT = "its prompt is Axolotl's own: write it as template.prompts and template.completions"
FLAGS = ("train", "loss", "weight")  # keys of messages that sft reads
# The keys of an entry of ``datasets``, as far as they need no more than a table.
ENTRY = {
    **dict.fromkeys(("ds_type", "input_format"), done("the format is told by ending and columns")),
    "revision": no("the newest version of a dataset is read"),
    "trust_remote_code": no("sft runs no code of a dataset"),
    **dict.fromkeys(("shards", "shards_idx", "preprocess_shards"), no("dataset.max_rows=N")),
    "field_thinking": no("reasoning is read from reasoning_content, reasoning or thinking"),
    "template_thinking_key": no("reasoning is given to the template as reasoning_content"),
    "message_field_training_detail": no("a message is trained as a whole"),
    "drop_system_message": no("sft trains conversations with their system messages"),
    "split_thinking": no("reasoning is that of the chat template"),
    "input_transform": no("sft runs no code of a dataset"),
    "skip": no("dataset.max_rows=N reads rows from the start"),
    **dict.fromkeys(("temperature", "logprobs_field"), no(PREFERENCE)),
}
COLUMNS = {
    "field": "text",
    "text_column": "text",
    "field_messages": "messages",
    "field_tools": "tools",
    "field_system": "system",
}


def put_sources(conversion: Conversion, sources: list[dict[str, Any]]) -> None:
    """Set dataset.path and so on, or dataset.mix for several sources."""
    settings = conversion.settings
    if len(sources) == 1:
        names = {"path": "path", "subset": "subset", "split": "split", "max_rows": "max_rows"}
        for key, setting in names.items():
            if sources[0].get(key) is not None:
                settings[f"dataset.{setting}"] = sources[0][key]
        for field, column in sources[0].get("columns", {}).items():
            settings[f"dataset.columns.{field}"] = column
    elif sources:
        settings["dataset.mix"] = {}
        for source in sources:
            last = source.pop("name", "") or str(source.get("path", ""))
            last = str(last).rstrip("/").rpartition("/")[2]
            stem = re.sub(r"(\.(jsonl?|csv|tsv|parquet|arrow|txt|gz))+$", "", last)
            label = stem = re.sub(r"[^\w-]+", "-", stem).strip("-").lower() or "rows"
            count = 1
            while label in settings["dataset.mix"]:
                count += 1
                label = f"{stem}-{count}"
            settings["dataset.mix"][label] = {k: v for k, v in source.items() if v} | {"weight": 1}


def entry_of(conversion: Conversion, place: str, entry: dict[str, Any]) -> dict[str, Any]:
    """Convert one entry of ``datasets``.

    Returns:
        Its path, subset, split and columns, and the kind of its rows.
    """
    source: dict[str, Any] = {"kind": "chat", "columns": {}}
    for key, value in entry.items():
        outcome = _of_entry(conversion, source, entry, key, value)
        if key == "type" and isinstance(value, dict):
            for inner, text in value.items():
                conversion.add(f"{place}.type.{inner}", text, outcome)
        elif key == "message_property_mappings" and isinstance(value, dict):
            for inner, column in value.items():
                conversion.add(f"{place}.{key}.{inner}", column, _property(source, inner, column))
        else:
            conversion.add(f"{place}.{key}", value, outcome)
    return source


def _of_entry(
    conversion: Conversion, source: dict[str, Any], entry: dict[str, Any], key: str, value: Any
) -> Outcome:
    """Convert one key of an entry."""
    if key == "roles_to_train" and not value:
        if "train_on_eos" in entry and not entry["train_on_eos"]:
            return Outcome(CONVERTED, {"template.train_on": "last_assistant"})
        return off("without roles, only messages with a flag are trained: train: true in the rows")
    if value is None or value in ("", [], {}):
        return same("is empty, and sets nothing")
    if key == "path":
        return _path(source, entry)
    if key == "data_files":
        return same("is part of the path") if isinstance(value, str) else _path(source, entry)
    if key in ("name", "split"):
        field = {"name": "subset"}.get(key, key)
        source[field] = value
        return Outcome(CONVERTED, {}, f"dataset.{field}={value}")
    if key == "type":
        return _type(conversion, source, value)
    if key in COLUMNS:
        return _column(source, COLUMNS[key], value)
    if key in ("message_field_role", "message_field_content"):
        return _property(source, key.rpartition("_")[2], value)
    if key == "roles":
        return _roles(value)
    if key == "roles_to_train":
        return _roles_to_train(listed(value), entry.get("roles"))
    if key in ("train_on_eos", "train_on_eot"):
        return (
            same("trained") if value == "turn" else off("the end of each trained turn is trained")
        )
    if key == "message_field_training":
        return same("sft reads it") if value in FLAGS else off(f"rename it: {' or '.join(FLAGS)}")
    if key in ("chat_template", "conversation"):
        words = TEMPLATES.get(str(value))
        if words:
            name, _, option = words.partition("=")
            return Outcome(CONVERTED, {name: option})
        return same("the tokenizer's own chat template")
    if key == "chat_template_jinja":
        return Outcome(CONVERTED, {"template.chat_template": value})
    return ENTRY[key].of(value) if key in ENTRY else Outcome(UNKNOWN, note="unknown to sft import")


def _path(source: dict[str, Any], entry: dict[str, Any]) -> Outcome:
    path, files = entry.get("path"), entry.get("data_files")
    if isinstance(files, list):
        if len(files) != 1:
            return off("dataset.path takes one file, folder or pattern such as 'data/*.jsonl'")
        files = files[0]
    if files:
        is_builder = path in ("json", "csv", "parquet", "text", "arrow", None)
        path = files if is_builder else f"{path}/{files}"
    source["path"] = path
    return Outcome(CONVERTED, {}, f"dataset.path={path}")


def _column(source: dict[str, Any], field: str, column: str) -> Outcome:
    if column == field or (field, column) == ("messages", "conversations"):
        return same("is found by its name")
    source["columns"][field] = column
    return Outcome(CONVERTED, {}, f"dataset.columns.{field}={column}")


def _property(source: dict[str, Any], field: str, column: str) -> Outcome:
    known = {"role": ("role", "from"), "content": ("content", "value")}
    if field not in known:
        same_name = "is read by that name" if field == column else f"rename the key to {field}"
        return same(same_name) if field == column else off(same_name)
    if column in known[field]:
        return same("sft reads both forms of messages")
    return _column(source, field, column)


def _roles(value: Any) -> Outcome:
    if not isinstance(value, dict):
        return off("must be a mapping such as {assistant: [gpt]}")
    roles = {}
    for role, names in value.items():
        new = [name for name in listed(names) if ROLES.get(name) != role]
        if new:
            roles[role] = new
    return Outcome(CONVERTED, {"dataset.roles": roles}) if roles else same("sft knows these roles")


def _roles_to_train(names: list[Any], roles: Any) -> Outcome:
    """Train the assistant's turns, or every token if the user's turns are trained too."""
    own = roles.items() if isinstance(roles, dict) else ()
    given = {name: role for role, each in own for name in listed(each)}
    trained = {given.get(str(name), ROLES.get(str(name), str(name))) for name in names}
    if "user" in trained:
        note = "every token of all roles is trained"
        return Outcome(DIFFERS, {"template.train_on": "all"}, note)
    if others := sorted(trained - {"assistant"}):
        note = f"only the assistant's turns are trained, and not those of {' and '.join(others)}"
        return Outcome(DIFFERS, {}, note)
    return same("the assistant's turns are trained")


def _type(conversion: Conversion, source: dict[str, Any], value: Any) -> Outcome:
    """Choose the template by the type of an entry."""
    if isinstance(value, dict):
        source["kind"] = "completion"
        return Outcome(CONVERTED, custom(value))
    name = str(value).partition(":")[0].partition(".")[0]
    if name in ("chat_template", "sharegpt"):
        if ":" in str(value):
            return Outcome(DIFFERS, {}, "the tokenizer's own chat template is used")
        return Outcome(CONVERTED, {}, "template=chat")
    kinds = {"alpaca": "alpaca", "completion": "text", "pretrain": "text"}
    source["kind"] = kinds.get(str(value), "completion")
    if source["kind"] != "completion":
        return Outcome(CONVERTED, {}, f"template={source['kind']}")
    if name == "input_output":
        return off("segments have no template: make columns prompt and completion of them")
    return off(PROMPT)


def custom(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the texts of a template for a prompt that the file defines.

    A text of Axolotl has {instruction} and {input} for the columns that ``field_*`` names; rows
    without an input have ``no_input_format``.
    """
    names = {part: fields.get(f"field_{part}") or part for part in ("instruction", "input")}
    system = str(fields.get("system_prompt") or "").replace("{", "{{").replace("}", "}}")
    start = str(fields.get("system_format") or "{system}").replace("{system}", system)
    start = start if system else ""

    def text(form: str) -> str:
        return start + re.sub(r"\{(instruction|input)\}", lambda m: f"{{{names[m[1]]}}}", form)

    with_input = str(fields.get("format") or "{instruction} {input} ")
    without = str(fields.get("no_input_format") or "{instruction} ")
    prompts = [text(with_input)] if "{input}" in with_input else []
    return {
        "template.prompts": [*prompts, text(without)],
        "template.completions": [f"{{{fields.get('field_output') or 'output'}}}"],
    }
