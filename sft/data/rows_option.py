"""Choose the option of the group dataset for a file of rows: ``dataset=rows.jsonl``."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from sft.errors import DataError

ARTEFACT = ("meta.json", "dataset_dict.json")  # what `sft data output=FOLDER` writes
BY_KIND = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


def option_of(path: str) -> str | None:
    """Choose the option for the rows at a local path.

    The first row decides between ``chat`` (a list of messages), ``text`` (one text) and an option
    for prompts with completions, which depends on the file's extension.

    Returns:
        The option's name; None if no file, folder or match of a pattern is at this path.

    Raises:
        DataError: The path exists, but has no file of a known kind.
    """
    from sft.data.folders import resolve
    from sft.data.formats import recognise
    from sft.data.locations import read
    from sft.data.readers import TEXT, kind_of
    from sft.data.rows import Row
    from sft.data.values import present

    local = Path(path).expanduser()
    if not os.path.lexists(local) and not glob.glob(str(local), recursive=True):
        return None
    if all((local / name).is_file() for name in ARTEFACT):
        return "pretokenized"
    where = resolve(path, split=None)
    kind = kind_of(where.files[0])
    if kind is None:
        raise DataError(
            f"{path} is of no known kind: .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt or .md"
            f"\n    fix: dataset=text dataset.path={path}, or give a different file"
        )
    if kind in TEXT:
        return "text"
    try:
        first = next(iter(read(where)), None)
    except DataError:
        first = None  # preparing the data reports the error, with file and line
    row = present(first.values) if isinstance(first, Row) else {}
    format = recognise(row)
    if format in ("messages", "sharegpt") or isinstance(row.get("prompt"), list):
        return "chat"
    return "text" if format == "text" else BY_KIND.get(kind, "jsonl")
