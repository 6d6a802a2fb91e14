"""Read JSON: lines, an array of objects, or one object; row by row, in bounded memory."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import IO, Any

from sft.data.formats import COLUMNS, recognise
from sft.data.rows import MAX_DEPTH, SHOWN, BadRow, Row, Rows, too_long
from sft.errors import DataError

logger = logging.getLogger("sft")

BLOCK = 1 << 20  # characters of an array, or bytes of a line, that are read at once
BOM = b"\xef\xbb\xbf"
BLANK = re.compile(r"[\s,]*")
COLON = re.compile(r"\s*:\s*")


def json_lines(file: IO[bytes], path: str, limit: int) -> Rows:
    """Yield the row of each line."""
    line = 0
    while text := file.readline(limit + 1):
        line += 1
        if len(text) > limit:
            shown = text[:SHOWN].decode("utf-8", "replace")
            yield BadRow(path, line, too_long("the line", limit), shown)
            while text and not text.endswith(b"\n"):
                text = file.readline(BLOCK)
            continue
        if line == 1:
            text = text.removeprefix(BOM)
        if not text.isspace():
            yield _object(text, path, line)


def _object(text: bytes, path: str, line: int) -> Row | BadRow:
    try:
        values = json.loads(text)
    except RecursionError:
        reason = f"is nested more than {MAX_DEPTH} deep"
    except ValueError as error:
        reason = f"is not valid JSON: {error}"
    else:
        reason = _unusable(values, text.count(b"{") + text.count(b"["))
        if not reason:
            return Row(values, path, line)
    return BadRow(path, line, f"the line {reason}", text[:SHOWN].decode("utf-8", "replace").strip())


def _unusable(values: Any, brackets: int) -> str:
    """Return why parsed JSON is no row; "" if it is one.

    Args:
        values: The parsed JSON.
        brackets: Opening brackets in its text; only if they are many can it be nested deep.
    """
    if not isinstance(values, dict):
        return f"is not an object but {type(values).__name__}"
    if brackets <= MAX_DEPTH:
        return ""
    level: list[Any] = [values]
    for _ in range(MAX_DEPTH):
        if not level:
            return ""
        inner = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    return f"is nested more than {MAX_DEPTH} deep" if level else ""


def json_file(file: io.BufferedReader, path: str, limit: int) -> Rows:
    """Yield the rows of a .json file, which holds one of four things.

    These are an array of objects, an object that holds one such array, an object that is a row, or
    JSON lines.
    """
    head = file.peek(BLOCK).removeprefix(BOM).lstrip()
    if head[:1] == b"[":
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        before = text.read(BLOCK)
        yield from _array(before, before.index("[") + 1, text, path, limit, is_all=True)
        return
    if head[:1] != b"{":
        raise DataError(f"{path} holds no JSON array or object\n    fix: an array of objects")
    first, _, others = head.partition(b"\n")
    if others.strip() and isinstance(_parsed(first), dict):
        yield from json_lines(file, path, limit)
        return
    content = file.read(limit + 1)
    if len(content) > limit:
        raise DataError(
            f"{path}:1: {too_long('the object', limit)}\n    fix: an array of objects, or JSON "
            "lines in a .jsonl file, which are read one by one; or raise dataset.max_row_bytes"
        )
    values = _parsed(content.removeprefix(BOM))
    if values is None:  # it may still be lines, of which the first is damaged
        yield from json_lines(io.BytesIO(content), path, limit)
        return
    lists = [key for key, value in values.items() if isinstance(value, list)]
    if _is_row(values, lists):
        line = 1 + content[: content.index(b"{")].count(b"\n")
        yield _object(content.removeprefix(BOM), path, line)
    elif len(lists) == 1:
        if len(values) > 1:
            names = ", ".join(key for key in values if key != lists[0])
            logger.info("%s: its rows are in %s; not read: %s", path, lists[0], names)
        whole = content.decode("utf-8-sig")
        yield from _array(whole, _begin_of(lists[0], whole), io.StringIO(), path, limit)
    else:
        raise DataError(
            f"{path} is one JSON object with {len(lists)} lists; the rows must be its only list\n"
            "    fix: an array of objects, or one object per line in a .jsonl file"
        )


def _parsed(text: bytes) -> Any:
    """Return parsed JSON; None if it is damaged or nested too deep."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_row(values: dict[str, Any], lists: list[str]) -> bool:
    """Return whether one JSON object is a row, not a file's rows under one key."""
    format = recognise(values)
    if format in ("messages", "sharegpt", "tokenized") or not lists:
        return True
    firsts = [values[key][0] for key in lists if values[key] and isinstance(values[key][0], dict)]
    if not firsts:
        return format != COLUMNS
    keys = ({"role", "content"}, {"from", "value"})  # of messages
    return all(any(names <= first.keys() for names in keys) for first in firsts)


