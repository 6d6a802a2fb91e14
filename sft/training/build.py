"""Builds the parts of a run: collator, TRL's arguments, trainer."""

from __future__ import annotations

import contextlib
import dataclasses
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import environment
from sft.attributes import replaced
from sft.config import evaluation, zero
from sft.config.rules import named
from sft.config.settings import Config, TrainConfig
from sft.process import world_size

if TYPE_CHECKING:
    from trl import SFTConfig

    from sft.data.collator import Collator
    from sft.data.prepared import Prepared
    from sft.errors import Problem
    from sft.plan.choices import Choices
    from sft.training.timed import TimedTrainer


def require(config: Config) -> None:
    """Check what only the libraries know of settings, before anything is loaded.

    Raises:
        ConfigError: A setting needs a GPU, or DeepSpeed refuses a value of its JSON.
    """
    import torch

    from sft.errors import ConfigError, Problem

    problems = list(_deepspeed_problems(config))
    name = "train.extra.activation_offloading"
    if config.train.extra.get("activation_offloading") and not torch.cuda.is_available():
        rule = "moves activations from a GPU to the CPU's memory, and this machine has no GPU"
        fix = f"train.gradient_checkpointing=true, without {name}"
        problems.append(Problem(f"{name}=true", rule, fix))
    if problems:
        raise ConfigError(problems)


