"""Count the floating-point operations of training, from what each layer really computes.

``Layers`` watches the first micro-batch. The others are scaled by their tokens, their trained
positions, and their pairs of tokens whose scores are computed.

A product of (m, k) and (k, n) is 2 m k n operations. Attention counts whole squares, without the
causal half, as in ``torch.utils.flop_counter``. Not counted: element-wise operations,
and the scans of layers with a recurrent state where a kernel hides them.
"""

from __future__ import annotations

import contextlib
import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from sft.checkpoint.sharded import shape_of
from sft.fast import attention
from sft.watch.layers import Cost, Layers
from sft.watch.scores import is_attention, window_of

logger = logging.getLogger("sft")


@dataclass
class Seen:
    """The sizes of some micro-batches.

    Attributes:
        count: Their number.
        tokens: Tokens that were computed, with padding.
        trained: Positions that the loss was computed at; a number, or a tensor on the device.
        texts: Tokens without padding; a number, or a tensor on the device.
        pairs: By attention window (0: none), the pairs of tokens; numbers, or tensors.
    """

    count: int = 0
    tokens: int = 0
    trained: Any = 0
    texts: Any = 0
    pairs: dict[int, Any] = field(default_factory=lambda: defaultdict(int))


class Operations:
    """Counts a run's operations; made for one process."""

    def __init__(self, model: Any, head: str, kernel: str | None, compiled: bool) -> None:
        """Prepare.

        Args:
            model: The model as PEFT or Transformers made it, without wrappers for training.
            head: ``model.lm_head``, which computes the loss.
            kernel: The attention kernel.
            compiled: Whether torch.compile compiles the model, where hooks would compile it again;
                then only tokens are counted.
        """
        self.model, self.head, self.kernel = model, head, kernel or ""
        self.counts = not compiled
        self.seen = Seen()
        self._windows = {window_of(each) for each in model.modules() if is_attention(each)}
        self._position = self._of_position()
        self._layers = Layers(model)
        self._tokens = 0  # of the micro-batch that was watched; 0: none was

    @contextlib.contextmanager
    def micro_batch(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Add a micro-batch's sizes, and watch the layers if it is the first one."""
        self._see(inputs)
        if self._tokens or not self.counts:
            yield
            return
        with self._layers.watched():
            yield
        if self._layers.failed:
            logger.info("operations are not counted: %s", self._layers.failed)
            self.counts = False
        else:
            self._tokens = inputs["input_ids"].numel()
            if self.left_out:
                names = ", ".join(self.left_out)
                logger.info("operations leave out the scans of %s: a kernel hides them", names)

    @property
    def left_out(self) -> list[str]:
        """The classes of layers with a recurrent state whose scans could not be counted."""
        return sorted(name for name, total in self._layers.scans.items() if not total)

    def begin_backward(self) -> None:
        """Tell that the forward pass of the micro-batch has ended."""
        self._layers.in_backward = True

    def flush(self) -> tuple[float, float, float]:
        """Return the tokens without padding, operations needed and done, and begin again.

        On a GPU this waits for it: call it at logged steps only.
        """
        seen, self.seen = self.seen, Seen()
        if not self._tokens:
            return float(seen.texts), 0.0, 0.0
        costs = [
            (self._layers.total, seen.tokens / self._tokens),
            (self._layers.fixed, seen.count),
            (self._position, float(seen.trained)),
            *((cost, float(seen.pairs[window])) for window, cost in self._layers.attention.items()),
        ]
        needed, done = (
            sum(getattr(cost, kind) * times for cost, times in costs) for kind in ("needed", "done")
        )
        return float(seen.texts), needed, done

    def _see(self, inputs: dict[str, Any]) -> None:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        seen, places = self.seen, inputs.get("position_ids")
        seen.count += 1
        seen.tokens += ids.numel()
        seen.texts = seen.texts + (ids.numel() if mask is None else mask.sum())
        positions, labels = inputs.get("loss_positions"), inputs["labels"][:, 1:]
        if positions is not None:
            seen.trained = seen.trained + positions.numel()
        else:  # TRL's head; without Triton it computes the loss at every position
            seen.trained = seen.trained + (
                (labels != -100).sum() if ids.is_cuda else labels.numel()
            )
        for window in self._windows:
            seen.pairs[window] = seen.pairs[window] + self._pairs(ids, places, window)

    def _pairs(self, ids: torch.Tensor, places: torch.Tensor | None, window: int) -> Any:
        """Count the pairs of tokens whose scores are computed, in whole squares.

        Kernels that are given a mask compute also what it hides: the tokens outside of a window.
        """
        rows, length = ids.shape
        packed, flash = self.kernel == attention.NAME, attention.is_flash(self.kernel)
        by_document = packed or flash
        if not (flash or (packed and ids.is_cuda)):
            window = 0
        if places is None or not by_document:
            return rows * length * min(length, window or length)
        # The squares of all documents: n * n is the sum of 2 p + 1 over the places p < n.
        pairs = 2 * places + 1
        return (torch.where(places < window, pairs, window) if window else pairs).sum()

    def _of_position(self) -> Cost:
        """Return the cost of the head and the loss for a position that is trained."""
        layer = self.model.get_output_embeddings()
        own = [] if layer is None else list(layer.parameters())
        if self.head == "plain" or not own:  # the head is called like any layer
            return Cost()
        size = max(shape_of(p).numel() for p in own)
        # PEFT's wrappers have the frozen weight beside the trained copy, or beside trained rows.
        trained = any(p.requires_grad for p in own if shape_of(p).numel() == size)
        known = {id(p) for p in own}
        below = any(p.requires_grad and id(p) not in known for p in self.model.parameters())
        forward = 2.0 * size
        gradient = forward * (below + trained)
        return Cost(forward, gradient, 0.0 if self.head == "chunked" else forward)
