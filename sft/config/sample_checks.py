"""Check the section sample: what is answered while the model trains."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sft.config.data_checks import prepared_parts
from sft.config.settings import Config
from sft.errors import Problem

FILE_OR_LIST = "sample.prompts=FILE, or a list: sample.prompts='[How are you?]'"


def problems(config: Config) -> Iterator[Problem]:
    """Check that there are prompts, if any are to be answered."""
    given, data = config.sample.prompts, config.dataset
    if config.sample.every is None:
        return
    if given is None:
        held_out = data.eval_path or data.eval_split or data.eval_fraction
        if not held_out and "eval" not in prepared_parts(data):
            yield Problem(
                f"sample.every={config.sample.every}",
                "there are no held-out rows that the model could answer",
                "dataset.eval_fraction=0.05, or sample.prompts=FILE",
            )
    elif isinstance(given, str):
        if "://" not in given and not Path(given).expanduser().is_file():
            yield Problem(f"sample.prompts={given}", "there is no such file", FILE_OR_LIST)
    elif not (isinstance(given, list) and given and all(_is_text(item) for item in given)):
        yield Problem(
            f"sample.prompts={given}",
            "must be a file or a list of texts, each not empty",
            FILE_OR_LIST,
        )


def _is_text(item: object) -> bool:
    return isinstance(item, str) and bool(item.strip())
