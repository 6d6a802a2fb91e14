"""The settings of the sections train, zero and resume: how a run trains and goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.config.rules import Rule, above, at_least, between, one_of, setting

# As in Transformers.
STEPS = Rule(
    "must be a whole number of steps of at least 1, or a fraction of all steps below 1",
    lambda value: value > 0 and (value < 1 or value == int(value)),
)


@dataclass
class TrainConfig:
    """Batch, training length, optimizer, evaluation and saving. Most names are SFTConfig's."""

    global_batch_size: int = setting(
        32,
        "sequences per optimizer step, over all ranks and gradient accumulation",
        at_least(1),
        ours=True,
        decides=("train.gradient_accumulation_steps",),
    )
    per_device_train_batch_size: int = setting(
        4,
        "micro-batch: sequences per rank and forward pass",
        at_least(1),
        changes_training=False,
        decides=("train.auto_find_batch_size",),
    )
    per_device_eval_batch_size: int = setting(
        8,
        "sequences per rank and forward pass in evaluation",
        at_least(1),
        changes_training=False,
    )
    num_train_epochs: float = setting(3.0, "passes over the training data", above(0))
    max_steps: int = setting(
        -1, "number of optimizer steps; -1: num_train_epochs decides", at_least(-1), null=-1
    )
    learning_rate: float = setting(
        2e-4,
        "peak learning rate; about 2e-4 for LoRA, 2e-5 for full fine-tuning",
        above(0),
    )
    loraplus_lr_ratio: float | None = setting(
        None,
        "LoRA+: the learning rate of the adapter's B matrices, and of trained vectors such as "
        "biases and DoRA's magnitudes, divided by train.learning_rate; null: all have that",
        above(0),
        ours=True,
    )
    embedding_learning_rate: float | None = setting(
        None,
        "learning rate of trained embeddings, of adapters on them, and of LM heads; null: "
        "train.learning_rate",
        above(0),
        ours=True,
    )
    lr_scheduler_type: str = setting(
        "cosine", "learning rate schedule: linear, cosine, cosine_with_min_lr, constant, ..."
    )
    lr_scheduler_kwargs: dict[str, Any] = setting(
        {}, "arguments of the learning rate schedule, such as {min_lr_rate: 0.1}"
    )
    warmup_steps: float = setting(
        0.03,
        "number of warm-up steps; below 1: a fraction of all steps",
        at_least(0),
        null=0.0,
    )
    weight_decay: float = setting(0.0, "decoupled weight decay of AdamW", at_least(0), null=0.0)
    max_grad_norm: float = setting(
        1.0, "the gradient norm is clipped to this value; 0: no clipping", at_least(0), null=0.0
    )
    optim: str = setting(
        "adamw_torch_fused",
        "optimizer: adamw_torch_fused, adamw_8bit, paged_adamw_8bit, adafactor, ...",
    )
    gradient_checkpointing: Any = setting(
        "auto",
        "true: recompute activations in the backward pass, which saves memory and takes a third "
        "more time; auto: only if activations do not fit into the free memory",
        one_of("auto", True, False),
        changes_training=False,
        decides=("train.activation_checkpointing",),
    )
    logging_steps: int | float = setting(
        10,
        "optimizer steps between logged lines; below 1: a fraction of all steps",
        STEPS,
        changes_training=False,
        decides=("train.logging_strategy",),
    )
    eval_strategy: str = setting(
        "epoch",
        "when to evaluate, besides before and after training",
        one_of("no", "steps", "epoch"),
        changes_training=False,
        decides=("train.eval_on_start",),
    )
    eval_steps: int | float | None = setting(
        None,
        "optimizer steps between evaluations, with eval_strategy=steps; below 1: a fraction of all "
        "steps",
        STEPS,
        changes_training=False,
    )
    evals_per_epoch: int | None = setting(
        None,
        "evaluations per pass over the data, evenly spaced, the last at its end; with "
        "eval_strategy=epoch. null: one",
        at_least(1),
        changes_training=False,
        ours=True,
    )
    save_strategy: str = setting(
        "epoch",
        "when to write a checkpoint",
        one_of("no", "steps", "epoch"),
        changes_training=False,
    )
    save_steps: int | float = setting(
        500,
        "optimizer steps between checkpoints, with save_strategy=steps; below 1: a fraction of all "
        "steps",
        STEPS,
        changes_training=False,
    )
    saves_per_epoch: int | None = setting(
        None,
        "checkpoints per pass over the data, evenly spaced, the last at its end; with "
        "save_strategy=epoch. null: one",
        at_least(1),
        changes_training=False,
        ours=True,
    )
    save_total_limit: int | None = setting(
        2,
        "number of checkpoints to keep: the newest, and the one with the best evaluation, which "
        "stays beside the newest with 1 too; null: all",
        at_least(1),
        changes_training=False,
    )
    metric: str = setting(
        "eval_loss",
        "figure that decides which evaluation is the best and when to stop early: eval_loss, "
        "eval_perplexity, eval_NAME_loss of a set in dataset.eval, exact_match, or the last logged "
        "loss, entropy or mean_token_accuracy",
        changes_training=False,
        ours=True,
        decides=("train.metric_for_best_model",),
    )
    greater_is_better: bool | None = setting(
        None,
        "true: larger values of train.metric are better; null: only of exact_match and "
        "mean_token_accuracy",
        changes_training=False,
        ours=True,
    )
    load_best_model_at_end: bool = setting(
        False,
        "true: the adapter that the run writes is the one with the best train.metric; false: the "
        "last one",
        changes_training=False,
        ours=True,
    )
    early_stopping_patience: int | None = setting(
        None,
        "stop after this many evaluations in a row in which train.metric was not better than in "
        "the best one before; null: never",
        at_least(1),
        ours=True,
    )
    early_stopping_threshold: float | None = setting(
        None,
        "by more than how much train.metric must be better for early_stopping_patience; null: 0",
        at_least(0),
        ours=True,
    )
    max_forgetting: float | None = setting(
        0.05,
        "warn when the loss per byte of a general text is higher after training by more than this "
        "share; null: the text is not evaluated",
        above(0),
        changes_training=False,
        ours=True,
    )
    merge: bool = setting(
        False,
        "true: after training, merge the adapter into full weights and verify them",
        changes_training=False,
        ours=True,
    )
    on_nan: str = setting(
        "stop",
        "what to do when a loss or gradient is not finite. stop: stop the run; skip: leave out the "
        "update of that step",
        one_of("stop", "skip"),
        changes_training=False,
        ours=True,
    )
    max_loss_jump: float | None = setting(
        None,
        "stop the run when the loss of a step is more than this many times the mean of the 20 "
        "previous steps; null: never",
        above(1),
        changes_training=False,
        ours=True,
    )
    padding_free: Any = setting(
        "auto",
        "true: join the rows of a micro-batch into one row instead of padding them; auto: if the "
        "model's attention can keep them apart",
        one_of("auto", True, False),
        changes_training=False,
        ours=True,
    )
    pad_to_multiple_of: int | None = setting(
        None,
        "pad each batch to a length that is a multiple of this number; null: to its longest row",
        between(1, 1 << 16),
        changes_training=False,
        ours=True,
    )
    dataloader_num_workers: int = setting(
        0,
        "processes per rank that prepare batches; 0: the training process does",
        between(0, 1024),
        changes_training=False,
        null=0,
    )
    extra: dict[str, Any] = setting({}, "any other fields of trl.SFTConfig, by name", ours=True)


@dataclass
class ZeroConfig:
    """How DeepSpeed splits the optimizer state, gradients and parameters over ranks."""

    config: str | None = setting(
        None,
        "DeepSpeed configuration: the name of a JSON file in ds_config/, or a path, also of a JSON "
        "for another tool; null: plain DDP without DeepSpeed",
        changes_training=False,
        decides=("train.deepspeed", "train.fsdp", "train.fsdp_config", "train.parallelism_config"),
    )
    overrides: dict[str, Any] = setting(
        {},
        "values that replace those of the JSON file, nested as in it; null removes a key",
        changes_training=False,
    )


@dataclass
class ResumeConfig:
    """How an interrupted run is resumed when the same command is given again."""

    checkpoint: str | None = setting(
        None,
        "checkpoint to resume from, such as checkpoint-40; null: the newest complete one",
        changes_training=False,
        decides=("train.resume_from_checkpoint",),
    )
    allow: list[str] = setting(
        [],
        "what may differ from the run that is resumed: names of settings such as "
        "train.learning_rate, base (the base model), data, or adapter (that of lora.init_from)",
        changes_training=False,
    )
