"""Measure what training has forgotten: the loss on a general text, of the base and afterwards.

The text is the same for every run: ``assets/general/text.txt``, ten passages in the public domain.
Its loss is given in nats per byte, which does not depend on the tokenizer.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sft.config.paths import HOME_DIR
from sft.data.row_encoder import IGNORE_INDEX
from sft.data.text_encoder import Encoder
from sft.merge.adapter_files import restarts
from sft.ranks import gather
from sft.run import record

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.run.run import Run
    from sft.training.trainer import Trainer

logger = logging.getLogger("sft")

TEXT = HOME_DIR / "assets" / "general" / "text.txt"  # 45 KB of ASCII
# The model sees the text in parts of at most this many tokens, and no more than this number of
# parts, evenly spaced: 8,192 tokens, which are most of the text for the tokenizers of large models.
WINDOW, WINDOWS = 256, 32
KEY = "forgetting"  # the entry of run.json


def measure_base(run: Run, trainer: Trainer) -> None:
    """Measure the base model, unless the run did so before it was interrupted.

    An adapter that changed the base's weights when it was made (PiSSA, OLoRA), and a model that is
    trained in full, equal the base only before the first step. In every other run the adapter is
    switched off.
    """
    if run.config.train.max_forgetting is None or _before(run, trainer) is not None:
        return
    model, began = trainer.bare_model, time.perf_counter()
    configs = getattr(model, "peft_config", None)
    switchable = configs is not None and not any(map(restarts, configs.values()))
    if trainer.state.global_step and not switchable:
        logger.info(
            "forgetting is not measured: the base was not measured before the first step, and the "
            "run has no adapter that can be switched off"
        )
        return
    with _without_adapter(model) if switchable else contextlib.nullcontext():
        found = _loss_per_byte(trainer)
    run.note(**{KEY: {"before": found}})
    logger.info(
        "general text: %.4f nats per byte by the base model (%.1f s; "
        "train.max_forgetting=null saves it)",
        found,
        time.perf_counter() - began,
    )


def measure_trained(run: Run, trainer: Trainer) -> None:
    """Measure the trained model, and warn if its loss has risen by over train.max_forgetting."""
    limit = run.config.train.max_forgetting
    before = None if limit is None else _before(run, trainer)
    if before is None or limit is None:
        return
    after = _loss_per_byte(trainer)
    change = after / before - 1
    # Not `>`: of a loss that is not a number, nothing is larger.
    found = {"before": before, "after": after, "change": change, "flagged": not change <= limit}
    run.note(**{KEY: found})
    logger.info("general text: %s", describe(found))
    if found["flagged"]:
        logger.info(
            "warning: the loss on general text has risen by over train.max_forgetting=%g. Less "
            "is forgotten with a smaller train.learning_rate, fewer steps, or general rows in the "
            "data (dataset.mix)",
            limit,
        )


def _before(run: Run, trainer: Trainer) -> float | None:
    """Return the base's loss in run.json; None: it has not been measured."""
    found = record.read(run.dir).get(KEY) if trainer.args.process_index == 0 else None
    before: float | None = gather(found.get("before") if isinstance(found, dict) else None)[0]
    return before


def _loss_per_byte(trainer: Trainer) -> float:
    """Return the model's loss on the general text, in nats per byte, on all ranks together."""
    positions = getattr(
        trainer.bare_model.config.get_text_config(), "max_position_embeddings", None
    )
    size = min(WINDOW, positions or WINDOW)
    samples, count = windows(trainer.processing_class, TEXT.read_text(encoding="ascii"), size)
    # One window at a time: the rows of an evaluation, for which its batch fits, may be shorter.
    nats, _ = trainer.total_loss(samples, 1)
    return nats / count


def describe(found: dict[str, Any]) -> str:
    """Format the entry of run.json as a line."""
    return (
        f"{found['before']:.4f} nats per byte before training, {found['after']:.4f} after "
        f"({found['change']:+.1%})"
    )


def windows(
    tokenizer: PreTrainedTokenizerBase, text: str, size: int
) -> tuple[list[dict[str, Any]], float]:
    """Cut a text into samples, and count the bytes that they score.

    A sample begins with the tokenizer's BOS, if it has one; without it, nothing predicts the first
    token, which is not scored. Unknown tokens are not scored either: they stand for any text.

    Args:
        tokenizer: The tokenizer.
        text: ASCII, so that a character is a byte.
        size: Tokens of a sample, at most.

    Returns:
        At most ``WINDOWS`` samples, and the bytes that their trained tokens stand for. A tokenizer
        that does not say where its tokens end is taken to have tokens of the same length.
    """
    ids, ends = _encoded(tokenizer, text)
    bos = Encoder(tokenizer).bos_ids[: size - 2]
    step = max(size - len(bos), len(ids) / WINDOWS)
    samples, count = [], 0.0
    for number in range(min(WINDOWS, math.ceil(len(ids) / step))):
        start = int(number * step)
        part = ids[start : start + size - len(bos)]
        labels = [token if token != tokenizer.unk_token_id else IGNORE_INDEX for token in part]
        if not bos:
            labels[0] = IGNORE_INDEX
        for place, label in enumerate(labels, start):
            if label != IGNORE_INDEX:
                count += ends[place] - (ends[place - 1] if place else 0)
        samples.append({"input_ids": bos + part, "labels": [IGNORE_INDEX] * len(bos) + labels})
    return samples, count


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[float]]:
    """Return the token ids of a text, and the byte at which each ends."""
    options = {"add_special_tokens": False, "verbose": False}
    if not tokenizer.is_fast:
        ids: list[int] = tokenizer(text, **options)["input_ids"]
        return ids, [len(text) * place / len(ids) for place in range(1, len(ids) + 1)]
    found = tokenizer(text, return_offsets_mapping=True, **options)
    return found["input_ids"], [end for _, end in found["offset_mapping"]]


@contextlib.contextmanager
def _without_adapter(model: Any) -> Iterator[None]:
    """Switch an adapter off; PEFT then freezes its parameters, and afterwards trains all of them.

    Some must stay frozen, such as MiCA's.
    """
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, trains in trained:
            parameter.requires_grad_(trains)
