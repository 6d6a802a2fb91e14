"""The trainer with a clock: it marks where the time of a step goes, and shows its micro-batches."""

from __future__ import annotations

from typing import Any

import torch

from sft.fast import attention, mixers, speed
from sft.model.precision import SMALL
from sft.training.trainer import Trainer
from sft.watch import peaks
from sft.watch.figures import Figures
from sft.watch.operations import Operations


class TimedTrainer(Trainer):
    """Marks the parts of each step for ``figures``, which changes nothing of what is trained."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.figures = Figures(
            self.args.device, self._peak, lambda: self.within_epochs.due(self.args, self.state)
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Mark the time in which a step waits for its data."""
        self.figures.clock.mark("other")
        found = super().get_batch_samples(*args, **kwargs)
        self.figures.clock.mark("data")
        return found

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Mark the forward and backward pass, and count its operations."""
        if self.figures.operations is None:
            kernel = attention.kernel_of(mixers.text_config(self.model))
            self.figures.operations = Operations(
                self.model, self.lm_head, kernel, self.args.torch_compile
            )
        with self.figures.operations.micro_batch(inputs):
            loss = super().training_step(model, inputs, *args, **kwargs)
        self.figures.clock.mark("compute")
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Tell the count of operations where the forward pass ends."""
        loss = super().compute_loss(*args, **kwargs)
        if self.figures.operations is not None:
            self.figures.operations.begin_backward()
        return loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mark the time of an evaluation."""
        with self.figures.clock.part("evaluation"):
            return super().evaluate(*args, **kwargs)

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Time all that is evaluated at one step as one evaluation."""
        with self.figures.clock.part("evaluation"):
            return super()._evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.figures.clock.part("saving"):
            super()._save_checkpoint(model, trial)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Mark DeepSpeed's optimizer step, which Accelerate calls at the end of a backward pass."""
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self.is_deepspeed_enabled:
            engine, clock = self.deepspeed, self.figures.clock
            step = engine.step

            def marked(*args: Any, **kwargs: Any) -> None:
                clock.mark("compute")
                step(*args, **kwargs)
                clock.mark("optimizer")

            engine.step = marked
        return prepared

    def _peak(self) -> float | None:
        """Return the operations per second that this rank's device can do at most, if known."""
        precision = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32"
        if self.args.device.type == "cuda":
            name = torch.cuda.get_device_name(self.args.device)
            return peaks.of_gpu(name, precision, bool(self.args.tf32))
        # A product of a small model does not come near the speed that is measured.
        if mixers.largest(mixers.text_config(self.model), "hidden_size", "n_embd") < SMALL:
            return None
        found = speed.speeds()
        return 1e9 * (found[speed.FLOAT32] if precision == "fp32" else max(found.values()))
