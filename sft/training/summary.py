"""Prints a summary before training: data, arithmetic of the batch, trained share, a sample."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sft.checkpoint import sharded
from sft.data import audit
from sft.data.prepared import Prepared
from sft.data.preview import marked
from sft.fast.rows import trained_rows
from sft.plan.schedule import planned_steps
from sft.training import experts

if TYPE_CHECKING:
    from sft.config.settings import Config
    from sft.training.trainer import Trainer

logger = logging.getLogger("sft")


def describe_run(config: Config, trainer: Trainer, prepared: Prepared, tokenizer: Any) -> None:
    """Print what will be trained: the batch's arithmetic, the trainable share, one sample."""
    args, counts = trainer.args, prepared.train.counts
    per_epoch, steps = planned_steps(config.train, counts.samples)
    trained, total = parameter_counts(trainer.model)
    micro, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    for line in audit.lines(prepared.parts):
        logger.info("%s", line)
    logger.info(
        "batch: %s per rank x %s ranks x %s accumulation = %s sequences per step; %s samples = "
        "%s steps per epoch; %s steps in total, about %s tokens",
        micro,
        args.world_size,
        accumulation,
        config.train.global_batch_size,
        f"{counts.samples:,}",
        f"{per_epoch:,}",
        f"{steps:,}",
        f"{counts.tokens * steps // per_epoch:,}",
    )
    parts = [experts.describe(trainer.model, config.lora) if config.lora.enabled else ""]
    if rows := sum(sharded.shape_of(value).numel() for value in trained_rows(trainer.model)):
        parts.append(f"{rows:,} of them are rows of single tokens")
    logger.info(
        "parameters: %s of %s are trained (%.2f %%)%s",
        f"{trained:,}",
        f"{total:,}",
        100 * trained / total,
        "".join(f"; {part}" for part in parts if part),
    )
    if trainer.rates is not None and trainer.rates.differ:
        logger.info("learning rates: %s", trainer.rates.describe(trainer.model))
    if config.quantization.load_in_8bit:
        logger.info(
            "quantization.load_in_8bit: bitsandbytes also rounds the inputs of linear layers, "
            "first to float16 (values above 65,504 overflow), then to 8 bits"
        )
    sample = marked(prepared.train.dataset[0], tokenizer)
    if len(sample) > 2000:
        sample = f"{sample[:1000]} [...] {sample[-1000:]}"
    logger.info("first sample; the tokens between the brackets are trained:\n%s", sample)


def parameter_counts(model: Any) -> tuple[int, int]:
    """Count trained and all parameters, by their full shapes under ZeRO-3 and in 4 bits too."""
    trained = total = 0
    for parameter in model.parameters():
        count = sharded.shape_of(parameter).numel()
        state = getattr(parameter, "quant_state", None)
        count = state.shape.numel() if state is not None else count
        total += count
        trained += count if parameter.requires_grad else 0
    return trained, total