def _begin_of(key: str, text: str) -> int:
    """Return the position of the first element of the array that an object has under a key."""
    decoder = json.JSONDecoder()
    place = text.index("{") + 1
    while True:
        name, place = decoder.raw_decode(text, _after(BLANK, text, place))
        place = _after(COLON, text, place)
        if name == key and text[place] == "[":
            return place + 1
        _, place = decoder.raw_decode(text, place)


def _after(pattern: re.Pattern[str], text: str, place: int) -> int:
    """Return the position after a pattern at a place; the place if it does not match there."""
    found = pattern.match(text, place)
    return found.end() if found else place


def _require_end(rest: str, where: str) -> None:
    """Require that only white space follows an array.

    Raises:
        DataError: Something else does.
    """
    if rest := rest.strip():
        raise DataError(
            f"{where}: the array ends, but the file goes on: {rest[:60]}\n"
            "    fix: one array of objects, or one object per line in a .jsonl file"
        )


def _array(
    text: str, place: int, file: IO[str], path: str, limit: int, is_all: bool = False
) -> Rows:
    """Yield an array's elements, each with the line in which it begins.

    Args:
        text: The part of the file that has been read.
        place: Position of the first element in ``text``.
        file: The rest of the file; at most one element and one block of it are in memory.
        path: The file's name.
        limit: Length of an element, at most.
        is_all: Whether nothing may follow the array.
    """
    decoder = json.JSONDecoder()
    line = 1 + text.count("\n", 0, place)
    while True:
        after = _after(BLANK, text, place)
        line += text.count("\n", place, after)
        place = after
        if text[place : place + 1] == "]":
            if is_all:
                _require_end(text[place + 1 :] + file.read(BLOCK), f"{path}:{line}")
            return
        damage = "the array is not closed"
        try:
            values, end = decoder.raw_decode(text, place)
        except RecursionError:  # its end is unknown, so the elements that follow are, too
            raise DataError(
                f"{path}:{line}: the element is nested more than {MAX_DEPTH} deep\n"
                "    fix: leave it out, or write one object per line in a .jsonl file"
            ) from None
        except ValueError as error:
            damage, end = str(error), len(text)
        if end == len(text):  # the next block may continue the element: 12 of 123
            size = len(text) - place
            if size > limit:
                raise DataError(
                    f"{path}:{line}: {too_long('the element', limit)}, or damaged: {damage}\n"
                    "    fix: correct it, or raise dataset.max_row_bytes"
                )
            # Read twice as much each time: a long element is not parsed again for every block.
            more = file.read(max(BLOCK, size))
            if not more:
                raise DataError(
                    f"{path}:{line}: the JSON is damaged: {damage}\n"
                    "    fix: correct the file at this line, or write it again"
                )
            text, place = text[place:] + more, 0
            continue
        brackets = text.count("{", place, end) + text.count("[", place, end)
        if reason := _unusable(values, brackets):
            yield BadRow(path, line, f"the element {reason}", text[place:end][:SHOWN])
        elif end - place > limit:
            yield BadRow(path, line, too_long("the element", limit), text[place:end][:SHOWN])
        else:
            yield Row(values, path, line)
        line += text.count("\n", place, end)
        place = end
