"""Prepared data as a folder of its own: written once, trained from anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.config.settings import DatasetConfig, TemplateConfig
from sft.errors import DataError
from sft.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.data.prepared import Prepared

META = "meta.json"


def meta_of(path: str | None) -> dict[str, Any] | None:
    """Read what an artefact says of itself; None where the path is none."""
    folder = Path(path or "").expanduser()
    if not path or not (folder / META).is_file() or not (folder / "dataset_dict.json").is_file():
        return None
    meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    return meta if "parts" in meta and "tokenizer" in meta else None


def template_of(path: str | None) -> TemplateConfig | None:
    """Give the template that an artefact was rendered with."""
    meta = meta_of(path)
    return None if meta is None else TemplateConfig(**meta["template"])


def save(prepared: Prepared, folder: Path) -> None:
    """Write ``train``, ``eval``, ``meta.json`` and ``dropped.jsonl``, complete or not at all.

    Raises:
        DataError: The folder exists.
    """
    from datasets import DatasetDict

    if folder.exists():
        raise DataError(f"{folder} exists\n    fix: output=ANOTHER_FOLDER")
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    sets = {"train": prepared.train.dataset}
    if prepared.eval is not None:
        sets["eval"] = prepared.eval.dataset
    DatasetDict(sets).save_to_disk(str(partial))
    shutil.copyfile(prepared.folder / "dropped.jsonl", partial / "dropped.jsonl")
    meta = (prepared.folder / "data.json").read_text(encoding="utf-8")
    write_text(partial / META, meta)
    partial.rename(folder)


def load(config: DatasetConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared | None:
    """Read an artefact back, where ``dataset.path`` is one.

    Raises:
        DataError: It was made with another tokenizer.
    """
    from datasets import load_from_disk

    from sft.data.audit import Counts
    from sft.data.prepared import Prepared, Samples, tokenizer_hash

    meta = meta_of(config.path)
    if meta is None:
        return None
    folder = Path(str(config.path)).expanduser()
    if config.streaming:
        raise DataError(f"{folder} is prepared already\n    fix: dataset.streaming=false")
    if meta["tokenizer"] != tokenizer_hash(tokenizer):
        raise DataError(
            f"{folder} was made with another tokenizer than the model's\n"
            "    fix: the model it was made for, or python -m sft.data model=... output=ANOTHER"
        )
    sets = load_from_disk(str(folder))
    parts = {name: Samples(sets[name], Counts(**meta["parts"][name])) for name in sets}
    return Prepared(parts["train"], parts.get("eval"), folder)
