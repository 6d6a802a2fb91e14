"""A model under test: short rows through it, as training runs it, and what their outputs are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sft.data.collator import Collator
from sft.data.row_encoder import IGNORE_INDEX
from sft.errors import ModelError
from sft.fast.attention import UNPACKED

EXPLAINED = 64  # rounding errors of the largest output: that many are explained by other sums
# LLM.int8 rounds activations to 127 steps, except in columns where one of all tokens is an outlier:
# so other tokens decide which columns of a token are rounded.
INT8_EPS = 2.0**-7


@dataclasses.dataclass
class Probe:
    """Runs the model on short rows, as training does.

    Attributes:
        model: The model as training wrapped it.
        collator: The run's collator.
        device: The model's device.
        vocabulary: The number of tokens.
        computed_in: The precision of the arithmetic, which may be lower than that of the weights.
        longest: Tokens in the longest document of the data; windows beyond it have no effect.
    """

    model: Any
    collator: Collator
    device: torch.device
    vocabulary: int
    computed_in: torch.dtype = torch.float32
    longest: int = 1 << 16

    @property
    def inner(self) -> Any:
        """The model without the wrapper of DDP or DeepSpeed."""
        return getattr(self.model, "module", self.model)

    @property
    def eps(self) -> float:
        """The relative rounding error of the arithmetic."""
        dtype = next(p.dtype for p in self.inner.parameters() if p.is_floating_point())
        eps = max(torch.finfo(dtype).eps, torch.finfo(self.computed_in).eps)
        if getattr(self.inner, "is_loaded_in_8bit", False):
            return max(eps, INT8_EPS)
        tf32 = self.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        return max(eps, 2.0**-10) if tf32 else eps

    def document(self, seed: int, length: int) -> list[int]:
        """Return token ids of a document."""
        return [
            ((5 + 2 * seed) * place + 3 * seed + 1) % self.vocabulary for place in range(length)
        ]

    def call(
        self, model: Any, samples: list[dict[str, Any]], collator: Collator | None = None
    ) -> tuple[Any, torch.Tensor]:
        """Return the model's output for a batch, and the batch's labels."""
        batch = (collator or self.collator)(samples)
        inputs = {
            key: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for key, value in batch.items()
        }
        try:
            # Called as in training: under ZeRO-3 a different order of layers would disturb
            # prefetching.
            return model(**inputs, use_cache=False, fused_lm_head=True), inputs["labels"]
        except ValueError as error:  # Transformers' own refusal, without the kernels of a mixer
            if "packed sequences" not in str(error):
                raise
            raise ModelError(f"{str(error).strip()}\n    fix: {UNPACKED}") from error

    def run(self, samples: list[dict[str, Any]], collator: Collator | None = None) -> torch.Tensor:
        """Return the log-probabilities of the trained labels, (N,), in the order of the rows."""
        output, labels = self.call(self.model, samples, collator)
        labels = labels[:, 1:]
        if getattr(output, "log_probs", None) is None:  # a model without a head of training
            scores = output.logits[:, :-1].float().log_softmax(-1)
            found = scores.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            seen: torch.Tensor = found[labels != IGNORE_INDEX]
            return seen
        seen = output.log_probs.float()
        return seen if seen.ndim == 1 else seen[output.label_mask.bool()]

    def influence(self, samples: list[dict[str, Any]], count: int) -> float:
        """Return the largest gradient of the loss at the embeddings of the first ``count`` tokens.

        It is 0 to the last bit if nothing leads from these tokens to the trained ones, whatever the
        order of sums and the precision.
        """
        inner = self.inner
        embedded: list[torch.Tensor] = []

        def keep(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            embedded.append(output.detach().requires_grad_())
            return embedded[-1]

        handle = inner.get_input_embeddings().register_forward_hook(keep)
        try:
            with (
                torch.enable_grad(),
                torch.autocast(
                    self.device.type, self.computed_in, enabled=self.computed_in != torch.float32
                ),
            ):
                output, _ = self.call(inner, samples)
                # TRL's loss includes that of the balance of experts, which sees all tokens.
                own = output.log_probs.requires_grad
                loss = output.log_probs.sum() if own else output.loss
                gradient = torch.autograd.grad(loss, embedded[0])[0]
        finally:
            handle.remove()
        return float(gradient[0, :count].abs().max())

    def bound(self, scale: float, effect: float, share: float) -> float:
        """Return the difference that rounding explains.

        Args:
            scale: The size of the largest output.
            effect: The difference that seeing the other tokens makes.
            share: The share of it below which a difference is not a leak.
        """
        rounding = self.eps * scale
        return max(rounding / 4, min(EXPLAINED * rounding, share * effect))


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the mean difference between two outputs; infinite if they are not finite."""
    found = float((one - other).abs().mean())
    return found if found == found else float("inf")
