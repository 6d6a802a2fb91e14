"""TRL's SFTTrainer with checkpoints from which a run resumes exactly.

Only this file touches the private attributes in which the Trainer and TRL sum and count what is
logged next.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl import SFTTrainer

from sft.attributes import replaced
from sft.checkpoint import folders, sharded, state, weights
from sft.checkpoint.optimizer import Optimizer
from sft.checkpoint.random_state import restore_random_streams
from sft.checkpoint.rank_zero import RankZero
from sft.checkpoint.restore import restore
from sft.checkpoint.save import save
from sft.config import zero
from sft.files import begin_folder, finish_folder
from sft.training.cadence import WithinEpochs
from sft.training.guard import Guard
from sft.training.metrics import RunningMetrics, share_of

# What TRL changes in a model's config to train it. It must not be saved with the model: one whose
# config asks for its routers' scores cannot answer prompts of different lengths.
CHANGED = ("output_router_logits", "router_aux_loss_coef", "use_cache")


class ResumableTrainer(SFTTrainer):  # type: ignore[misc]
    """Saves a checkpoint and resumes from it.

    ``guard`` is set before training begins; without one, nothing can be saved.
    """

    _total_train_tokens: int
    guard: Guard | None = None
    within_epochs: WithinEpochs  # set before training begins
    fingerprint = ""  # the run's; the manifest of each checkpoint names it
    _saved_counts: list[dict[str, Any]] | None = None  # by rank, of the checkpoint resumed from
    stopped_early = ""  # why training stops before the last step
    updates = 0  # steps in which this process changed the weights
    _saved: int | None = None  # the step of the newest checkpoint

    def __init__(self, model: Any, *args: Any, **kwargs: Any) -> None:
        text = model.config.get_text_config()
        self._as_loaded = {name: getattr(text, name) for name in CHANGED if hasattr(text, name)}
        super().__init__(model, *args, **kwargs)
        # With 1, the Trainer would delete the newest checkpoint once training has ended.
        self._keep, self.args.save_total_limit = self.args.save_total_limit, None
        if self.args.save_strategy == "no":  # only a signal or the best evaluation saves one
            self._keep = 1
        self.running_metrics = RunningMetrics()

    @property
    def bare_model(self) -> Any:
        """The model without its wrappers: DDP, DeepSpeed, torch.compile."""
        return self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)

    @property
    def skips_nan(self) -> bool:
        """Whether a step whose loss or gradient is not finite is left out (train.on_nan=skip)."""
        return self.guard is not None and self.guard.on_nan == "skip"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last logged line."""
        if "loss" in logs:
            found = self.running_metrics.flush(self._total_train_tokens)
            if found:
                self._total_train_tokens = found["num_tokens"]
            self._metrics["train"] |= {name: [value] for name, value in found.items()}
            # Trainer.log resets the running loss with `x -= x`; once it is NaN it stays NaN, so it
            # is set to zero here.
            self._tr_loss.zero_()
        super().log(logs, start_time)

    def _kept_counts(self) -> dict[str, Any]:
        """Return what this rank has summed and counted since the last logged line, as JSON values.

        ``resume_counts`` restores it.
        """
        assert self.guard is not None
        return {
            "loss": self._tr_loss.item(),
            "logged_at": self._globalstep_last_logged,
            **self.running_metrics.state(),
            "all_tokens": self._total_train_tokens,
            "metrics": {key: list(values) for key, values in self._metrics["train"].items()},
            **self.guard.state(),
        }

    def resume_counts(self) -> None:
        """Continue the sums and counts of a checkpoint, after the Trainer has reset them."""
        if self._saved_counts is None:
            return
        # The restored state has the logging and saving intervals of the command that saved it.
        self.state.compute_steps(self.args, self.state.max_steps)
        own = share_of(self._saved_counts, self.args.process_index, self.args.world_size)
        self._tr_loss = torch.tensor(own["loss"], device=self.args.device)
        self._globalstep_last_logged = own["logged_at"]
        self._total_train_tokens = own["all_tokens"]
        self._metrics["train"].update(own["metrics"])
        self.running_metrics.restore(own, self.args.device)
        if self.guard is not None:
            self.guard.restore(own)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Save a checkpoint unless this step has one, and stop if a signal asked for that.

        Raises:
            CheckpointError: The checkpoint cannot be written; the previous one is untouched.
            Stopped: A signal asked the run to stop.
        """
        step, args = self.state.global_step, self.args
        assert self.guard is not None
        self.guard.settle()
        if self._saved != step:
            path = folders.path_of(args.output_dir, step)
            best = self.state.best_global_step
            if best and (best == step or folders.path_of(args.output_dir, best).is_dir()):
                self.state.best_model_checkpoint = str(folders.path_of(args.output_dir, best))
            self.store_flos()
            facts = {"run": self.fingerprint, "step": step, "ranks": args.world_size}
            with self.guard.alerts.patiently():
                save(
                    path,
                    self._write_weights,
                    self.live(),
                    self._kept_counts(),
                    self.state,
                    facts | {"stage": zero.stage(args.deepspeed)},
                    self._keep,
                )
            self._saved = step
        stops = self.control.should_training_stop and not self.stopped_early
        if stops and step < self.state.max_steps:
            self.guard.stop(step)

    def stop_if_asked(self) -> None:
        """Stop in the middle of an evaluation, which is repeated when the run is resumed.

        Raises:
            Stopped: A signal asked the run to stop.
        """
        if self.guard is not None and self.guard.asked():
            if self.state.global_step:
                self._save_checkpoint(None, None)
            self.guard.stop(self.state.global_step)

    def write_model(self, folder: Path) -> None:
        """Write the trained weights and the tokenizer into a folder that is complete or absent.

        Raises:
            CheckpointError: The files cannot be written, or do not hold what was trained.
        """
        with RankZero(folder) as main:
            partial = main.do(begin_folder, folder)
            self._write_weights(main, partial)
            main.do(finish_folder, partial, folder)

    def _write_weights(self, main: RankZero, folder: Path) -> None:
        model = self.bare_model
        found = weights.gathered(model, lambda: self.accelerator.get_state_dict(self.deepspeed))
        tokenizer, updated = self.processing_class, self.updates > 0
        with replaced(model.config.get_text_config(), self._as_loaded):
            main.do(weights.write, model, tokenizer, folder, found, updated)

    def live(self) -> state.Live:
        """Return the objects whose state a checkpoint stores beside the weights and the counts."""
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
        """Restore our checkpoint, which has none of the files that the stock method reads."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.skips_nan and hasattr(self.optimizer.optimizer, "check_grad_overflow"):
            self.optimizer.optimizer.check_grad_overflow = True
        if resume_from_checkpoint is not None:
            self._saved_counts = restore(self.live(), Path(resume_from_checkpoint))
            self._saved = folders.step_of(Path(resume_from_checkpoint))
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Load nothing: ``_prepare_for_training`` restores weights once the model is wrapped."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            restore_random_streams(Path(checkpoint), self.args.seed)
