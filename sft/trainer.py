"""TRL's SFTTrainer with what it lacks: our head, an exact evaluation, exact checkpoints."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from trl import SFTTrainer

from sft import checkpoint, counts, sharded, state, streams, weights, zero
from sft.data.sampler import Fillers, Shuffle, eval_batches, samples_of
from sft.fast import head
from sft.guard import Guard
from sft.optimizer import Optimizer
from sft.rank_zero import RankZero
from sft.save import save
from sft.signals import end_with_rank


class Trainer(SFTTrainer):  # type: ignore[misc]
    """Trains on samples that have ``input_ids`` and ``labels`` already."""

    control: Any
    _total_train_tokens: int
    lm_head = "trl"
    guard: Guard | None = None
    _saved_counts: list[dict[str, Any]] | None = None  # by rank, of the checkpoint resumed from
    _updates = 0  # steps of this process that changed the weights
    _saved: int | None = None  # the step of the newest checkpoint

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.counts = counts.RunningMetrics()

    @property
    def bare_model(self) -> Any:
        """The model without what is wrapped around it: DDP, DeepSpeed, torch.compile."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)

    @property
    def _skips_nan(self) -> bool:
        """Whether a step whose loss or gradient is not finite is left out (train.on_nan=skip)."""
        return self.guard is not None and self.guard.on_nan == "skip"

    def use_head(self, kind: str) -> None:
        """Compute the loss with this head: ``chunked``, ``trl`` or ``plain``."""
        self.lm_head = kind
        if not self.aux_loss_enabled:
            peft = isinstance(self.model, PeftModel)
            head.install(self.model.get_base_model() if peft else self.model, kind)
            self.data_collator.loss_positions = True

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Give the mean loss over the trained tokens of all ranks and micro-batches of a step.

        Entropy and token accuracy are computed for the steps that are logged, and summed over the
        ranks then; the stock method does both in every micro-batch.
        """
        if self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.counts.see(inputs)
        step = self.state.global_step + 1
        logs = step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)
        output = model(
            **inputs,
            use_cache=False,
            fused_lm_head=True,
            head_dft=self.args.loss_type == "dft",
            head_metrics=logs,
        )
        if logs:
            self.counts.add(output)
        if num_items_in_batch is None:
            return output.loss / output.label_mask.sum().clamp(min=1)
        # The tokens of every rank are counted, and DDP takes the mean of the ranks' gradients.
        loss = output.loss / torch.as_tensor(num_items_in_batch).clamp(min=1)
        return loss * self.accelerator.num_processes

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Keep the loss of every micro-batch, for the guard to look at."""
        loss = super().training_step(*args, **kwargs)
        if self.guard is not None:
            self.guard.losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Keep the norm for the guard, and make no update of gradients that are not finite.

        DeepSpeed decides for itself: see ``_prepare_for_training``.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.guard is not None:
            self.guard.norm = norm
        if self._skips_nan and not self.is_deepspeed_enabled:
            # What the Trainer asks before it moves the schedule on.
            self.optimizer._is_overflow = not math.isfinite(norm)
            if self.optimizer._is_overflow:
                model.zero_grad(set_to_none=True)
        if self._get_learning_rate() > 0 and not self.accelerator.optimizer_step_was_skipped:
            self._updates += 1
        return norm

    def _kept_counts(self) -> dict[str, Any]:
        """Return what this rank has summed and counted since the last logged line, as JSON values.

        ``resume_counts`` goes on from it.
        """
        assert self.guard is not None
        return {
            "loss": self._tr_loss.item(),
            "logged_at": self._globalstep_last_logged,
            **self.counts.kept(),
            "all_tokens": self._total_train_tokens,
            "metrics": {key: list(values) for key, values in self._metrics["train"].items()},
            **self.guard.kept(),
        }

    def resume_counts(self) -> None:
        """Go on summing and counting from a checkpoint, once the Trainer has set both to zero."""
        if self._saved_counts is None:
            return
        # The checkpoint's state has the intervals of the command that saved it.
        self.state.compute_steps(self.args, self.state.max_steps)
        own = counts.share_of(self._saved_counts, self.args.process_index, self.args.world_size)
        self._tr_loss = torch.tensor(own["loss"], device=self.args.device)
        self._globalstep_last_logged = own["logged_at"]
        self._total_train_tokens = own["all_tokens"]
        self._metrics["train"].update(own["metrics"])
        self.counts.restore(own, self.args.device)
        if self.guard is not None:
            self.guard.restore(own)

    def evaluate_if_due(self) -> None:
        """Make up for the evaluation of the step that a run was cut off after."""
        step, epoch = self.state.global_step, self.state.epoch or 0.0
        last = step >= self.state.max_steps  # after which the Trainer evaluates in any case
        due = {
            "steps": (last or step % self.state.eval_steps == 0) and step >= self.args.eval_delay,
            "epoch": (last or float(epoch).is_integer()) and epoch >= self.args.eval_delay,
        }.get(self.args.eval_strategy, False)
        done = any(log["step"] == step for log in self.state.log_history if "eval_loss" in log)
        if due and not done:
            self._determine_best_metric(self._evaluate(None, None), None)

    def rows_of(self, step: int, micro_batches: Sequence[int]) -> list[int]:
        """Give the numbers of the data's rows that this rank saw in micro-batches of a step."""
        samples = samples_of(
            step,
            micro_batches,
            count=len(self.train_dataset),
            seed=self.args.seed,
            micro=self._train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            rank=self.args.process_index,
            ranks=self.args.world_size,
        )
        if "rows" not in self.train_dataset.column_names:
            return samples
        return [row for sample in samples for row in self.train_dataset[sample]["rows"]]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was summed for this line."""
        if "loss" in logs:
            found = self.counts.flush(self._total_train_tokens)
            if found:
                self._total_train_tokens = found["num_tokens"]
            self._metrics["train"] |= {name: [value] for name, value in found.items()}
            # The Trainer subtracts it from itself, which leaves a NaN one.
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the mean loss over every trained token of the held-out samples.

        Each sample counts once and each token alike, so the figure is the same for any batch size
        and number of ranks. The stock Trainer's is a mean of batch means, over samples that are
        repeated to fill the last batch. The model is used as training wrapped it: the stock loop,
        called before training, would leave DDP's gradient sync switched off.

        Returns:
            ``eval_loss`` (nats per token), ``eval_perplexity``, ``eval_tokens``, ``eval_seconds``.
        """
        samples = self.eval_dataset if eval_dataset is None else eval_dataset
        began = time.perf_counter()
        # float64, so that the sum does not depend on the order of the batches.
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        model = self.model_wrapped
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in eval_batches(
                samples,
                self.args.per_device_eval_batch_size,
                self.args.process_index,
                self.args.world_size,
            ):
                self._stop_if_asked()
                inputs = self._prepare_inputs(self.data_collator(batch))
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
                total[0] -= outputs.log_probs.double().sum()
                total[1] += outputs.label_mask.sum()
        if dist.is_initialized():
            dist.all_reduce(total)
        model.train(was_training)

        loss = (total[0] / total[1]).item()
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),  # exp(710) overflows
            f"{metric_key_prefix}_tokens": int(total[1].item()),
            f"{metric_key_prefix}_seconds": round(time.perf_counter() - began, 3),
        }
        # Not self.log: TRL's adds averages over whatever was last kept.
        super(SFTTrainer, self).log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def get_train_dataloader(self) -> Any:
        """Give every sample once an epoch, on any number of ranks, in an order of the seed alone.

        Sample k of an epoch's order is in step k // global_batch_size, whatever the ranks and the
        micro-batch. The stock sampler repeats samples until the last batch is full.
        """

        def order(dataset: Fillers) -> Shuffle:
            self._order = Shuffle(dataset, self.args.seed)
            return self._order

        fillers = Fillers(
            self.train_dataset,
            self._train_batch_size * self.args.world_size,
            self.data_collator.pad_token_id,
        )
        loader = self._get_dataloader(
            dataset=fillers,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=order,
            is_training=True,
        )
        inner = loader.base_dataloader  # which Accelerate wraps
        # Workers are seeded from it when an epoch begins. The global generator, which dropout
        # draws from, would be drawn from once more by a run that is resumed.
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        inner.worker_init_fn = functools.partial(end_with_rank, inner.worker_init_fn)
        return loader

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        """Choose the epoch's order, and train no step where the checkpoint is of the last one.

        The Trainer and Accelerate hand the epoch on from wrapper to wrapper, and the wrapper that
        skips the batches before a checkpoint does not reach the sampler of several ranks: the rest
        of the epoch would be read in the first epoch's order.
        """
        self._order.set_epoch(epoch)
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(epoch=epoch, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: run.json and config.yaml say more, and are true."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save the weights, and all that makes the next step the same step; or raise on all ranks.

        Raises:
            CheckpointError: It cannot be written; the one before is untouched.
            Stopped: A signal asked for it.
        """
        step, args = self.state.global_step, self.args
        assert self.guard is not None
        self.guard.settle()
        if self._saved != step:
            path = checkpoint.path_of(args.output_dir, step)
            best = self.state.best_global_step
            if best and (best == step or checkpoint.path_of(args.output_dir, best).is_dir()):
                self.state.best_model_checkpoint = str(checkpoint.path_of(args.output_dir, best))
            self.store_flos()
            save(
                path,
                self._write_weights,
                self._live(),
                self._kept_counts(),
                self.state,
                {"step": step, "ranks": args.world_size, "stage": zero.stage(args.deepspeed)},
                args.save_total_limit,
            )
            self._saved = step
        if self.control.should_training_stop and step < self.state.max_steps:
            self.guard.stop(step)

    def _stop_if_asked(self) -> None:
        """In the middle of an evaluation: it is begun anew when the run goes on.

        Raises:
            Stopped: A signal asked for it.
        """
        if self.guard is not None and self.guard.asked():
            if self.state.global_step:
                self._save_checkpoint(None, None)
            self.guard.stop(self.state.global_step)

    def write_model(self, folder: Path) -> None:
        """Write the trained weights and the tokenizer under their final name, or raise.

        Raises:
            CheckpointError: They cannot be written, or are not what was trained.
        """
        with RankZero(folder) as main:
            partial = main.do(checkpoint.begin, folder)
            self._write_weights(main, partial)
            main.do(checkpoint.finish, partial, folder)

    def _write_weights(self, main: RankZero, folder: Path) -> None:
        model = self.bare_model
        found = weights.gathered(model, lambda: self.accelerator.get_state_dict(self.deepspeed))
        tokenizer, updated = self.processing_class, self._updates > 0
        main.do(weights.write, model, tokenizer, folder, found, updated)

    def _live(self) -> state.Live:
        """Return what a checkpoint keeps beside the weights and the counts."""
        return state.Live(
            Optimizer(self.optimizer, self.bare_model),
            self.lr_scheduler,
            getattr(self.accelerator, "scaler", None),
            str(self.args.optim.value),
        )

    def held_bytes(self) -> dict[str, int]:
        """Count the bytes of parameters and of optimizer state that this rank holds."""
        parameters = sum(sharded.share_of(p).nbytes for p in self.model.parameters())
        optimizer = Optimizer(self.optimizer, self.bare_model)
        return {"parameter_bytes": parameters, "optimizer_bytes": optimizer.held_bytes()}

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Put back what a checkpoint of ours holds: it has none of the stock one's files."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self._skips_nan and hasattr(self.optimizer.optimizer, "check_grad_overflow"):
            self.optimizer.optimizer.check_grad_overflow = True
        if resume_from_checkpoint is not None:
            self._saved_counts = state.restore(self._live(), Path(resume_from_checkpoint))
            self._saved = checkpoint.step_of(Path(resume_from_checkpoint))
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load nothing yet: the weights come back with the rest, once the model is wrapped."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            streams.restore_random_streams(Path(checkpoint), self.args.seed)
