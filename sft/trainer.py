"""TRL's SFTTrainer with what it lacks: our head, an exact evaluation, whole checkpoints."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from trl import SFTTrainer

from sft import checkpoint, zero
from sft.data.encode import IGNORE_INDEX
from sft.data.sampler import Fillers, Shuffle
from sft.fast import head


class Trainer(SFTTrainer):  # type: ignore[misc]
    """Trains on samples that have ``input_ids`` and ``labels`` already."""

    control: Any
    lm_head = "trl"
    # Of the steps that will be logged: entropy, right guesses, trained tokens.
    _sums: torch.Tensor | None = None
    _tokens = 0  # that this rank saw since the last line

    def use_head(self, kind: str) -> None:
        """Compute the loss with this head: ``chunked``, ``trl`` or ``plain``."""
        self.lm_head = kind
        if not self.aux_loss_enabled:
            peft = isinstance(self.model, PeftModel)
            head.install(self.model.get_base_model() if peft else self.model, kind)

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
        mask = inputs.get("attention_mask")
        self._tokens += inputs["input_ids"].numel() if mask is None else mask.sum()
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
            found = [output.entropy, output.is_top1, output.label_mask]
            sums = torch.stack([values.sum(dtype=torch.float64) for values in found]).detach()
            self._sums = sums if self._sums is None else self._sums + sums
        if num_items_in_batch is None:
            return output.loss / output.label_mask.sum().clamp(min=1)
        # The tokens of every rank are counted, and DDP takes the mean of the ranks' gradients.
        loss = output.loss / torch.as_tensor(num_items_in_batch).clamp(min=1)
        return loss * self.accelerator.num_processes

    def resume_counts(self) -> None:
        """Go on counting tokens, and log as often as this command says: the state is another's."""
        self.state.compute_steps(self.args, self.state.max_steps)
        counts = [line["num_tokens"] for line in self.state.log_history if "num_tokens" in line]
        self._total_train_tokens = int(counts[-1]) if counts else 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what was summed for this line."""
        if "loss" in logs and self._sums is not None:
            counted = torch.tensor([float(self._tokens)], dtype=torch.float64)
            sums = torch.cat([self._sums, counted.to(self._sums.device)])
            if dist.is_initialized():
                dist.all_reduce(sums)
            entropy, right, trained, tokens = sums.tolist()
            self._total_train_tokens += int(tokens)
            self._metrics["train"] |= {
                "entropy": [entropy / max(trained, 1)],
                "mean_token_accuracy": [right / max(trained, 1)],
                "num_tokens": [self._total_train_tokens],
            }
            self._sums, self._tokens = None, 0
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
            for batch in self._eval_batches(samples):
                outputs = model(**self._prepare_inputs(batch), use_cache=False, fused_lm_head=True)
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
        fillers = Fillers(
            self.train_dataset,
            self._train_batch_size * self.args.world_size,
            self.data_collator.pad_token_id,
        )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return self._get_dataloader(
            dataset=fillers,
            description="Training",
            batch_size=self._train_batch_size,
            sampler_fn=lambda dataset: Shuffle(dataset, seed),
            is_training=True,
        )

    def _eval_batches(self, samples: Any) -> Any:
        """Yield this rank's batches; every rank gets as many, as ZeRO-3 gathers at each forward.

        Samples go round the ranks in order. A rank that has none left repeats the last sample with
        nothing trained, which adds nothing to either sum.
        """
        size, ranks = self.args.per_device_eval_batch_size, self.args.world_size
        rank = self.args.process_index
        for start in range(0, len(samples), size * ranks):
            indices = range(start + rank, min(start + size * ranks, len(samples)), ranks)
            batch = [samples[index] for index in indices]
            if not batch:
                last = samples[len(samples) - 1]["input_ids"]
                batch = [{"input_ids": last, "labels": [IGNORE_INDEX] * len(last)}]
            yield self.data_collator(batch)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train no step more where a run was cut off after its last checkpoint."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: run.json and config.yaml say more, and are true."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.mark_complete(
                checkpoint.path_of(self.args.output_dir, self.state.global_step),
                ranks=self.args.world_size,
                stage=zero.stage(self.args.deepspeed),
            )


def trained_bits(model: torch.nn.Module) -> int:
    """Sum the bits of the trained parameters as integers: equal on ranks that hold the same."""
    total = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            words = parameter.detach().float().contiguous().view(torch.int32)
            total += int(words.to(torch.int64).sum().item())
    return total & 0x7FFFFFFFFFFFFFFF


def share_of_state(trainer: Trainer) -> dict[str, int]:
    """Count the bytes of parameters and of optimizer state that this rank holds."""
    parameters = sum(
        getattr(parameter, "ds_tensor", parameter).nbytes
        for parameter in trainer.model.parameters()
    )
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # Accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    state = sum(
        value.nbytes
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    )
    return {"parameter_bytes": parameters, "optimizer_bytes": state}


def gather(value: Any) -> list[Any]:
    """Collect a small object from every rank, in rank order."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
