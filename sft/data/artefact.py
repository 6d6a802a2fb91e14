"""Write prepared data to a folder that any run can train on, and read it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.config.settings import DatasetConfig, TemplateConfig
from sft.errors import DataError
from sft.files import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.data.prepared import Prepared

META = "meta.json"


def meta_of(path: str | None) -> dict[str, Any] | None:
    """Read an artefact's ``meta.json``; None if the path is not an artefact."""
    folder = Path(path or "").expanduser()
    if not path or not (folder / META).is_file() or not (folder / "dataset_dict.json").is_file():
        return None
    meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    return meta if "parts" in meta and "tokenizer" in meta else None


def template_of(path: str | None) -> TemplateConfig | None:
    """Return the template that rendered an artefact; None if the path is not an artefact."""
    meta = meta_of(path)
    return None if meta is None else TemplateConfig(**meta["template"])


def save(prepared: Prepared, folder: Path) -> None:
    """Write ``train``, ``eval``, ``meta.json`` and ``dropped.jsonl``, all of them or none.

    Raises:
        DataError: The folder exists.
    """
    from datasets import DatasetDict

    if folder.exists():
        raise DataError(f"output={folder}: the folder exists\n    fix: output=FOLDER")
    sets = {"train": prepared.train.dataset}
    if prepared.eval is not None:
        sets["eval"] = prepared.eval.dataset
    with new_folder(folder) as partial:
        DatasetDict(sets).save_to_disk(str(partial))
        shutil.copyfile(prepared.folder / "dropped.jsonl", partial / "dropped.jsonl")
        shutil.copyfile(prepared.folder / "data.json", partial / META)


def load(config: DatasetConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared | None:
    """Load the artefact at ``dataset.path``; None if that is not an artefact.

    Raises:
        DataError: Its tokenizer is not the model's, or ``dataset.streaming`` is set.
    """
    from datasets import load_from_disk

    from sft.data.audit import Counts
    from sft.data.prepared import Prepared, Samples, tokenizer_hash

    meta = meta_of(config.path)
    if meta is None:
        return None
    folder = Path(str(config.path)).expanduser()
    if config.streaming:
        raise DataError(
            f"dataset.path={folder} is prepared and cannot be streamed\n"
            "    fix: dataset.streaming=false"
        )
    if meta["tokenizer"] != tokenizer_hash(tokenizer):
        raise DataError(
            f"dataset.path={folder} was tokenised with a tokenizer that is not the model's\n"
            "    fix: the model it was prepared for, or prepare it for this one: "
            "python -m sft.data model=... output=FOLDER"
        )
    sets = load_from_disk(str(folder))
    parts = {name: Samples(sets[name], Counts(**meta["parts"][name])) for name in sets}
    return Prepared(parts["train"], parts.get("eval"), folder)
