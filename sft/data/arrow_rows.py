"""Read the rows of Parquet and Arrow files as Python objects, without the nulls that Arrow adds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1000  # in a batch
Values = dict[str, Any]
Convert = Callable[[Any], Any]


def parquet(file: IO[bytes], limit: int) -> Iterator[Values | str]:
    """Yield each row of a Parquet file, or the reason why it cannot be used.

    Args:
        file: The file, opened.
        limit: Bytes of a row, at most.
    """
    import pyarrow.parquet

    return _rows(pyarrow.parquet.ParquetFile(file).iter_batches(ROWS), limit)


def arrow(file: IO[bytes], limit: int) -> Iterator[Values | str]:
    """Yield the rows of an Arrow file as ``parquet`` does; it may be a stream or have a footer."""
    import pyarrow as pa

    try:
        batches = iter(pa.ipc.open_stream(file))
    except pa.ArrowInvalid:
        file.seek(0)
        whole = pa.ipc.open_file(file)
        batches = (whole.get_batch(index) for index in range(whole.num_record_batches))
    return _rows(batches, limit)


def _rows(batches: Iterable[pa.RecordBatch], limit: int) -> Iterator[Values | str]:
    clean: Convert | None = None
    for batch in batches:
        clean = clean or cleaner(batch.schema)
        for begin in range(0, batch.num_rows, ROWS):
            yield from _of_batch(batch.slice(begin, ROWS), clean, limit)


def _of_batch(batch: pa.RecordBatch, clean: Convert, limit: int) -> Iterable[Values | str]:
    try:
        if batch.nbytes <= limit:
            return list(map(clean, batch.to_pylist()))
    except Exception:  # of one of the rows, such as a date beyond Python's: it is found below
        pass
    return (_of_row(batch.slice(place, 1), clean, limit) for place in range(batch.num_rows))


def _of_row(row: pa.RecordBatch, clean: Convert, limit: int) -> Values | str:
    if row.nbytes > limit:
        return f"the row has {row.nbytes:,} bytes, more than dataset.max_row_bytes={limit}"
    try:
        values: Values = clean(row.to_pylist()[0])
        return values
    except Exception as error:  # Arrow, Python's dates and decimals: each raises errors of its own
        return f"the row cannot be read: {type(error).__name__}: {error}"


def cleaner(schema: pa.Schema, decoded: bool = False) -> Convert:
    """Return a function that removes from a row the nulls that Arrow has added.

    All values of an Arrow column have one type. If one row's tool call has the argument ``a`` and
    another's has ``b``, both have the keys ``a`` and ``b``, one of them null. A null key within a
    column therefore means an absent one. A null within JSON text was written by someone and stays.

    Args:
        schema: The columns.
        decoded: Whether JSON columns are objects already, as in the rows of Datasets.
    """
    nested = {field.name: clean for field in schema if (clean := _of_type(field.type, decoded))}

    def row(values: Values) -> Values:
        for name, clean in nested.items():
            values[name] = clean(values[name])
        return values

    return row


def _of_type(kind: pa.DataType, decoded: bool) -> Convert | None:
    """Return a function that cleans a value of this type; None if there is nothing to clean."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        inner = [(field.name, _of_type(field.type, decoded)) for field in kind]

        def struct(value: Any) -> Any:
            if value is None:
                return None
            return {
                name: clean(value[name]) if clean else value[name]
                for name, clean in inner
                if value.get(name) is not None
            }

        return struct
    if pa.types.is_map(kind):
        return lambda value: value if value is None else dict(value)
    if pa.types.is_nested(kind) and hasattr(kind, "value_type"):  # a list of any kind
        item = _of_type(kind.value_type, decoded)
        if item is None:
            return None
        return lambda value: value if value is None else [item(inner) for inner in value]
    if getattr(kind, "extension_name", None) == "arrow.json" and not decoded:
        return lambda value: value if value is None else json.loads(value)
    return None


def without_nulls(values: Values) -> Values:
    """Remove null keys within the columns of a row whose types are not known."""
    return {name: _without_nulls(value) for name, value in values.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value
