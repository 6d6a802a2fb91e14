"""The progress bars of Transformers, Datasets and the hub's client: ours, or lines in the log."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from typing import Any

from sft import process, progress

logger = logging.getLogger("sft")

NAMES = {"Loading weights": "loading the weights", "Writing model shards": "writing the weights"}
FORMAT = "{desc}: {n_fmt} of {total_fmt} {unit}, {remaining} left"


class _Log:
    """The file that a library's bar is written to where there is no terminal.

    A bar writes whenever its library asks for it; of that, one line every ``LINE_EVERY`` seconds
    gets into the log.
    """

    encoding = "utf-8"

    def __init__(self) -> None:
        self.due = time.monotonic() + progress.LINE_EVERY

    def isatty(self) -> bool:
        """Return True: the libraries disable bars whose file is no terminal."""
        return True

    def write(self, text: str) -> None:
        """Log what a bar shows."""
        shown, now = " ".join(text.split()), time.monotonic()
        if shown and now >= self.due:
            self.due = now + progress.LINE_EVERY
            logger.info("%s", shown)

    def flush(self) -> None:
        """Do nothing: the log flushes each line."""


@functools.cache  # once per process
def replace_bars() -> None:
    """Draw Transformers' bars as ours, and write those of downloads and uploads into the log.

    On a terminal the hub's client and Datasets draw their own bars, which show several files.
    """
    import transformers
    from datasets.utils import tqdm as of_datasets
    from huggingface_hub.utils.tqdm import tqdm as of_the_hub

    transformers.utils.logging.set_tqdm_hook(_ours)
    for kind in (of_the_hub, of_datasets):
        _into_log(kind)


def _ours(factory: object, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Return an iterator with a bar of ours in the place of one of Transformers."""
    from transformers.utils.logging import EmptyTqdm

    items = args[0] if args else options.get("iterable")
    if items is None or options.get("disable"):
        return EmptyTqdm(*args, **options)
    what = str(options.get("desc") or "loading")
    total = len(items) if hasattr(items, "__len__") else options.get("total")
    return progress.tracked(items, NAMES.get(what, what), total, options.get("unit", "tensors"))


def _into_log(kind: Any) -> None:
    """Make the bars of a class write into the log where rank 0 has no terminal."""
    begin: Callable[..., None] = kind.__init__

    @functools.wraps(begin)
    def begin_in_log(self: Any, *args: Any, **options: Any) -> None:
        if process.rank() != 0:
            options["disable"] = True
        elif not progress.on_terminal():
            options |= {"file": _Log(), "bar_format": FORMAT, "position": 0, "miniters": 1}
        begin(self, *args, **options)

    kind.__init__ = begin_in_log
