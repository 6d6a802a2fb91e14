"""Write prepared data to a folder that any run can train on, and read it back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from sft.config.artefact_meta import META, meta_of
from sft.config.settings import DatasetConfig, TemplateConfig
from sft.errors import DataError
from sft.files import damage_of, inventory, new_folder, without_protocol, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.data.prepared import Prepared


def template_of(path: str | None) -> TemplateConfig | None:
    """Return the template that rendered an artefact; None if the path is not an artefact."""
    meta = meta_of(path)
    return None if meta is None else TemplateConfig(**meta["template"])


def save(prepared: Prepared, folder: Path) -> None:
    """Write every part, ``meta.json`` and ``dropped.jsonl``, all of them or none.

    Raises:
        DataError: The folder exists.
    """
    from datasets import DatasetDict

    if folder.exists():
        raise DataError(f"output={folder}: the folder exists\n    fix: output=FOLDER")
    held_out = {name: samples.dataset for name, samples in prepared.held_out.items()}
    sets = {"train": prepared.train.dataset, **held_out}
    meta = json.loads((prepared.folder / "data.json").read_text(encoding="utf-8"))
    meta["parts"] = {name: dataclasses.asdict(counts) for name, counts in prepared.parts.items()}
    with new_folder(folder) as partial:
        DatasetDict(sets).save_to_disk(str(partial))
        shutil.copyfile(prepared.folder / "dropped.jsonl", partial / "dropped.jsonl")
        meta["files"] = inventory(partial)
        write_text(partial / META, json.dumps(meta, indent=2) + "\n")


def load(config: DatasetConfig, tokenizer: PreTrainedTokenizerBase) -> Prepared | None:
    """Load the artefact at ``dataset.path``; None if that is not an artefact.

    Raises:
        DataError: It is damaged, its tokenizer is not the model's, or ``dataset.streaming`` is set.
    """
    from datasets import load_from_disk

    from sft.data.audit import Counts
    from sft.data.prepared import Prepared, Samples, tokenizer_hash

    meta = meta_of(config.path)
    if meta is None:
        return None
    folder = Path(without_protocol(str(config.path))).expanduser()
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
    if reason := damage_of(folder, meta.get("files", {})):  # earlier versions list no files
        raise DataError(
            f"dataset.path={folder} cannot be used: {reason}\n"
            "    fix: restore the file, or prepare the data again: "
            "python -m sft.data model=... output=FOLDER"
        )
    sets = load_from_disk(str(folder))
    parts = {name: Samples(sets[name], Counts(**meta["parts"][name])) for name in sets}
    return Prepared.of(parts, folder)
