"""Count the floating-point operations of training, from what each layer really computes.

Hooks watch one micro-batch: the rows that each layer multiplies, whether its input and its weight
need a gradient, and whether gradient checkpointing runs it again. So a frozen layer has no weight
gradient, a layer below every trained one has no gradient at all, and an expert counts the tokens
that were sent to it, in any architecture. Other micro-batches are scaled by their tokens, their
trained positions, and their pairs of tokens that may attend to each other.

A product of (m, k) and (k, n) is 2 m k n operations. Attention counts whole squares, without the
causal half, as in ``torch.utils.flop_counter``. Not counted: element-wise operations, and the scans
of state-space and linear-attention layers, whose projections are counted.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from sft.checkpoint.sharded import shape_of

# Fields of configs with the number of query heads and the sizes of a head.
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
WIDTHS = ("hidden_size", "n_embd", "d_model")
OTHER_ATTENTION = ("Linear", "Lightning", "Rwkv")  # in names of classes: it has no scores


@dataclass
class Cost:
    """Operations.

    Attributes:
        forward: In the forward pass.
        gradient: In the backward pass.
        repeated: In the backward pass, to compute again what the forward pass did not store.
    """

    forward: float = 0.0
    gradient: float = 0.0
    repeated: float = 0.0

    @property
    def needed(self) -> float:
        """What the model needs: without what was repeated to save memory."""
        return self.forward + self.gradient

    @property
    def done(self) -> float:
        """What was really computed."""
        return self.needed + self.repeated


@dataclass
class Seen:
    """The sizes of some micro-batches.

    Attributes:
        tokens: Tokens that were computed, with padding.
        trained: Positions that the loss was computed at; a number, or a tensor on the device.
        texts: Tokens without padding; a number, or a tensor on the device.
        pairs: By attention window (0: none), the pairs of tokens; numbers, or tensors.
    """

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
            compiled: Whether torch.compile compiles the model, where hooks would compile it anew;
                then only tokens are counted.
        """
        self.model, self.head, self.kernel, self.compiled = model, head, kernel or "", compiled
        self.seen = Seen()
        self._windows = {_window(each) for each in model.modules() if _is_attention(each)}
        self._position = self._of_position()
        self._layers = Cost()  # of the micro-batch that was watched
        self._attention: dict[int, Cost] = defaultdict(Cost)  # for one pair, by window
        self._tokens = 0  # of the micro-batch that was watched; 0: none was
        self._in_backward = False
        self._stored: set[Any] = set()  # layers whose forward pass autograd recorded

    @contextlib.contextmanager
    def micro_batch(self, inputs: dict[str, Any]) -> Iterator[None]:
        """Add a micro-batch's sizes, and watch the layers if it is the first one."""
        self._see(inputs)
        if self._tokens or self.compiled:
            yield
            return
        hooks = list(self._hooks())
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._stored.clear()
            self._in_backward = False
        self._tokens = inputs["input_ids"].numel()

    def begin_backward(self) -> None:
        """Tell that the forward pass of the micro-batch has ended."""
        self._in_backward = True

    def flush(self) -> tuple[float, float, float]:
        """Return the tokens without padding, operations needed and done, and begin again.

        On a GPU this waits for it: call it at logged steps only.
        """
        seen, self.seen = self.seen, Seen()
        if not self._tokens:
            return float(seen.texts), 0.0, 0.0
        costs = [
            (self._layers, seen.tokens / self._tokens),
            (self._position, float(seen.trained)),
            *((cost, float(seen.pairs[window])) for window, cost in self._attention.items()),
        ]
        needed, done = (
            sum(getattr(cost, kind) * times for cost, times in costs) for kind in ("needed", "done")
        )
        return float(seen.texts), needed, done

    def _see(self, inputs: dict[str, Any]) -> None:
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        seen, places = self.seen, inputs.get("position_ids")
        seen.tokens += ids.numel()
        seen.texts = seen.texts + (ids.numel() if mask is None else mask.sum())
        positions, labels = inputs.get("loss_positions"), inputs["labels"][:, 1:]
        if positions is not None:
            seen.trained = seen.trained + positions.numel()
        else:  # TRL's head; without Triton it computes the loss at every position
            seen.trained = seen.trained + ((labels != -100).sum() if ids.is_cuda else labels.numel())
        for window in self._windows:
            seen.pairs[window] = seen.pairs[window] + self._pairs(ids, places, window)

    def _pairs(self, ids: torch.Tensor, places: torch.Tensor | None, window: int) -> Any:
        """Count the pairs of tokens that may attend to each other, in whole squares."""
        rows, length = ids.shape
        by_document = self.kernel == "packed" or "flash" in self.kernel or "/" in self.kernel
        if places is None or not by_document:
            return rows * length * min(length, window or length)
        # The squares of all documents: n * n is the sum of 2 p + 1 over the places p < n.
        pairs = 2 * places + 1
        return (torch.where(places < window, pairs, window) if window else pairs).sum()

    def _hooks(self) -> Iterator[Any]:
        """Watch every layer that multiplies."""
        fused: set[nn.Module] = set()
        for module in self.model.modules():
            # sft.fast.lora computes both matrices in its own forward, and does not call them.
            if hasattr(module, "lora_A") and "forward" in vars(module):
                pairs = zip(module.lora_A.values(), module.lora_B.values(), strict=True)
                both = [layer for pair in pairs for layer in pair]
                fused.update(both)
                yield module.register_forward_hook(self._watch_adapter)
            elif hasattr(module, "parameter_name") and hasattr(module, "lora_A"):
                yield module.register_forward_hook(self._watch_stacked_adapter)
        for module in self.model.modules():
            if module in fused or isinstance(module, nn.Embedding):
                continue
            own = dict(module.named_parameters(recurse=False))
            stacked = {name: shape_of(p) for name, p in own.items() if len(shape_of(p)) == 3}
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                yield module.register_forward_hook(self._watch_convolution)
            elif isinstance(module, nn.Linear) or len(_shape(own.get("weight"))) == 2:
                yield module.register_forward_hook(self._watch_linear, with_kwargs=True)
            elif stacked:
                yield module.register_forward_hook(self._experts_watch(stacked), with_kwargs=True)
            if _is_attention(module):
                yield module.register_forward_hook(self._watch_attention)

    def _add(self, cost: Cost, layer: Any, forward: float, gradients: float) -> None:
        """Add a call of a layer, whose gradients cost as many times its forward pass."""
        if not self._in_backward:
            cost.forward += forward
            if torch.is_grad_enabled():
                self._stored.add(layer)
                cost.gradient += gradients * forward
            return
        cost.repeated += forward
        # Reentrant checkpointing records nothing in the forward pass, and this call instead.
        if layer not in self._stored:
            cost.gradient += gradients * forward

    def _watch_linear(self, module: Any, given: Any, named: dict[str, Any], output: Any) -> None:
        x = given[0] if given else next(iter(named.values()))
        linear = isinstance(module, nn.Linear)
        weight = module._parameters.get("weight")
        # A quantised weight has a shape of its own.
        size = module.in_features * module.out_features if linear else shape_of(weight).numel()
        trained = weight is not None and weight.requires_grad
        forward = 2 * size * (x.numel() // x.shape[-1])
        self._add(self._layers, module, forward, x.requires_grad + trained)

    def _watch_adapter(self, module: Any, given: Any, output: Any) -> None:
        x = given[0]
        rows = x.numel() // x.shape[-1]
        for name in module.active_adapters:
            if name in module.lora_A:
                a, b = module.lora_A[name], module.lora_B[name]
                forward = 2 * rows * shape_of(a.weight).numel()
                self._add(self._layers, a, forward, x.requires_grad + 1)
                self._add(self._layers, b, 2 * rows * shape_of(b.weight).numel(), 2)

    def _watch_stacked_adapter(self, module: Any, given: Any, output: Any) -> None:
        """Count the product of the two matrices, which PEFT adds to the stacked weight."""
        for name in module.active_adapters:
            if name in module.lora_A:
                a, b = (shape_of(m[name].weight) for m in (module.lora_A, module.lora_B))
                self._add(self._layers, module, 2 * a.numel() * b[0], 2)

    def _watch_convolution(self, module: Any, given: Any, output: Any) -> None:
        per_output = prod(shape_of(module.weight)[1:])
        trained = module.weight.requires_grad
        gradients = given[0].requires_grad + trained
        self._add(self._layers, module, 2 * output.numel() * per_output, gradients)

    def _experts_watch(self, shapes: dict[str, torch.Size]) -> Any:
        def watch(module: Any, given: Any, named: dict[str, Any], output: Any) -> None:
            tensors = [x for x in (*given, *named.values()) if isinstance(x, torch.Tensor)]
            chosen = [x for x in tensors if not (x.is_floating_point() or x.dtype == torch.bool)]
            states = tensors[0]
            # The experts that were chosen for each token; otherwise tokens are repeated already.
            rows = chosen[0].numel() if chosen else states.numel() // states.shape[-1]
            for number, (name, shape) in enumerate(shapes.items()):
                adapted = parametrize.is_parametrized(module, name)
                trained = adapted or module._parameters[name].requires_grad
                # The input of the second product depends on the first weight.
                below = states.requires_grad or (number > 0 and trained)
                key = (module, name)
                self._add(self._layers, key, 2 * rows * shape[1:].numel(), below + trained)

        return watch

    def _watch_attention(self, module: Any, given: Any, output: Any) -> None:
        text = self.model.config.get_text_config()
        heads = _first(text, HEADS)
        size = getattr(module, "head_dim", None) or getattr(text, "head_dim", None)
        size = size or _first(text, WIDTHS) // heads
        key = getattr(text, "qk_head_dim", None) or size
        value = getattr(text, "v_head_dim", None) or size
        found = output[0] if isinstance(output, tuple) else output
        # The scores and the sum of values; in the backward pass the gradients of four factors.
        forward = 2.0 * heads * (key + value)
        cost = self._attention[_window(module)]
        before = cost.gradient
        self._add(cost, module, forward, 2 * found.requires_grad)
        if cost.gradient > before and self.kernel != "eager":
            cost.repeated += 2 * heads * key  # other kernels compute the scores again

    def _of_position(self) -> Cost:
        """Return the cost of the head and the loss for a position that is trained."""
        layer = self.model.get_output_embeddings()
        if self.head == "plain" or layer is None:  # the head is called like any layer
            return Cost()
        own = list(layer.parameters())
        size = max(shape_of(p).numel() for p in own)
        # PEFT's wrappers have the frozen weight beside the trained copy, or beside trained rows.
        trained = any(p.requires_grad for p in own if shape_of(p).numel() == size)
        known = {id(p) for p in own}
        below = any(p.requires_grad and id(p) not in known for p in self.model.parameters())
        forward = 2.0 * size
        gradient = forward * (below + trained)
        return Cost(forward, gradient, 0.0 if self.head == "chunked" else forward)


def _is_attention(module: nn.Module) -> bool:
    """Return whether a module is that of a layer's attention, by the name of its class."""
    name = type(module).__name__
    return name.endswith("Attention") and not (
        any(other in name for other in OTHER_ATTENTION)
        or any(type(child).__name__.endswith("Attention") for child in module.children())
    )


def _shape(parameter: Any) -> torch.Size:
    return torch.Size() if parameter is None else shape_of(parameter)


def _window(module: nn.Module) -> int:
    """Return how many tokens a token of a layer attends to; 0: to all before it."""
    window = getattr(module, "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else 0


def _first(config: Any, names: tuple[str, ...]) -> int:
    """Return the first of a config's fields that it has; 1 if it has none."""
    return next((found for name in names if (found := getattr(config, name, None))), 1)
