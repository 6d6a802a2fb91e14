"""Turn rows into samples on disk: once for all ranks, in parallel, cached by content."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable
from pathlib import Path

from sft import environment
from sft.config.paths import PACKAGE_DIR
from sft.config.rules import named
from sft.config.settings import DatasetConfig, packing_of
from sft.data import artefact, sources
from sft.data.audit import Counts, gate
from sft.data.blocks import weighted, write_blocks
from sft.data.prepared import INVENTORY, Prepared, Samples, damage, tokenizer_hash
from sft.data.splits import Split, parts_of
from sft.data.store import Dropped, encoded
from sft.data.template import Template
from sft.errors import few
from sft.files import cache_dir, inventory, new_folder, require_writable, write_text

logger = logging.getLogger("sft")


def prepare(
    config: DatasetConfig,
    template: Template,
    seed: int,
    samples: int | None = None,
    show: Callable[[dict[str, Counts], DatasetConfig], None] | None = None,
) -> Prepared:
    """Tokenise, pack and audit the data, or load the cached result.

    Call it before a process group exists: one process per machine does the work, and the others
    wait for its file lock, which has no timeout.

    Args:
        config: The dataset section.
        template: Renders the rows and decides what is trained.
        seed: Seed of the held-out rows and of the random choices in a mix.
        samples: With ``dataset.streaming``, the samples that the run takes; no more are read.
        show: Called with the counts before the checks may stop the run.

    Raises:
        DataError: The data cannot be read, or a check stops the run.
    """
    prepared = artefact.load(config, template.tokenizer)
    if prepared is None:
        packing = packing_of(config, template.config.kind).value
        packed = dataclasses.replace(config, packing=packing)
        given = sources.of(config, seed)
        with environment.heap_frozen(collect_new=True):
            prepared = _cached(packed, given, template, seed, samples)
        for source in given:
            where = source.location
            prepared.parts[source.part].count_files(where)
            if where.unexpected:
                logger.info(
                    "warning: %d files of %s have unknown endings and are not read: %s",
                    len(where.unexpected),
                    where.path,
                    few(where.unexpected),
                )
        if samples and prepared.train.counts.samples < samples:
            logger.info(
                "warning: with dataset.streaming the source ended after %s samples; the run takes "
                "%s, so it repeats some of them",
                f"{prepared.train.counts.samples:,}",
                f"{samples:,}",
            )
    if show is not None:
        show(prepared.parts, config)
    for warning in gate(prepared.parts, config, str(prepared.folder / "dropped.jsonl")):
        logger.info("warning: %s", warning)
    return prepared


def _cached(
    config: DatasetConfig,
    given: list[sources.Source],
    template: Template,
    seed: int,
    samples: int | None,
) -> Prepared:
    from filelock import FileLock, Timeout

    from sft.ranks import from_rank_zero

    tokenizer = tokenizer_hash(template.tokenizer)
    key = _key(config, given, template, seed, samples, tokenizer)
    folder = cache_dir() / "data" / key
    require_writable(folder.parent)
    lock = FileLock(f"{folder}.lock")  # the kernel releases it when its owner dies

    def take() -> None:
        with contextlib.suppress(Timeout):  # the rank of a different run has it
            lock.acquire(blocking=False)

    try:
        from_rank_zero(take)  # rank 0 comes first: it is the one that shows its progress
        if damage(folder) is not None:
            with lock:
                if reason := damage(folder):  # a different rank may have made it meanwhile
                    if folder.exists():
                        logger.info("the prepared data in %s is made again: %s", folder, reason)
                    with new_folder(folder) as partial:
                        _make(config, given, template, seed, samples, partial, tokenizer)
    finally:
        lock.release(force=True)
    from datasets import Dataset

    audit = json.loads((folder / "data.json").read_text(encoding="utf-8"))
    parts = {
        name: Samples(Dataset.from_file(str(folder / f"{name}.arrow")), Counts(**counts))
        for name, counts in audit["parts"].items()
    }
    return Prepared.of(parts, folder)


def _key(
    config: DatasetConfig,
    given: list[sources.Source],
    template: Template,
    seed: int,
    samples: int | None,
    tokenizer: str,
) -> str:
    """Hash what the samples are made from: data, tokenizer, template, settings and our own code."""
    code = hashlib.sha256()
    for path in sorted((PACKAGE_DIR / "data").glob("*.py")):
        code.update(path.read_bytes())
    settings = dataclasses.asdict(config)
    uses_seed = config.eval_fraction or config.mix or config.streaming or config.order == "random"
    chat = template.chat is not None
    ingredients = {
        "code": code.hexdigest(),
        "sources": [source.fingerprint() for source in given],
        "samples": samples,
        "settings": {key: settings[key] for key in sorted(named(DatasetConfig, in_data_key=True))},
        "template": dataclasses.asdict(template.config),
        "chat_template": template.tokenizer.chat_template if chat else None,
        "tokenizer": tokenizer,
        "seed": seed if uses_seed else None,
    }
    text = json.dumps(ingredients, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _make(
    config: DatasetConfig,
    given: list[sources.Source],
    template: Template,
    seed: int,
    samples: int | None,
    folder: Path,
    tokenizer: str,
) -> None:
    """Write every part to a folder; the inventory of its files is written last."""
    with (folder / "dropped.jsonl").open("w", encoding="utf-8") as file:
        dropped = Dropped(file)
        store = encoded(given, template, config, folder, dropped, samples)
        found = parts_of(store, given, config, seed)
        parts: dict[str, Counts] = {}
        for name, documents in found.items():
            split = Split(name, store, documents, config, template, dropped)
            split.count_read([source for source in given if source.part == name])
            plan = split.planned(seed)
            if name == "train" and config.mix and not config.streaming:
                plan = weighted(plan, store, given, seed)
            write_blocks(folder / f"{name}.arrow", store, plan, split)
            split.require_something()
            if name != "train":
                split.compare(store.documents[found["train"]])
            parts[name] = split.counts
    for path in folder.glob("*.bin"):
        path.unlink()
    meta = {
        "tokenizer": tokenizer,
        "settings": dataclasses.asdict(config),
        "template": dataclasses.asdict(template.config),
        "parts": {name: dataclasses.asdict(counts) for name, counts in parts.items()},
    }
    write_text(folder / "data.json", json.dumps(meta, indent=2) + "\n")
    write_text(folder / INVENTORY, json.dumps(inventory(folder), indent=2) + "\n")
