"""Watch the layers of a model during one micro-batch, and count what each really computes.

Hooks see the rows that a layer multiplies, whether its input and its weight need a gradient, and
whether gradient checkpointing runs it again. So a frozen layer has no weight gradient, a layer
below every trained one has no gradient at all, and an expert counts the tokens that were sent to
it, in any architecture.
"""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from sft.checkpoint.sharded import shape_of
from sft.watch import scans
from sft.watch.scores import heads_of, is_attention, stores_scores, window_of


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


class Layers:
    """Counts the operations of one micro-batch.

    Attributes:
        total: Of the layers' products with tokens, without attention's scores and the LM head.
        fixed: Of products of weights, whatever the number of tokens.
        attention: Of the scores and the sums of values, for one pair of tokens in all layers; by
            the layers' window (0: none).
        scans: The operations of the layers with a recurrent state, by class; 0: a kernel hid them.
        in_backward: The forward pass has ended.
        failed: Why a layer could not be counted, so that nothing is; "" if all were.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.total, self.fixed = Cost(), Cost()
        self.attention: dict[int, Cost] = defaultdict(Cost)
        self.in_backward = False
        self.failed = ""
        self.scans = dict.fromkeys(scans.classes(model), 0.0)
        self._stored: set[Any] = set()  # layers whose forward pass autograd recorded

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Watch the layers during a block."""
        hooks = list(self._hooks())
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self) -> Iterator[Any]:
        """Watch every layer that multiplies.

        ``always_call``: checkpointing raises an exception once it has computed again what it needs,
        which is within such a layer if that is the last.
        """
        fused: set[nn.Module] = set()
        normed: set[nn.Module] = set()  # DoRA multiplies them also for the norms of its weights
        for module in self.model.modules():
            if not hasattr(module, "lora_A"):
                continue
            both = [*module.lora_A.values(), *module.lora_B.values()]
            if hasattr(module, "parameter_name"):
                yield module.register_forward_hook(
                    self._safe(self._watch_stacked_adapter), always_call=True
                )
            elif "forward" in vars(module):
                # sft.fast.lora computes both matrices in its own forward, and does not call them.
                fused.update(both)
                yield module.register_forward_hook(
                    self._safe(self._watch_adapter), always_call=True
                )
            for magnitude in getattr(module, "lora_magnitude_vector", {}).values():
                normed.update(both)
                yield magnitude.register_forward_hook(
                    self._safe(self._watch_dora), with_kwargs=True
                )
        for module in self.model.modules():
            if module in fused or isinstance(module, nn.Embedding):
                continue
            # PEFT's parametrizations take parameters out of their modules during the forward pass.
            own = {name: shape_of(p) for name, p in module.named_parameters(recurse=False)}
            stacked: dict[str, Any] = {
                name: shape for name, shape in own.items() if len(shape) == 3
            }
            if isinstance(module, nn.Conv1d | nn.Conv2d):
                yield module.register_forward_hook(self._safe(self._watch_convolution))
            elif isinstance(module, nn.Linear) or len(own.get("weight", ())) == 2:
                # A quantised weight has a shape of its own.
                linear = isinstance(module, nn.Linear)
                size = module.in_features * module.out_features if linear else prod(own["weight"])
                watch = functools.partial(self._watch_linear, size, module in normed)
                yield module.register_forward_hook(self._safe(watch), with_kwargs=True)
            elif stacked:
                watch = functools.partial(self._watch_experts, stacked)
                yield module.register_forward_hook(
                    self._safe(watch), with_kwargs=True, always_call=True
                )
            if type(module).__name__ in self.scans:
                yield from scans.watch(module, self._found_scan)
            if is_attention(module):
                yield module.register_forward_hook(
                    self._safe(self._watch_attention), with_kwargs=True
                )

    def _safe(self, watch: Callable[..., None]) -> Callable[..., None]:
        """Let a layer that is called in an unknown way train: only its count is given up."""

        def call(module: Any, *rest: Any) -> None:
            try:
                watch(module, *rest)
            except Exception as error:
                self.failed = f"{type(module).__name__}: {type(error).__name__}: {error}"

        return call

    def _add(self, cost: Cost, layer: Any, forward: float, gradients: float) -> None:
        """Add a call of a layer, whose gradients cost as many times its forward pass."""
        if not self.in_backward:
            cost.forward += forward
            if torch.is_grad_enabled():
                self._stored.add(layer)
                cost.gradient += gradients * forward
            return
        cost.repeated += forward
        # Reentrant checkpointing records nothing in the forward pass, and this call instead.
        if layer not in self._stored:
            cost.gradient += gradients * forward

    def _found_scan(self, module: Any, forward: float) -> None:
        """Add a scan; both factors of a product in it have a gradient."""
        self.scans[type(module).__name__] += forward
        self._add(self.total, module, forward, 2)

    def _watch_linear(
        self, size: int, normed: bool, module: Any, given: Any, named: Any, output: Any
    ) -> None:
        x = given[0] if given else next(iter(named.values()))
        forward = 2 * size * (x.numel() // x.shape[-1])
        if normed and x.dim() == 2:  # DoRA's norms, which have no gradient
            self._add(self.fixed, None, forward, 0)
        else:
            gradients = x.requires_grad + _trained(module, "weight")
            self._add(self.total, module, forward, gradients)

    def _watch_adapter(self, module: Any, given: Any, output: Any) -> None:
        x = given[0]
        rows = x.numel() // x.shape[-1]
        for name in module.active_adapters:
            if name in module.lora_A:
                a, b = module.lora_A[name], module.lora_B[name]
                forward = 2 * rows * shape_of(a.weight).numel()
                self._add(self.total, a, forward, x.requires_grad + 1)
                self._add(self.total, b, 2 * rows * shape_of(b.weight).numel(), 2)

    def _watch_dora(self, module: Any, given: Any, named: Any, output: Any) -> None:
        """Count the product of the frozen weight with an input that had dropout: it is a second."""
        x, base = given[0], named.get("base_layer")
        if isinstance(base, nn.Linear) and named.get("base_result") is None:
            forward = 2 * base.in_features * base.out_features * (x.numel() // x.shape[-1])
            self._add(self.total, module, forward, x.requires_grad)

    def _watch_stacked_adapter(self, module: Any, given: Any, output: Any) -> None:
        """Count the product of the two matrices, which PEFT adds to the stacked weight."""
        for name in module.active_adapters:
            if name in module.lora_A:
                a, b = (shape_of(m[name].weight) for m in (module.lora_A, module.lora_B))
                forward = 2 * a.numel() * b[0]
                self._add(self.fixed, module, forward, 2)
                if module.num_experts > 1:
                    # PyTorch computes a parametrization also when it is registered.
                    self.fixed.repeated += forward

    def _watch_convolution(self, module: Any, given: Any, output: Any) -> None:
        per_output = prod(shape_of(module.weight)[1:])
        trained = module.weight.requires_grad
        gradients = given[0].requires_grad + trained
        self._add(self.total, module, 2 * output.numel() * per_output, gradients)

    def _watch_experts(
        self, shapes: dict[str, Any], module: Any, given: Any, named: Any, output: Any
    ) -> None:
        tensors = [x for x in (*given, *named.values()) if isinstance(x, torch.Tensor)]
        chosen = [x for x in tensors if not (x.is_floating_point() or x.dtype == torch.bool)]
        states = tensors[0]
        # The experts that were chosen for each token; without them, tokens are repeated already.
        rows = chosen[0].numel() if chosen else states.numel() // states.shape[-1]
        below = states.requires_grad
        for name, shape in shapes.items():
            trained = _trained(module, name)
            self._add(self.total, (module, name), 2 * rows * prod(shape[1:]), below + trained)
            below = below or trained  # the input of the second product depends on the first weight

    def _watch_attention(self, module: Any, given: Any, named: Any, output: Any) -> None:
        heads, key, value = heads_of(self.model.config.get_text_config(), module)
        found = output[0] if isinstance(output, tuple) else output
        # The scores and the sum of values; in the backward pass the gradients of four factors.
        forward = 2.0 * heads * (key + value)
        cost = self.attention[window_of(module)]
        before = cost.gradient
        self._add(cost, module, forward, 2 * found.requires_grad)
        inputs = [x for x in (*given, *named.values()) if isinstance(x, torch.Tensor)]
        if cost.gradient > before and not stores_scores(found, inputs):
            cost.repeated += 2 * heads * key  # fused kernels compute the scores again


def _trained(module: nn.Module, name: str) -> bool:
    """Return whether a module's parameter is trained, or has an adapter that PEFT adds to it."""
    if parametrize.is_parametrized(module, name):
        return True
    found = getattr(module, name, None)
    return isinstance(found, nn.Parameter) and found.requires_grad
