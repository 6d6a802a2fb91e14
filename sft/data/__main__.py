"""Tokenise ahead of time, audit the rows, and look at what is trained: ``python -m sft.data``."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import environment
from sft.cli.command import Command
from sft.config.artefact_meta import meta_of
from sft.config.checks import check
from sft.config.rules import at_least, setting
from sft.config.settings import Config, DatasetConfig, fill_names, packing_of, streamed_samples
from sft.data import sources
from sft.errors import DataError, Problem
from sft.files import partial_of
from sft.model.source import source

if TYPE_CHECKING:
    from sft.data.prepared import Prepared
    from sft.data.template import Template

logger = logging.getLogger("sft")


@dataclass
class DataConfig(Config):
    """A run's settings, and what to show of its data."""

    preview: int = setting(0, "samples to show, with trained tokens marked", at_least(0))
    tokens: bool = setting(False, "also show token boundaries and ids")
    html: str | None = setting(
        None, "the preview's HTML page; null: <output_dir>.data.html", path="written"
    )
    output: str | None = setting(
        None, "folder for the prepared data, for dataset=pretokenized", path="written"
    )


def check_data(config: DataConfig) -> list[Problem]:
    """Check the settings without reading any data."""
    problems = check(config)
    if config.output is not None and Path(config.output).exists():
        problems.append(Problem(f"output={config.output}", "the folder exists", "output=FOLDER"))
    return problems


def data(config: DataConfig) -> dict[str, Any]:
    """Prepare and audit the data, and show or write it if asked to.

    Returns:
        The figures and checks of train and eval, and the paths of written files, for ``--json``.

    Raises:
        DataError: The data cannot be read, or a check stops the run.
    """
    fill_names(config)
    source(config.model)
    if meta_of(config.dataset.path) is None:
        sources.require_paths(config.dataset)
    page = Path(config.html or f"{Path(str(config.output_dir))}.data.html")
    if config.preview:
        _require_place(page, "html")
    if config.output is not None:
        _require_place(Path(config.output), "output")
    environment.prepare()

    from sft.data import artefact, outlook
    from sft.data import tables as report
    from sft.data.audit import Counts
    from sft.data.prepare import prepare
    from sft.data.template import Template
    from sft.model import adapter
    from sft.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(config.model)
    chosen = artefact.template_of(config.dataset.path) or config.template
    template = Template(chosen, tokenizer, config.dataset.format)
    packing = packing_of(config.dataset, chosen.kind)
    if meta_of(config.dataset.path) is None:
        logger.info("dataset.packing=%s: %s", packing.value, packing.reason)
    needed = streamed_samples(config)
    parameters = adapter.count_parameters(config)

    def show(parts: dict[str, Counts], dataset: DatasetConfig) -> None:
        report.show(parts, dataset, outlook.outlook(config, parts["train"], parameters))

    prepared = prepare(config.dataset, template, config.seed, needed, show=show)
    logger.info("data.json and dropped.jsonl are in %s", prepared.folder)
    figures = report.figures(prepared.parts, config.dataset)
    training = outlook.outlook(config, prepared.train.counts, parameters)
    if warning := outlook.warning(training, config.lora.r):
        logger.info("warning: %s", warning)
    result = {"parts": figures, "training": training.figures(), "folder": str(prepared.folder)}
    if config.preview:
        audit = {"training": training.figures(), **figures}
        _preview(config, prepared, template, audit, page)
        result["html"] = str(page)
    if config.output is not None:
        artefact.save(prepared, Path(config.output))
        logger.info(
            "prepared data written to %s; to train on it: dataset=pretokenized dataset.path=%s",
            config.output,
            config.output,
        )
        result["output"] = config.output
    return result


def _require_place(path: Path, setting: str) -> None:
    """Make the folder that a path is in, and check that something can be written there.

    Raises:
        DataError: Nothing can.
    """
    partial = partial_of(path)
    try:
        if not partial.exists():  # a killed process may have left it
            partial.mkdir(parents=True)
            partial.rmdir()
    except OSError as error:
        raise DataError(
            f"{setting}={path} cannot be written: {error.strerror}\n"
            f"    fix: {setting}=PATH in a folder that you may write to"
        ) from error


def _preview(
    config: DataConfig, prepared: Prepared, template: Template, audit: dict[str, Any], path: Path
) -> None:
    """Print samples, and write them and the audit to a page."""
    from sft.data import page, preview
    from sft.data.generation_prompts import prompts_of
    from sft.data.preview import Prompt

    count = min(config.preview, len(prepared.train.dataset))
    samples = [prepared.train.dataset[index] for index in range(count)]
    prompts: list[list[Prompt | None]] = []
    if meta_of(config.dataset.path) is None:  # an artefact does not hold the rows
        prompts = prompts_of(samples, prepared, template, config.dataset, config.seed)
    preview.show(
        samples, template.tokenizer, tokens=config.tokens, file=sys.stdout, prompts=prompts
    )
    html = page.page(samples, template.tokenizer, str(config.run_name), audit, prompts)
    path.write_text(html, encoding="utf-8")
    logger.info("preview written to %s", path)


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
