"""List the sources of a dataset section, and read their rows with columns renamed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sft.config.settings import DatasetConfig
from sft.data import locations
from sft.data.folders import Location, resolve
from sft.data.readers import MAX_ROW_BYTES
from sft.data.roles import KEYS, MessageNames
from sft.data.rows import BadRow, Row
from sft.data.values import is_filled
from sft.errors import DataError, SourceError

SEEN = 100  # rows, of which one must have each of dataset.columns: JSON need not write all


@dataclass
class Source:
    """A path that rows are read from, with its options.

    Attributes:
        path: File, folder, pattern, URL or hub id.
        subset: The hub dataset's configuration.
        split: Split of a hub dataset, or of one that ``save_to_disk`` wrote.
        columns: The source's column, or key of messages, for each template field.
        roles: The source's names for each role of messages.
        name: Name in the audit.
        weight: How often an epoch repeats each row.
        part: What the rows are for: ``train``, ``eval``, or ``eval_NAME`` of a set in dataset.eval.
        max_rows: Rows to read, at most.
        stream_seed: Seed of the reading order if the source is streamed; see ``locations.read``.
        max_row_bytes: Bytes of a row in a file, at most.
        setting: The setting that names the path.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)
    roles: dict[str, list[str]] = field(default_factory=dict)
    name: str = "data"
    weight: float = 1.0
    part: str = "train"
    max_rows: int | None = None
    stream_seed: int | None = None
    max_row_bytes: int = MAX_ROW_BYTES
    setting: str = "dataset.path"

    @property
    def held_out(self) -> bool:
        """Return whether the rows are for evaluation."""
        return self.part != "train"

    @cached_property
    def location(self) -> Location:
        """Return what the path names; the same for reading, identifying and counting.

        Raises:
            DataError: The path does not exist, or is a file although ``subset`` is set.
        """
        with self._named():
            found = resolve(self.path, self.split)
        if self.subset is not None and found.files:
            raise DataError(
                f"dataset.subset={self.subset} has no effect on the files of {self.path}: it names "
                "a configuration of a hub dataset\n    fix: dataset.subset=null"
            )
        return found

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Name the source's own setting in an error about its path."""
        try:
            yield
        except SourceError as error:
            raise error.of(self.setting) from error

    def fingerprint(self) -> str:
        """Identify the rows by content and by these options."""
        streamed = self.stream_seed is not None
        content = locations.fingerprint(self.location, self.subset, self.split, streamed)
        names = f"{self.columns} {self.roles}"
        return f"{content} {names} {self.weight} {self.part} {self.max_rows}"

    @cached_property
    def names(self) -> MessageNames:
        """The source's names for keys and roles of messages; it counts those that were read."""
        return MessageNames(self.columns, self.roles)

    def estimated_rows(self) -> int | None:
        """Estimate the number of rows, for a progress bar; None if that is not cheap."""
        count = locations.estimated_rows(self.location)
        if count is None or self.max_rows is None:
            return count
        return min(count, self.max_rows)

    def rows(self) -> Iterator[Row | BadRow]:
        """Yield the rows with their columns renamed.

        Raises:
            DataError: The source cannot be read, is empty, or lacks a column.
        """
        with self._named():
            yield from self._rows()

    def _rows(self) -> Iterator[Row | BadRow]:
        found = locations.read(
            self.location, self.subset, self.split, self.stream_seed, self.max_row_bytes
        )
        first = next(found, None)
        if first is None:
            raise SourceError(f"{self.path} holds no rows", "FILE with at least one row")
        rows = itertools.islice(itertools.chain([first], found), self.max_rows)
        if not self.columns and not self.roles:
            yield from rows
            return
        if len(set(self.columns.values())) < len(self.columns):
            raise DataError(
                f"dataset.columns={self.columns} maps two fields to one column\n"
                "    fix: a template of your own that names the column twice"
            )
        seen: dict[str, None] = {}
        for number, row in enumerate(rows, 1):
            if isinstance(row, Row):
                if number <= SEEN:
                    seen |= dict.fromkeys(row.values)
                row = row._replace(values=self.renamed(row.values))
            if number == SEEN:
                self._require_columns(seen)
            yield row
        self._require_columns(seen)

    def _require_columns(self, seen: Collection[str]) -> None:
        """Refuse ``columns`` if none of the rows that were seen has one of them.

        Raises:
            DataError: None has.
        """
        for name, column in self.columns.items():
            if seen and column not in seen and column not in self.names.found:
                what = f"no column {column}, and no message with such a key"
                what = what if name in KEYS else f"no column {column}"
                raise DataError(
                    f"{self.path} has {what}; it has {', '.join(seen)}\n"
                    f"    fix: dataset.columns.{name}=COLUMN"
                )

    def renamed(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return a row's values, and its messages, by their new names.

        A field such as ``content`` is a column where no message has the key.
        """
        columns = {name: key for name, key in self.columns.items() if name not in KEYS}
        renamed, any_key = self.names.renamed(_moved(values, columns))
        return renamed if any_key else _moved(renamed, self.names.keys)


def _moved(values: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Rename columns: values by their names now, and the column of now for each new name.

    A column that has a new name already stays where the renamed one is not filled. Where both are
    filled, the audit lists it.
    """
    if not columns:
        return values
    moved = {*columns.values(), *columns}
    renamed = {key: value for key, value in values.items() if key not in moved}
    for name, column in columns.items():
        value = values.get(column)
        own = None if name in columns.values() else values.get(name)
        if is_filled(own) and is_filled(value):
            renamed[f"{name}, replaced by {column}"] = own
        renamed[name] = value if is_filled(value) or not is_filled(own) else own
    return renamed


def of(config: DatasetConfig, seed: int) -> list[Source]:
    """List the sources of a dataset section, those to train on first."""
    found = _of(config)
    for source in found:
        source.max_row_bytes = config.max_row_bytes
        if config.streaming:
            source.stream_seed = seed
    return found


def require_paths(config: DatasetConfig) -> None:
    """Check that local files and folders exist, before a large library is imported.

    Raises:
        DataError: One does not, or has no file that can be read.
    """
    for source in _of(config):
        if "://" not in source.path:
            source.location  # noqa: B018


def _of(config: DatasetConfig) -> list[Source]:
    shared: dict[str, Any] = {
        "split": config.split,
        "columns": config.columns,
        "roles": config.roles,
    }
    if config.mix:
        given = [
            Source(name=name, setting=f"dataset.mix.{name}.path", **(shared | item))
            for name, item in config.mix.items()
        ]
    else:
        assert config.path is not None
        given = [Source(config.path, config.subset, **shared)]
    held_out = list(_held_out(config, shared))
    for sources, limit in ((given, config.max_rows), (held_out, config.max_eval_rows)):
        for source in sources:
            source.max_rows = min(filter(None, (source.max_rows, limit)), default=None)
    return [*given, *held_out]


def _held_out(config: DatasetConfig, shared: dict[str, Any]) -> Iterator[Source]:
    """Yield the sources of held-out rows: the main ones first, then the sets of dataset.eval."""
    main = {"name": "eval", "part": "eval"}
    if config.eval_path is not None:
        yield Source(config.eval_path, setting="dataset.eval_path", **(shared | main))
    elif config.eval_split is not None:
        assert config.path is not None
        split = {"split": config.eval_split}
        yield Source(config.path, config.subset, **(shared | main | split))
    for name, item in config.eval.items():
        own = {"name": f"eval_{name}", "part": f"eval_{name}"}
        if "path" not in item:  # another split of the rows to train on
            item = {"path": config.path, "subset": config.subset, **item}
        yield Source(setting=f"dataset.eval.{name}.path", **(shared | own | item))


def halves(row: Row, config: DatasetConfig) -> tuple[Row, Row]:
    """Split one plain text between two lines, so that its end can be held out.

    Raises:
        DataError: The text has no end of a line to split at.
    """
    text = row.values["text"]
    fraction = config.eval_fraction
    cut = text.rfind("\n", 0, int(len(text) * (1 - fraction))) + 1
    if cut == 0 or cut == len(text):
        raise DataError(
            f"one document of {len(text)} characters cannot be split between lines\n"
            "    fix: dataset.eval_path=FILE, or dataset.eval_fraction=0"
        )
    line = row.line + text.count("\n", 0, cut)
    return (
        row._replace(values={"text": text[:cut]}),
        row._replace(values={"text": text[cut:]}, line=line),
    )
