"""Turn a configuration of Axolotl, LLaMA-Factory or TRL into a settings file: ``sft import``."""

from __future__ import annotations

import logging
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.cli.command import Command
from sft.config.rules import at_least, one_of, rule_problems, setting
from sft.errors import ConfigError, Problem
from sft.files import write_text

logger = logging.getLogger("sft")


@dataclass
class ImportConfig:
    """Which configuration is converted, and where the settings file is written."""

    file: str | None = setting(
        None,
        "the configuration: a YAML or JSON file, or a Python script with SFTConfig(...); the word "
        "file= may be left out",
        path="read",
    )
    output: str | None = setting(
        None,
        "the settings file that is written; null: NAME.sft.yaml in this folder",
        path="written",
    )
    overwrite: bool = setting(False, "true: replace the settings file if it exists")
    tool: str | None = setting(
        None,
        "the tool of the configuration; null: recognised by its keys",
        one_of("axolotl", "llamafactory", "trl"),
    )
    gpus: int = setting(
        1,
        "number of GPUs that the configuration trains on; the global batch counts all",
        at_least(1),
    )


def _output(config: ImportConfig) -> Path:
    return Path(config.output or f"{Path(str(config.file)).stem}.sft.yaml")


def check(config: ImportConfig) -> list[Problem]:
    """Check what is given, before the configuration is read."""
    problems = list(rule_problems(config))
    if not config.file:
        problems.append(Problem("file=null", "a configuration is needed", "sft import FILE.yaml"))
        return problems
    output = _output(config)
    folder = output.parent
    if output.exists() and output.resolve() == Path(config.file).expanduser().resolve():
        rule = "is the configuration itself"
        problems.append(Problem(f"output={output}", rule, f"output={output.stem}.sft.yaml"))
    elif not folder.is_dir() and "://" not in str(config.output):
        rule = f"there is no folder {folder}"
        problems.append(Problem(f"output={output}", rule, f"mkdir -p {shlex.quote(str(folder))}"))
    elif not os.access(output if output.exists() else folder, os.W_OK):
        rule = "cannot be written: you have no permission"
        problems.append(Problem(f"output={output}", rule, "output=FILE.yaml in a folder of yours"))
    elif output.exists() and not config.overwrite:
        problems.append(Problem(f"output={output}", "the file exists", "overwrite=true"))
    if output.suffix not in (".yaml", ".yml"):
        problems.append(Problem(f"output={output}", "must end in .yaml", f"output={output}.yaml"))
    return problems


def convert(config: ImportConfig) -> dict[str, Any]:
    """Convert the configuration, report every key, and write the settings file.

    Returns:
        The report, for ``--json``.

    Raises:
        ConfigError: The file is no configuration of a known tool, or sft refuses settings that it
            gives; the settings file is written in the latter case, to be corrected.
    """
    from sft.convert import convert as conversion
    from sft.convert import report
    from sft.convert.read import read
    from sft.train import main as train

    source = read(str(config.file))
    tool = conversion.recognise(source, config.tool)
    name = conversion.TOOLS[tool]
    how = "as asked" if config.tool else "recognised by its keys"
    logger.info("%s: a configuration of %s (%s)\n", source.path, name, how)
    result = conversion.convert(source, tool, config.gpus, train)
    for line in report.lines(result):
        logger.info("%s", line)
    output = _output(config)
    head = f"# From {source.path.name} of {name}, by sft import.\n"
    head += "# Paths are relative to the folder in which sft train runs.\n"
    write_text(output, conversion.text_of(result.settings, head))
    logger.info("written to %s; paths are as in %s", output, source.path.name)
    found = {"output": str(output), **report.record(result)}
    if result.problems:
        raise Refused(result.problems, found)
    logger.info("next: sft data %s preview=3, then sft train %s", output, output)
    return found


class Refused(ConfigError):
    """The settings file is written, but sft refuses some of its settings."""

    def __init__(self, problems: list[Problem], result: dict[str, Any]) -> None:
        super().__init__(problems)
        self.result = result


main = Command(
    name="import",
    schema=ImportConfig,
    run=convert,
    check=check,
    takes="file",
    summary="convert a configuration of Axolotl, LLaMA-Factory or TRL",
    examples=(
        "sft import axolotl.yaml",
        "sft import llama3_lora_sft.yaml gpus=4 output=mine.yaml",
        "sft import train.py tool=trl",
    ),
)

if __name__ == "__main__":
    main()
