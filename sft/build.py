"""The parts that a run is put together from: collator, TRL's arguments, trainer."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sft import environment, zero
from sft.config import Config
from sft.process import world_size

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import SFTConfig

    from sft.data.collator import Collator
    from sft.data.prepare import Prepared
    from sft.trainer import Trainer

logger = logging.getLogger("sft")


def make_collator(
    config: Config,
    architecture: PreTrainedModel,
    precision: str,
    tokenizer: Any,
    prepared: Prepared,
) -> tuple[Collator, str | None]:
    """Decide how samples become a batch, and which attention kernel sees it."""
    from sft.data.collator import Collator
    from sft.fast import attention

    asked, joined = config.model.attn_implementation, config.train.padding_free
    packed = "seq_lengths" in prepared.train.dataset.column_names
    if joined == "auto":
        joined = attention.can_join(architecture, asked, precision)
    kernel = attention.choose(architecture, asked, packed or joined)
    if joined:
        reason = "rows are joined without padding"
    elif kernel == asked:
        reason = "as asked"
    else:
        reason = f"samples are {'packed' if packed else 'padded'}"
    logger.info("attention %s: %s", kernel or "of the architecture", reason)
    collator = Collator(
        tokenizer.pad_token_id,
        padding_free=joined or (packed and kernel in attention.FLASH),
        pad_to_multiple_of=config.train.pad_to_multiple_of,
        documents=kernel == attention.NAME,
    )
    return collator, kernel


def sft_config(
    config: Config,
    precision: str,
    ds_config: dict[str, Any] | None,
    recomputes: bool,
    evaluates: bool,
) -> SFTConfig:
    """Map the train section onto TRL's class by name, and start the process group.

    Raises:
        ConfigError: A combination that only TRL or Transformers knows to be wrong.
    """
    import dataclasses

    import torch
    from transformers.utils import is_torch_tf32_available
    from trl import SFTConfig

    from sft.errors import ConfigError, Problem
    from sft.fast import zero3

    fields = dataclasses.asdict(config.train)
    extra, global_batch = fields.pop("extra"), fields.pop("global_batch_size")
    for name in ("padding_free", "pad_to_multiple_of", "on_nan", "max_loss_jump", "merge"):  # ours
        del fields[name]
    fields["gradient_checkpointing"] = recomputes
    micro = fields["per_device_train_batch_size"]
    if not evaluates:
        fields["eval_strategy"], fields["eval_steps"] = "no", None
    environment.rejoin()
    try:
        args = SFTConfig(
            **fields,
            output_dir=config.output_dir,
            run_name=config.run_name,
            seed=config.seed,
            gradient_accumulation_steps=global_batch // (micro * world_size()),
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=not torch.cuda.is_available(),
            deepspeed=ds_config,
            eval_on_start=evaluates,
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=None,
            disable_tqdm=True,
            **{
                "ddp_find_unused_parameters": False,
                # Which checkpoint is the best, so that it is kept.
                **({"metric_for_best_model": "eval_loss"} if evaluates else {}),
                "logging_nan_inf_filter": False,  # a NaN must show in the logged loss
                # Together: a batch is on its way to the GPU while the one before is computed.
                "dataloader_pin_memory": torch.cuda.is_available(),
                "accelerator_config": {"non_blocking": torch.cuda.is_available()},
                # What is left in float32 beside 16 bits; asked for, fp32 is float32.
                "tf32": True if precision != "fp32" and is_torch_tf32_available() else None,
                "log_level_replica": "error",
                **extra,
            },
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(
            [Problem("train", str(error).strip().splitlines()[0], "mend the setting it names")]
        ) from error
    if ds_config is not None:
        import deepspeed

        # Of all ops, it would look for one to share memory in inference, and compile that for a
        # minute on a new machine.
        deepspeed.ops.__compatible_ops__ = {}
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend)
        if zero.stage(ds_config) == 3:
            zero3.learn_each_way()
    return args


def make_trainer(
    base: Any,
    args: SFTConfig,
    prepared: Prepared,
    collator: Collator,
    tokenizer: Any,
    lora: Any,
) -> Trainer:
    """Put the adapter on the base model, and both into the trainer."""
    from sft.trainer import Trainer

    trainer = Trainer(
        model=base,
        args=args,
        data_collator=collator,
        train_dataset=prepared.train.dataset,
        eval_dataset=None if prepared.eval is None else prepared.eval.dataset,
        processing_class=tokenizer,
        peft_config=lora,
    )
    if args.deepspeed is None and not getattr(base, "is_quantized", False):
        # PEFT keeps LoRA in float32, and modules_to_save in the base's precision, in which AdamW
        # would lose small updates. DeepSpeed has float32 masters of its own.
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return trainer
