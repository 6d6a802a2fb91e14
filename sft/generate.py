"""Generate text with a run, an adapter, a merged model or any model: one prompt, or a file."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import environment
from sft.cli.command import Command
from sft.config.rules import LARGEST_SEED, at_least, between, rule_problems, setting, share
from sft.config.settings import ModelConfig, QuantizationConfig, TemplateConfig
from sft.errors import DataError, ModelError, Problem
from sft.inference.card import ADAPTER_SETTINGS
from sft.inference.output import ANSWER, with_room, written
from sft.merge import claim
from sft.model.source import named_by, source
from sft.run import record

if TYPE_CHECKING:
    from sft.data.template import Template
    from sft.inference.card import Card

logger = logging.getLogger("sft")
MOST_TOKENS = 1 << 24  # more than any model has positions


@dataclass
class GenerateConfig:
    """Which model, which prompts, and how to sample."""

    run: str | None = setting(
        None, "a run's folder, whose adapter or full model is used", path="read"
    )
    adapter: str | None = setting(None, "or an adapter's folder", path="read")
    model: str | None = setting(
        None, "or the folder or hub id of a merged or any other model", path="read"
    )
    base: str | None = setting(
        None, "the adapter's base model; null: the one that it names", path="read"
    )
    trust_remote_code: bool = setting(
        False, "true: run the Python code in the model's repository or folder"
    )
    check_base: bool = setting(True, "check that the adapter's base is the one of training")
    prompt: str | None = setting(None, "one prompt, rendered with the run's template")
    file: str | None = setting(
        None, "or a file of rows (.jsonl, .csv, ...) to answer in order", path="read"
    )
    output: str | None = setting(
        None, "JSONL file for the answers; null: print them", path="written"
    )
    raw: bool = setting(False, "true: use the prompt without a template")
    max_new_tokens: int = setting(256, "tokens in an answer, at most", between(1, MOST_TOKENS))
    temperature: float | None = setting(
        None, "temperature of sampling; null: greedy", at_least(1e-3)
    )
    top_p: float = setting(1.0, "sample from the tokens of this total probability", share())
    batch_size: int = setting(8, "prompts per batch", at_least(1))
    seed: int = setting(0, "seed of the sampling", between(0, LARGEST_SEED))


def check(config: GenerateConfig) -> list[Problem]:
    """Check the settings without loading anything."""
    problems = list(rule_problems(config))
    if sum(item is not None for item in (config.run, config.adapter, config.model)) != 1:
        problems.append(Problem("run, adapter, model", "set exactly one", "run=outputs/NAME"))
    if config.prompt == "":
        problems.append(Problem("prompt=", "the prompt is empty", "prompt='...'"))
    if (config.prompt is None) == (config.file is None):
        problems.append(Problem("prompt, file", "set exactly one", "prompt='...'"))
    if config.output is not None and "://" not in config.output:
        output = Path(config.output)
        if output.exists():
            problems.append(Problem(f"output={output}", "the file exists", "output=FILE"))
        elif not os.access(output.parent, os.W_OK):
            rule = f"the folder {output.parent} does not exist, or cannot be written to"
            problems.append(Problem(f"output={output}", rule, "output=FILE in a different folder"))
    return problems


def _sampling(config: GenerateConfig) -> dict[str, Any]:
    """Return the arguments of ``generate`` that sample; none for greedy answers."""
    if config.temperature is None:
        return {}
    # Transformers' default of top_k samples from 50 tokens only.
    return {"do_sample": True, "top_k": 0, "temperature": config.temperature, "top_p": config.top_p}


def generate(config: GenerateConfig) -> dict[str, Any]:
    """Answer the prompts, in order; each batch is written as it comes.

    Returns:
        The rows with their answers, or the file that holds them and their number, for ``--json``.

    Raises:
        ModelError: There is no such model or adapter.
        MergeError: The adapter is damaged, or does not fit its base.
        DataError: A row does not fit the template, or has more tokens than the model has positions.
    """
    folder = _folder(config)
    if config.file is not None and not Path(config.file).is_file():
        raise DataError(f"there is no file {config.file}\n    fix: file=ROWS.jsonl")
    is_adapter = (folder / ADAPTER_SETTINGS).is_file()
    with named_by("base" if is_adapter else "model"):
        if is_adapter:
            claim.check_adapters([folder], config.base)
        else:
            source(ModelConfig(name_or_path=config.model or str(folder.resolve())))
    environment.prepare()
    from transformers import set_seed

    from sft.data.text_encoder import Encoder
    from sft.fast import cpu_products
    from sft.inference.answers import complete, room

    model, template, card = _load(config, folder)
    cpu_products.widen_products(model.dtype)
    rows = _rows(config, template)
    named = card.named(rows) if card and config.file and not config.raw else rows
    encoder = Encoder(template.tokenizer)
    prompts = [
        encoder.prompt(row["prompt"], bos=True)
        if config.raw
        else encoder.prompt(template.render_prompt(row), bos=template.adds_bos)
        for row in named
    ]
    longest = room(model, prompts, config.max_new_tokens)
    if longest < config.max_new_tokens:
        logger.info("max_new_tokens=%d: more do not fit into the model's positions", longest)
    options = _sampling(config)
    stop_ids = [] if config.raw else template.stop_ids
    set_seed(config.seed)
    texts: list[str] = []
    rows = with_room(rows)
    with written(config.output, len(rows)) as write:
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            texts += complete(
                model, template.tokenizer, batch, longest, model.device, stop_ids, **options
            )
            stop = len(texts)
            write(rows[start:stop], texts[start:stop])
    if config.output is not None:
        return {"output": config.output, "count": len(texts)}
    pairs = zip(rows, texts, strict=True)
    return {"answers": [{**row, ANSWER: text} for row, text in pairs]}


def _folder(config: GenerateConfig) -> Path:
    """Find the folder that holds the adapter or the model."""
    if config.run is not None:
        if weights := record.weights(config.run):
            option = "adapter" if weights.name == record.ADAPTER else "model"
            record.require_sound(config.run, f"{option}={weights}")
            return weights
        raise ModelError(
            f"{config.run} holds no adapter and no model\n    fix: run=FOLDER of a finished run"
        )
    if config.adapter is not None:
        if not (Path(config.adapter) / ADAPTER_SETTINGS).is_file():
            inside = (Path(config.adapter) / record.ADAPTER).is_dir()
            fix = f"run={config.adapter}" if inside else "adapter=FOLDER, or model=FOLDER"
            raise ModelError(f"there is no adapter in {config.adapter}\n    fix: {fix}")
        return Path(config.adapter)
    folder = Path(str(config.model))
    if record.weights(folder) and not (folder / "config.json").is_file():
        raise ModelError(f"{folder} is a run, not a model\n    fix: run={folder}")
    return folder


def _load(config: GenerateConfig, folder: Path) -> tuple[Any, Template, Card | None]:
    """Load the model, with its adapter, and the template and the card of its training."""
    from sft.data.template import Template
    from sft.inference.card import read_card
    from sft.model.base import load_frozen
    from sft.model.tokenizer import load_tokenizer

    here = ModelConfig(
        name_or_path=config.model or str(folder.resolve()),
        trust_remote_code=config.trust_remote_code,
    )
    card = read_card(folder)
    with named_by("model" if config.model else "base"):
        tokenizer = load_tokenizer(here)
        if (folder / ADAPTER_SETTINGS).is_file():
            model = _adapted(config, folder)
        else:
            model = load_frozen(here, QuantizationConfig())
    chat = TemplateConfig(name="chat", kind="chat", prompts=["{prompt}"], completions=["{answer}"])
    plain = TemplateConfig(name="plain", prompts=["{prompt}"], completions=["{answer}"])
    fallback = chat if tokenizer.chat_template else plain
    return model, Template(card.template if card else fallback, tokenizer), card


def _adapted(config: GenerateConfig, folder: Path) -> Any:
    """Load the base and the adapter; what a merge refuses is refused, before any weight loads."""
    from sft.inference.stops import generation_of
    from sft.merge.adapter_files import is_lora
    from sft.merge.attach import attach, convert_saved, resize_embedding
    from sft.merge.placeholders import with_placeholders
    from sft.merge.sources import check_base, find
    from sft.model.base import load_architecture, load_frozen

    found = find([folder], [1.0], config.base, config.trust_remote_code, merging=False)
    if config.check_base:
        check_base(found)
    generation = generation_of(folder)
    if is_lora(found.configs[0]):  # some other kinds compute with the base's weights
        architecture = load_architecture(found.base)
        resize_embedding(architecture, found.shapes, found.configs)
        attach(with_placeholders(architecture), [folder], found.configs)
    model = load_frozen(found.base, found.quantization)
    model.generation_config = generation or model.generation_config
    resize_embedding(model, found.shapes, found.configs)
    adapted = attach(model, [folder], found.configs, str(model.device), loaded=True).eval()
    convert_saved(adapted)
    return adapted


def _rows(config: GenerateConfig, template: Template) -> list[dict[str, Any]]:
    if config.prompt is not None:
        return [{"prompt": config.prompt} if config.raw else template.prompt_row(config.prompt)]
    from sft.inference.prompts import rows_of

    rows = []
    for row in rows_of(str(config.file), "file"):
        if config.raw and not isinstance(row.values.get("prompt"), str):
            rule = "has no text in the column prompt"
            raise DataError(f"{row.file}:{row.line}: {rule}\n    fix: add one, or raw=false")
        rows.append(row.values)
    if not rows:
        raise DataError(f"{config.file} holds no rows\n    fix: file=FILE with at least one row")
    return rows


main = Command(
    name="generate",
    schema=GenerateConfig,
    run=generate,
    check=check,
    summary="answer prompts with an adapter, a merged model or any model",
    examples=(
        "python -m sft.generate run=outputs/NAME prompt='Spell cat backwards.'",
        "python -m sft.generate model=outputs/NAME/merged file=rows.jsonl output=answers.jsonl",
    ),
)

if __name__ == "__main__":
    main()
