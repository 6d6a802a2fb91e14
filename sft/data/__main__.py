"""Tokenise ahead of time, audit the rows, and look at what is trained: ``python -m sft.data``."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft import environment
from sft.cli.command import Command
from sft.config.checks import check
from sft.config.rules import at_least, setting
from sft.config.settings import Config, fill_names, packing_of, streamed_samples
from sft.errors import Problem

logger = logging.getLogger("sft")


@dataclass
class DataConfig(Config):
    """A run's settings, and what to show of its data."""

    preview: int = setting(0, "samples to show, trained tokens marked", at_least(0))
    tokens: bool = setting(False, "show token boundaries and ids too")
    html: str | None = setting(None, "the preview as a page; null: outputs/<run_name>.data.html")
    output: str | None = setting(None, "write the result as a folder for dataset=pretokenized")


def check_data(config: DataConfig) -> list[Problem]:
    """Find what is wrong with the settings alone."""
    problems = check(config)
    if config.output is not None and Path(config.output).exists():
        problems.append(Problem(f"output={config.output}", "exists", "output=ANOTHER_FOLDER"))
    return problems


def data(config: DataConfig) -> dict[str, Any]:
    """Prepare the data, and report what it is.

    Returns:
        Each part's figures and checks, and where files were written; what ``--json`` prints.

    Raises:
        DataError: It cannot be read, or must not be trained on.
    """
    fill_names(config)
    environment.prepare()

    from sft.data import artefact, page, preview
    from sft.data import tables as report
    from sft.data.prepare import prepare
    from sft.data.template import Template
    from sft.model import base as model

    tokenizer = model.load_tokenizer(config.model)
    chosen = artefact.template_of(config.dataset.path) or config.template
    template = Template(chosen, tokenizer, config.dataset.format)
    packing = packing_of(config.dataset, chosen.kind)
    if artefact.meta_of(config.dataset.path) is None:
        logger.info("dataset.packing=%s: %s", packing.value, packing.reason)
    needed = streamed_samples(config)
    prepared = prepare(config.dataset, template, config.seed, needed, show=report.show)
    logger.info("data.json and dropped.jsonl are in %s", prepared.folder)
    figures = report.figures(prepared.parts, config.dataset)
    result = {"parts": figures, "folder": str(prepared.folder)}
    if config.preview:
        count = min(config.preview, len(prepared.train.dataset))
        samples = [prepared.train.dataset[index] for index in range(count)]
        preview.show(samples, tokenizer, tokens=config.tokens, file=sys.stdout)
        path = Path(config.html or f"outputs/{config.run_name}.data.html")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            page.page(samples, tokenizer, str(config.run_name), figures), encoding="utf-8"
        )
        logger.info("the same as a page: %s", path)
        result["html"] = str(path)
    if config.output is not None:
        artefact.save(prepared, Path(config.output))
        logger.info(
            "written to %s; train from it with dataset=pretokenized dataset.path=%s",
            config.output,
            config.output,
        )
        result["output"] = config.output
    return result


main = Command(
    name="data",
    schema=DataConfig,
    run=data,
    check=check_data,
    config_name="train",
    summary="tokenise, audit and preview what would be trained",
    examples=(
        "python -m sft.data preview=3",
        "python -m sft.data model=opt-125m dataset=alpaca output=alpaca-opt",
    ),
)

if __name__ == "__main__":
    main()