def _deepspeed_problems(config: Config) -> Iterator[Problem]:
    """Find the values of a DeepSpeed JSON that DeepSpeed refuses; it reads a part of the keys."""
    ds_config = zero.read(config.zero)
    if ds_config is None:
        return
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    from sft.errors import Problem

    file = Path(str(config.zero.config)).name
    sections = {"bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config}
    for name, kind in {"zero_optimization": DeepSpeedZeroConfig, **sections}.items():
        try:
            kind(**ds_config.get(name, {}))
        except ValidationError as error:
            for item in error.errors():
                key = ".".join((name, *map(str, item["loc"])))
                value = f"={item['input']}" if item["loc"] else ""
                yield Problem(f"{file}: {key}{value}", item["msg"], f"zero.overrides.{key}=null")


def make_collator(config: Config, choices: Choices, tokenizer: Any) -> Collator:
    """Build the collator, which joins or pads samples into a batch."""
    from sft.data.collator import Collator
    from sft.fast import attention

    kernel = choices.attention.value
    return Collator(
        tokenizer.pad_token_id,
        padding_free=choices.padding_free.value or (choices.packed and attention.is_flash(kernel)),
        pad_to_multiple_of=config.train.pad_to_multiple_of,
        documents=kernel == attention.NAME or choices.boundaries,
    )


def sft_config(config: Config, choices: Choices) -> SFTConfig:
    """Map the train section onto TRL's class by name, and start the process group.

    Raises:
        ConfigError: TRL or Transformers refuses a combination of settings.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from trl import SFTConfig

    from sft.errors import ConfigError, Problem

    train, precision = dataclasses.asdict(config.train), choices.precision.value
    per_forward = train["per_device_train_batch_size"] * world_size()
    held_out = evaluation.held_out(config.dataset)
    environment.rejoin()
    try:
        args = SFTConfig(
            **_fields(train, choices),
            output_dir=config.output_dir,
            run_name=config.run_name,
            seed=config.seed,
            gradient_accumulation_steps=train["global_batch_size"] // per_forward,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            use_cpu=not torch.cuda.is_available(),
            deepspeed=choices.ds_config,
            eval_on_start=choices.evaluates,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,  # the collator takes what it needs: TRL drops the weights
            max_length=None,
            disable_tqdm=True,
            **{
                "ddp_find_unused_parameters": False,
                # For train.lr_scheduler_type=reduce_lr_on_plateau. sft.training.best judges.
                **({"metric_for_best_model": f"{held_out[0]}_loss"} if choices.evaluates else {}),
                "logging_nan_inf_filter": False,  # a NaN must show in the logged loss
                # With non_blocking below: a batch is copied to the GPU while the previous one is
                # computed.
                "dataloader_pin_memory": torch.cuda.is_available(),
                "accelerator_config": {"non_blocking": torch.cuda.is_available()},
                "tf32": choices.tf32.value,
                "log_level_replica": "error",
                **_floats(train["extra"]),
                # TRL would add a loss that the architecture lacks.
                **({} if choices.balances else {"router_aux_loss_coef": 0.0}),
            },
        )
    except (TypeError, ValueError, StrictDataclassError) as error:
        lines = str(error).strip().splitlines()
        raise ConfigError(
            [Problem("train", " ".join(lines[:2]), "correct the setting named here")]
        ) from error
    if choices.ds_config is not None:
        _start_deepspeed(choices.stage)
    return args


def _fields(train: dict[str, Any], choices: Choices) -> dict[str, Any]:
    """Return the fields of SFTConfig that are settings of the section, with the values chosen."""
    fields = {name: train[name] for name in sorted(named(TrainConfig, ours=False))}
    fields["gradient_checkpointing"] = choices.checkpointing.value
    if choices.warmup is not None:
        fields["warmup_steps"] = choices.warmup.value
    if not choices.evaluates:
        fields |= {"eval_strategy": "no", "eval_steps": None}
    return fields | choices.intervals


def _floats(extra: dict[str, Any]) -> dict[str, Any]:
    """Turn whole numbers into floats where SFTConfig declares a float and refuses an int."""
    from trl import SFTConfig

    hints = typing.get_type_hints(SFTConfig)
    return {
        name: float(value)
        if type(value) is int and {float, int} & set(_kinds(hints.get(name))) == {float}
        else value
        for name, value in extra.items()
    }


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) or (hint,)


def _start_deepspeed(stage: int) -> None:
    """Start DeepSpeed's process group."""
    import deepspeed
    import torch

    from sft.fast import zero3

    # init_distributed would look up its shared-memory op for inference in this table, and compile
    # it for a minute on a new machine.
    deepspeed.ops.__compatible_ops__ = {}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    deepspeed.init_distributed(dist_backend=backend)
    if stage == 3:
        zero3.learn_each_way()


@contextlib.contextmanager
def _initial_values() -> Iterator[dict[Any, Any]]:
    """Keep the values of the parameters that PEFT adds, as it made them.

    TRL rounds those on a quantised base to bfloat16.
    """
    from trl.trainer import sft_trainer

    initial: dict[Any, Any] = {}
    make = sft_trainer.get_peft_model

    def make_and_keep(*args: Any, **kwargs: Any) -> Any:
        model = make(*args, **kwargs)
        initial.update((p, p.data) for p in model.parameters() if p.requires_grad)
        return model

    with replaced(sft_trainer, {"get_peft_model": make_and_keep}):
        yield initial


def make_trainer(
    base: Any,
    args: SFTConfig,
    choices: Choices,
    prepared: Prepared,
    collator: Collator,
    tokenizer: Any,
    lora: Any,
) -> TimedTrainer:
    """Build the trainer with the base model and the adapter, and install the chosen fast layers."""
    from sft.fast import linear, rows
    from sft.fast import lora as fast_lora
    from sft.training import left_out
    from sft.training.timed import TimedTrainer

    if choices.stage == 3:
        rows.values_of_base()
    held_out = {name: samples.dataset for name, samples in prepared.held_out.items()}
    with warnings.catch_warnings(), _initial_values() as initial:
        # PEFT writes patterns for stacked experts, and compares them with modules only.
        # model.adapter_checks checks the patterns that are set.
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys")
        trainer = TimedTrainer(
            model=base,
            args=args,
            data_collator=collator,
            train_dataset=prepared.train.dataset,
            eval_dataset=next(iter(held_out.values()), None),  # the main held-out rows
            processing_class=tokenizer,
            peft_config=lora,
        )
    trainer.held_out = held_out
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            value = initial.get(parameter, parameter.data)
            # PEFT keeps LoRA in float32, and modules_to_save in the base's precision, in which
            # AdamW would lose small updates. DeepSpeed keeps its own float32 copies.
            parameter.data = value if args.deepspeed is not None else value.float()
    rows.install(trainer.model, choices.stage == 3)
    trainer.use_head(choices.lm_head.value)
    if choices.frozen_linear.value == "packed":
        linear.install(trainer.model)
    if choices.fused_adapters:
        fast_lora.install(trainer.model)
    if choices.stage < 3:
        left_out.leave_out(trainer, prepared)
    return trainer
