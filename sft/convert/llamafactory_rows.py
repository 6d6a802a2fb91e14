"""Convert the data sets of LLaMA-Factory, which its dataset_info.json describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.config.foreign import CONVERTED, DIFFERS, UNKNOWN, Outcome, listed, no, off, same
from sft.config.foreign_common import PREFERENCE, VISION
from sft.config.plain import parse_json
from sft.convert.axolotl_rows import put_sources
from sft.convert.conversion import Conversion
from sft.convert.held_out import more_sets
from sft.data.messages import ROLES
from sft.errors import ConfigError, Problem

INFO = "dataset_info.json"
ANCESTORS = 4  # folders above the configuration in which dataset_dir is looked for
# Fields of our formats by LLaMA-Factory's names of columns, and its own names of these columns.
FIELDS = {"prompt": "instruction", "query": "input", "response": "output"}
FIELDS |= {name: name for name in ("history", "system", "tools", "messages")}
TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
PROPERTIES = {"role_tag": ("role", "from"), "content_tag": ("content", "value")}
NOT_TRAINED = {
    **dict.fromkeys(("ranking", "chosen", "rejected", "kto_tag"), no(PREFERENCE)),
    **dict.fromkeys(("images", "videos", "audios"), no(VISION)),
    "script_url": no("sft runs no code of a dataset"),
    "cloud_file_name": no("dataset.path=s3://BUCKET/FILE"),
}
HUBS = ("hf_hub_url", "ms_hub_url", "om_hub_url")


def _info(dataset_dir: str, folder: Path) -> Path | None:
    """Find dataset_info.json: from here, from the configuration's folder, or from those above."""
    folders = [Path.cwd(), folder, *list(folder.parents)[:ANCESTORS]]
    tried = [base / dataset_dir / INFO for base in folders] + [folder / INFO]
    return next((path for path in tried if path.is_file()), None)


