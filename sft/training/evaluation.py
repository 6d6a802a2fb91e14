"""A trainer that evaluates held-out sets exactly, judges each evaluation, and stops early."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from trl import SFTTrainer

from sft.checkpoint import folders
from sft.checkpoint.restore import restore_weights
from sft.config.evaluation import is_evaluation
from sft.data.sampler import eval_batches
from sft.files import delete_folder
from sft.progress import progress
from sft.ranks import gather
from sft.training.best import Best, Verdict
from sft.training.resumable import ResumableTrainer

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("sft")


class EvaluatingTrainer(ResumableTrainer):
    """Evaluates, and decides by ``train.metric`` which weights are the best and when to stop.

    ``held_out`` and ``best`` are set before training begins.

    Attributes:
        held_out: The held-out samples, by the prefix of their figures: ``eval``, ``eval_NAME``.
        best: Judges the evaluations.
        answers: Returns the share of exact answers, if each evaluation needs it.
        written: The step whose weights the run writes; None: the last one.
    """

    control: Any
    held_out: Mapping[str, Dataset] = {}
    best: Best
    answers: Callable[[], dict[str, float]] | None = None
    written: int | None = None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure the mean loss over every trained token of each held-out set.

        Each sample counts once and each token alike, so the figure is the same for any batch size
        and number of ranks. The stock Trainer's is a mean of batch means, over samples that are
        repeated to fill the last batch. The model is used as training wrapped it: the stock loop,
        called before training, would leave DDP's gradient sync switched off.

        Returns:
            ``eval_loss`` (nats per token), ``eval_perplexity``, ``eval_tokens``, ``eval_seconds``,
            and ``eval_NAME_...`` of each set; ``exact_match`` if ``train.metric`` is that.
        """
        sets = self.held_out if eval_dataset is None else {metric_key_prefix: eval_dataset}
        metrics: dict[str, float] = {}
        for prefix, samples in sets.items():
            metrics |= self._measured(samples, prefix)
        if self.answers is not None and self.guard is not None:
            with self.guard.alerts.patiently():
                metrics |= self.answers()
        # Not self.log: TRL's log adds averages over training values it still holds.
        super(SFTTrainer, self).log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _measured(self, samples: Dataset, prefix: str) -> dict[str, float]:
        """Measure one held-out set."""
        began = time.perf_counter()
        nats, tokens = self.total_loss(samples, self.args.per_device_eval_batch_size)
        loss = nats / tokens
        return {
            f"{prefix}_loss": loss,
            f"{prefix}_perplexity": math.exp(min(loss, 700.0)),  # exp(710) overflows
            f"{prefix}_tokens": tokens,
            f"{prefix}_seconds": round(time.perf_counter() - began, 3),
        }

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
        with (
            torch.no_grad(),
            self.compute_loss_context_manager(),
            progress("evaluating", len(samples), "samples") as bar,
        ):
            for batch in eval_batches(samples, size, rank, ranks):
                self.stop_if_asked()
                inputs = self._prepare_inputs(self.data_collator(batch))
                outputs = model(**inputs, use_cache=False, fused_lm_head=True)
                total[0] -= outputs.log_probs.double().sum()
                total[1] += outputs.label_mask.sum()
                bar.update(min(size * ranks, len(samples) - bar.done))
        if dist.is_initialized():
            dist.all_reduce(total)
        model.train(was_training)
        nats, tokens = total.tolist()
        return nats, int(tokens)

    @property
    def verdict(self) -> Verdict:
        """What the evaluations up to now say."""
        return self.best.judge(self.state.log_history)

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        """Judge the evaluation that was just made; the Trainer saves after this if asked to.

        With ``train.load_best_model_at_end`` the best evaluation has a checkpoint, whatever
        ``train.save_strategy`` says.
        """
        verdict, step = self.verdict, self.state.global_step
        self.state.best_metric, self.state.best_global_step = verdict.value, verdict.step
        is_best = bool(verdict.step == step)
        if is_best and self.best.loads:
            self.control.should_save = True
        if verdict.stops and step < self.state.max_steps:
            self.stopped_early = (
                f"{self.best.metric} was not better than {verdict.value:.6g} (step {verdict.step}) "
                f"in {verdict.waited} evaluations"
                if verdict.step is not None
                else f"{self.best.metric} was not finite in {verdict.waited} evaluations"
            )
            logger.info("stopping early after step %d: %s", step, self.stopped_early)
            self.control.should_training_stop = True
            if self.args.save_strategy != "no":
                self.control.should_save = True
        return is_best

    def resume_evaluations(self) -> None:
        """Make an evaluation that was due when the run ended, and judge those before it again."""
        step, epoch = self.state.global_step, self.state.epoch or 0.0
        last = step >= self.state.max_steps  # the Trainer always evaluates after the last step
        due = {
            "steps": (last or step % self.state.eval_steps == 0) and step >= self.args.eval_delay,
            "epoch": (last or float(epoch).is_integer() or self.within_epochs.evaluates_after(step))
            and epoch >= self.args.eval_delay,
        }.get(self.args.eval_strategy, False)
        done = any(log["step"] == step for log in self.state.log_history if is_evaluation(log))
        if due and not done:
            self._evaluate(None, None)
        verdict = self.verdict  # train.metric may have changed
        self.state.best_metric, self.state.best_global_step = verdict.value, verdict.step
        if due or done:
            self._determine_best_metric(None, None)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        """Load the best weights before the callbacks of the end see the model."""
        if self.best.loads:
            if self.guard is not None:
                self.guard.settle()
            self.load_best()
        return super()._finalize_training(trial, num_train_samples, start_time)

    def load_best(self) -> None:
        """Replace the last weights by those of the best evaluation whose checkpoint is there."""
        step, verdict = self.state.global_step, self.verdict
        folder = self.args.output_dir
        paths = folders.checkpoints(Path(folder)) if self.args.process_index == 0 else []
        saved = [folders.step_of(path) for path in paths if folders.damage(path) is None]
        there = [step, *gather(saved)[0]]
        found = self.best.judge(self.state.log_history, there)
        if found.step is None:
            logger.info("warning: no evaluation was made, so the last weights are written")
            return
        if found.step != verdict.step:
            logger.info(
                "warning: the checkpoint of step %s, which has the best %s, is gone",
                *(verdict.step, self.best.metric),
            )
        self.written = found.step
        if found.step != step:
            restore_weights(self.live(), folders.path_of(folder, found.step))
            self.updates = 0  # before the first update, such as after a step of warm-up at rate 0
        logger.info(
            "the weights of step %d are written, which have the best %s: %.6g",
            *(found.step, self.best.metric, found.value),
        )

    def drop_checkpoints(self) -> None:
        """With ``train.save_strategy=no``, delete the checkpoint whose weights are written."""
        if self.best.loads and self.args.save_strategy == "no":
            for path in folders.checkpoints(Path(self.args.output_dir)):
                delete_folder(path)

    def outcome(self) -> dict[str, Any]:
        """Return the best evaluation for ``run.json``, and whether its weights are written."""
        found = self.verdict
        if found.step is None:
            return {}
        written = self.state.global_step if self.written is None else self.written
        best = {"metric": self.best.metric, "value": found.value, "step": found.step}
        return {"best": best | {"written": written == found.step}}
