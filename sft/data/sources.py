"""Rows from a hub dataset, a local file, or a folder of text; some held out for evaluation."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

from sft.config import DatasetConfig
from sft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}


def load_rows(config: DatasetConfig, seed: int) -> tuple[Dataset, Dataset | None]:
    """Give the rows to train on and, where there are any, the held-out rows.

    Args:
        config: The dataset section.
        seed: Of the choice of held-out rows.

    Raises:
        DataError: A file or column is missing, the hub cannot be reached, or there are no rows.
    """
    assert config.path is not None
    train = _renamed(_load(config.path, config.subset, config.split), config, config.path)
    held_out: Dataset | None = None
    if config.eval_path is not None:
        held_out = _renamed(_load(config.eval_path, None, config.split), config, config.eval_path)
    elif config.eval_split is not None:
        held_out = _renamed(
            _load(config.path, config.subset, config.eval_split), config, config.path
        )
    elif config.eval_fraction > 0:
        train, held_out = _split(train, config, seed)
    if config.max_rows is not None:
        train = train.select(range(min(config.max_rows, len(train))))
    if held_out is not None and config.max_eval_rows is not None:
        held_out = held_out.select(range(min(config.max_eval_rows, len(held_out))))
    return train, held_out


def _load(path: str, subset: str | None, split: str) -> Dataset:
    local = Path(path).expanduser()
    if local.exists():
        rows = _load_local(local)
    elif local.suffix in READERS or local.is_absolute() or path.startswith("."):
        raise DataError(
            f"there is no file or folder {path}\n    fix: dataset.path=FILE, from {Path.cwd()}"
        )
    else:
        rows = _load_hub(path, subset, split)
    if len(rows) == 0:
        raise DataError(f"{path} holds no rows\n    fix: dataset.path=FILE with at least one row")
    return rows


def _load_local(path: Path) -> Dataset:
    from datasets import load_dataset

    if path.is_dir():
        files = sorted(str(file) for end in ("*.txt", "*.md") for file in path.rglob(end))
        if not files:
            raise DataError(
                f"the folder {path} holds no .txt or .md file\n    fix: dataset.path=FILE_OR_FOLDER"
            )
        reader = "text"
    else:
        if path.suffix not in READERS:
            known = ", ".join(READERS)
            raise DataError(f"{path} is of no known kind\n    fix: a file that ends in {known}")
        files, reader = [str(path)], READERS[path.suffix]
        if path.stat().st_size == 0:
            raise DataError(f"{path} is empty\n    fix: dataset.path=FILE with at least one row")
    # The reader takes names for patterns.
    files = [glob.escape(file) for file in files]
    options = {"sample_by": "document"} if reader == "text" else {}
    try:
        return load_dataset(reader, data_files=files, split="train", **options)
    except Exception as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise DataError(
            f"{path} cannot be read as {reader}: {reason}\n    fix: one JSON object per line, or "
            "the file's right ending"
        ) from error


def _load_hub(path: str, subset: str | None, split: str) -> Dataset:
    from datasets import load_dataset

    try:
        return load_dataset(path, subset, split=split)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"the dataset {path} cannot be loaded from the hub: {reason}\n"
            "    fix: check the name and the network; HF_HUB_OFFLINE=1 uses only what is cached; "
            "dataset=demo is embedded"
        ) from error


def _renamed(rows: Dataset, config: DatasetConfig, path: str) -> Dataset:
    for field, column in config.columns.items():
        if column not in rows.column_names:
            raise DataError(
                f"{path} has no column {column}; it has {', '.join(rows.column_names)}\n"
                f"    fix: dataset.columns.{field}=COLUMN"
            )
    names = {column: field for field, column in config.columns.items()}
    if len(names) < len(config.columns):
        raise DataError(
            f"dataset.columns={config.columns} takes two fields from one column\n"
            "    fix: a template of your own that names the column twice"
        )
    hidden = [field for field in config.columns if field in rows.column_names]
    return rows.remove_columns([field for field in hidden if field not in names]).rename_columns(
        names
    )


def _split(rows: Dataset, config: DatasetConfig, seed: int) -> tuple[Dataset, Dataset]:
    """Hold out a share of the rows; of one plain-text document, its end."""
    if len(rows) == 1 and rows.column_names == ["text"]:
        return _split_document(rows[0]["text"], config)
    count = max(1, round(len(rows) * config.eval_fraction))
    if count >= len(rows):
        raise DataError(
            f"{len(rows)} rows with dataset.eval_fraction={config.eval_fraction} leave none to "
            "train on\n    fix: dataset.eval_fraction=0"
        )
    shuffled = rows.shuffle(seed=seed)
    return (
        shuffled.select(range(count, len(rows))).flatten_indices(),
        shuffled.select(range(count)).flatten_indices(),
    )


def _split_document(text: str, config: DatasetConfig) -> tuple[Dataset, Dataset]:
    from datasets import Dataset

    cut = text.rfind("\n", 0, int(len(text) * (1 - config.eval_fraction))) + 1
    if cut == 0 or cut == len(text):
        raise DataError(
            f"one document of {len(text)} characters cannot be split between lines\n"
            "    fix: dataset.eval_path=FILE, or dataset.eval_fraction=0"
        )
    return Dataset.from_dict({"text": [text[:cut]]}), Dataset.from_dict({"text": [text[cut:]]})