class Rows:
    """Converts the data sets of a configuration.

    Args:
        folder: The folder of the configuration.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entries(self, conversion: Conversion) -> tuple[dict[str, Any], str]:
        """Read dataset_info.json.

        Returns:
            Its entries, and the folder that its files are in, as the configuration names it.

        Raises:
            ConfigError: It is missing or damaged.
        """
        named = conversion.get("dataset_dir", "data")
        if named == "ONLINE":
            return {}, ""
        path = _info(str(named), self.folder)
        if path is None:
            rule = f"there is no {named}/{INFO}, which says where each dataset is"
            fix = f"dataset_dir: FOLDER in the configuration, or {INFO} beside it"
            raise ConfigError([Problem(f"dataset_dir={named}", rule, fix)])
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ConfigError(
                [Problem(str(path), f"is not valid JSON: {error}", "correct the file")]
            ) from error
        if not isinstance(found, dict):
            rule = f"must be a mapping of names, not {type(found).__name__}"
            raise ConfigError([Problem(str(path), rule, "correct the file")])
        above = path.parent.resolve()
        is_below = above.is_relative_to(Path.cwd())
        return found, str(above.relative_to(Path.cwd()) if is_below else above)

    def train(self, conversion: Conversion, name: str, value: Any, given: bool) -> None:
        """Convert ``dataset``: one becomes dataset.path, several become dataset.mix."""
        entries, where = self.entries(conversion)
        sources = []
        for item in map(str, listed(value)):
            entry = entries.get(item)
            if not where:
                entry = {"hf_hub_url": item}
            if not isinstance(entry, dict):
                rule = f"{INFO} has no dataset {item}; it has {', '.join(sorted(entries)[:20])}"
                raise ConfigError([Problem(f"dataset={item}", rule, "correct the name")])
            sources.append(self.source(conversion, item, entry, where))
        paths = ", ".join(str(source.get("path")) for source in sources)
        setting = "dataset.mix" if len(sources) > 1 else "dataset.path"
        conversion.add(name, value, Outcome(CONVERTED, {}, f"{setting}={paths}"), given)
        if conversion.get("stage") == "pt":
            conversion.kind = "text"
            for source in sources:
                columns = source["columns"]
                source["columns"] = {"text": columns.get("instruction", "text")}
        elif any(source.pop("pairs") for source in sources) and conversion.kind == "chat":
            # LLaMA-Factory joins instruction and input by one line break.
            conversion.wanted["template.prompts"] = ["{instruction}\n{input}", "{instruction}"]
            conversion.wanted["template.completions"] = ["{output}"]
        for source in sources:
            source.pop("pairs", None)
        put_sources(conversion, sources)

    def held_out(self, conversion: Conversion, name: str, value: Any, given: bool) -> None:
        """Convert ``eval_dataset``: the first file, and the others as sets of their own."""
        entries, where = self.entries(conversion)
        names = [str(item) for item in listed(value)]
        found = [entries.get(item) for item in names]
        files = [entry.get("file_name") if isinstance(entry, dict) else None for entry in found]
        if not value:
            conversion.plain(name, value, given)
        elif all(files):
            paths = [str(Path(where) / str(file)) for file in files]
            first = Outcome(CONVERTED, {"dataset.eval_path": paths[0]})
            conversion.add(name, value, first, given)
            if paths[1:]:
                more_sets(conversion, f"{name}[1:]", paths[1:])
        else:
            conversion.add(name, value, off("dataset.eval_path is one file or folder"), given)

    def source(
        self, conversion: Conversion, name: str, entry: dict[str, Any], where: str
    ) -> dict[str, Any]:
        """Convert one entry of dataset_info.json.

        Returns:
            Its path, subset, split and columns, and whether its rows are pairs of columns.
        """
        source: dict[str, Any] = {
            "name": name,
            "columns": {},
            "pairs": entry.get("formatting", "alpaca") == "alpaca",
        }
        if entry.get("ranking"):
            raise ConfigError([Problem(f"dataset={name}", PREFERENCE, "choose rows to imitate")])
        for key, value in entry.items():
            if key in ("columns", "tags") and isinstance(value, dict):
                for inner, column in value.items():
                    place = f"{INFO}:{name}.{key}.{inner}"
                    conversion.add(place, column, _named(source, inner, column))
                continue
            conversion.add(f"{INFO}:{name}.{key}", value, _about(source, key, value, where, entry))
        return source


def _about(
    source: dict[str, Any], key: str, value: Any, where: str, entry: dict[str, Any]
) -> Outcome:
    """Convert a key of an entry that is neither a column nor a tag."""
    if value is None or value is False:
        return same("is empty, and sets nothing")
    if key in HUBS or key == "file_name":
        first = next(name for name in (*HUBS, "file_name") if entry.get(name))
        if key != first:
            return same(f"{first} is used")
        source["path"] = str(value) if key in HUBS else str(Path(where) / str(value))
        return Outcome(CONVERTED, {}, f"dataset.path={source['path']}")
    if key in ("subset", "split", "num_samples"):
        field = {"num_samples": "max_rows"}.get(key, key)
        source[field] = value
        note = f"dataset.{field}={value}"
        if key == "num_samples":
            return Outcome(DIFFERS, {}, f"{note}: the first rows, not random ones")
        return Outcome(CONVERTED, {}, note)
    if key == "formatting":
        return same("the format of a row is told by its columns")
    if key == "folder":
        return off("dataset.path=FOLDER/SUBFOLDER")
    if key in NOT_TRAINED:
        return NOT_TRAINED[key].of(value)
    return Outcome(UNKNOWN, note="unknown to sft import")


def _named(source: dict[str, Any], key: str, value: Any) -> Outcome:
    """Convert the name of a column, of a property of messages, or of a role."""
    if key in NOT_TRAINED:
        return NOT_TRAINED[key].of(value)
    if value is None:
        return same("is empty, and sets nothing")
    if key in PROPERTIES:
        if value in PROPERTIES[key]:
            return same("sft reads both forms of messages")
        field = PROPERTIES[key][0]
    elif key in TAGS:
        if ROLES.get(str(value)) == TAGS[key]:
            return same("sft knows this role")
        return Outcome(CONVERTED, {f"dataset.roles.{TAGS[key]}": [value]})
    elif key in FIELDS:
        field = FIELDS[key]
        if value == field or (field, value) == ("messages", "conversations"):
            return same("is found by its name")
    else:
        return Outcome(UNKNOWN, note="unknown to sft import")
    source["columns"][field] = value
    return Outcome(CONVERTED, {}, f"dataset.columns.{field}={value}")
