"""Print or write answers as they come."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sft.files import PARTIAL, to_json
from sft.progress import hidden, progress

logger = logging.getLogger("sft")
Write = Callable[[Sequence[dict[str, Any]], Sequence[str]], None]

ANSWER = "generated"  # the column of the answers


def with_room(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rename the rows' own column ``generated``, such as that of earlier answers, and say so."""
    if not any(ANSWER in row for row in rows):
        return rows
    name = ANSWER
    while any(name in row for row in rows):
        name = f"earlier_{name}"
    logger.info("the rows have a column %s already; it is kept as %s", ANSWER, name)
    return [{name if key == ANSWER else key: row[key] for key in row} for row in rows]


@contextlib.contextmanager
def written(output: str | None, count: int) -> Iterator[Write]:
    """Yield the function that takes some rows and their answers, and prints or writes them.

    Args:
        output: The JSONL file, which has the suffix ``.partial`` until it is complete; None: the
            answers are printed.
        count: The number of all rows.
    """
    partial, done = Path(f"{output}{PARTIAL}"), 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress("answering", count, "prompts", at_once=count > 1))
        if output is None:

            def show(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> None:
                with hidden():
                    sys.stdout.write("".join(f"{text}\n" for text in texts))
                    sys.stdout.flush()
                bar.update(len(texts))

            yield show
            return
        file = stack.enter_context(partial.open("w", encoding="utf-8"))

        def write(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> None:
            nonlocal done
            for row, text in zip(rows, texts, strict=True):
                file.write(to_json({**row, ANSWER: text}, ascii=False) + "\n")
            file.flush()
            done += len(texts)
            bar.update(len(texts))

        try:
            yield write
            os.fsync(file.fileno())
        except BaseException:
            logger.info("%d of %d answers are in %s", done, count, partial)
            raise
    partial.replace(output)
    logger.info("%d answers written to %s", done, output)
