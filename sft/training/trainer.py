"""TRL's trainer with our LM head, exact evaluation, and a data order for any number of ranks."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from trl import SFTTrainer

from sft.data.sampler import Fillers, Shuffle, eval_batches, samples_of
from sft.fast import head
from sft.training.groups import Rates
from sft.training.resumable import ResumableTrainer
from sft.training.signals import end_with_rank


class Trainer(ResumableTrainer):
    """Trains on samples that have ``input_ids`` and ``labels`` already."""

    control: Any
    lm_head = "trl"
    rates: Rates | None = None
    _loader: Any = None  # of the training samples, without what Accelerate wraps around it

    def use_head(self, kind: str) -> None:
        """Compute the loss with this head: ``chunked``, ``trl`` or ``plain``."""
        self.lm_head = kind
        if not self.aux_loss_enabled:
            peft = isinstance(self.model, PeftModel)
            head.install(self.model.get_base_model() if peft else self.model, kind)
            self.data_collator.loss_positions = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Return a step's micro-batches, and the sum of its trained tokens' weights on all ranks.

        Without weights, that is the number of trained tokens, which the stock method counts.
        """
        batches, count = super().get_batch_samples(*args, **kwargs)
        weights = [batch["loss_weights"] for batch in batches if "loss_weights" in batch]
        if weights:
            own = torch.cat(weights).view(torch.float32).double().sum()
            count = self.accelerator.gather(own.to(self.args.device)).sum()
        return batches, count

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the mean loss over the trained tokens of all ranks and micro-batches of a step.

        With weights, it is the sum of weight x loss, divided by the sum of the weights.

        Entropy and token accuracy are computed for the steps that are logged, and summed over the
        ranks then; the stock method does both in every micro-batch.
        """
        if self.aux_loss_enabled:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        self.running_metrics.see(inputs)
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
            self.running_metrics.add(output)
        if num_items_in_batch is None:
            return output.loss / output.label_mask.sum().clamp(min=1)
        # The tokens of every rank are counted, and DDP takes the mean of the ranks' gradients.
        count = torch.as_tensor(num_items_in_batch)
        # A step may have no trained token, and weights a sum below 1.
        loss = output.loss / torch.where(count > 0, count, 1).to(output.loss.dtype)
        return loss * self.accelerator.num_processes

    def create_optimizer(self, model: Any = None) -> Any:
        """Make the optimizer, with groups of parameters where some have rates of their own."""
        if self.rates is not None and self.rates.differ and self.optimizer is None:
            trained = self.model if model is None else model
            kind, arguments = self.get_optimizer_cls_and_kwargs(self.args, trained)
            decayed = set(self.get_decay_parameter_names(trained))
            groups = self.rates.groups(trained, decayed, self.args.weight_decay)
            self.optimizer_cls_and_kwargs = kind, {**arguments, "params": groups}
        made = super().create_optimizer(model)
        # A fused optimizer leaves out a step whose gradients overflowed by itself, and Accelerate
        # would take it for made: the schedule would advance. So the loss scaler leaves it out.
        if self.args.fp16 and hasattr(made, "_step_supports_amp_scaling"):
            made._step_supports_amp_scaling = False
        return made

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Report the loss of every micro-batch to the guard."""
        loss = super().training_step(*args, **kwargs)
        if self.guard is not None:
            self.guard.losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Report the norm to the guard; with train.on_nan=skip, drop gradients that are not finite.

        DeepSpeed drops them itself: see ``_prepare_for_training``.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        if self.guard is not None:
            self.guard.norm = norm
        # With fp16, the loss scaler drops them.
        if self.skips_nan and not (self.is_deepspeed_enabled or self.args.fp16):
            # The Trainer reads this flag before it advances the learning-rate schedule.
            self.optimizer._is_overflow = not math.isfinite(norm)
            if self.optimizer._is_overflow:
                model.zero_grad(set_to_none=True)
        overflowed = self.args.fp16 and not math.isfinite(norm)
        skips = overflowed or self.accelerator.optimizer_step_was_skipped
        if self._get_learning_rate() > 0 and not skips:
            self.updates += 1
        return norm

    def rows_of(self, step: int, micro_batches: Sequence[int]) -> list[int]:
        """Return the numbers of the data's rows that this rank saw in micro-batches of a step."""
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
        nats, tokens = self.total_loss(samples, self.args.per_device_eval_batch_size)
        loss = nats / tokens
        metrics = {
            f"{metric_key_prefix}_loss": loss,
            f"{metric_key_prefix}_perplexity": math.exp(min(loss, 700.0)),  # exp(710) overflows
            f"{metric_key_prefix}_tokens": tokens,
            f"{metric_key_prefix}_seconds": round(time.perf_counter() - began, 3),
        }
        # Not self.log: TRL's log adds averages over training values it still holds.
        super(SFTTrainer, self).log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def total_loss(self, samples: Any, size: int) -> tuple[float, int]:
        """Sum the loss over every trained token of samples, on all ranks together.

        Args:
            samples: A dataset, or a list, of samples with ``input_ids`` and ``labels``.
            size: Samples of a rank's batch, at most.

        Returns:
            The loss in nats, and the number of tokens.

        Raises:
            Stopped: A signal asked the run to stop.
        """
        # float64, so that the sum does not depend on the order of the batches.
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        model, (rank, ranks) = self.model_wrapped, (self.args.process_index, self.args.world_size)
        was_training = model.training
        model.eval()
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in eval_batches(samples, size, rank, ranks):
                self.stop_if_asked()
                inputs = self._prepare_inputs(self.data_collator(batch))
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
                total[0] -= outputs.log_probs.double().sum()
                total[1] += outputs.label_mask.sum()
        if dist.is_initialized():
            dist.all_reduce(total)
        model.train(was_training)
        nats, tokens = total.tolist()
        return nats, int(tokens)

    def get_train_dataloader(self) -> Any:
        """Load every sample once an epoch, in an order that depends on the seed alone.

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
        inner = self._loader = loader.base_dataloader  # Accelerate wraps this one
        # The loader draws the workers' seeds from this generator when an epoch begins. If it used
        # the global one, as dropout does, a resumed run would draw from that one time too many.
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        inner.worker_init_fn = functools.partial(end_with_rank, inner.worker_init_fn)
        return loader

    def end_workers(self) -> None:
        """End persistent loader workers.

        Python's garbage collector would first close the queues that tell them to end; PyTorch then
        waits 5 seconds for each worker before it kills them.
        """
        if self._loader is not None:
            self._loader._iterator = None

    def _run_epoch(self, *, epoch: int, **kwargs: Any) -> None:
        """Set the epoch's order; train no step if the checkpoint is that of the last step.

        The Trainer and Accelerate pass the epoch number through the wrappers of the loader. On
        several ranks, the wrapper that skips the batches before a checkpoint does not pass it to
        the sampler, which would read the rest of the epoch in the first epoch's order.
        """
        self._order.set_epoch(epoch)
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(epoch=epoch, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: run.json and config.yaml contain more."""
