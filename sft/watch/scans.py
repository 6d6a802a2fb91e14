"""Count what a layer with a recurrent state computes besides the layers within it: its scan.

The products are those that ``torch.utils.flop_counter`` counts. PyTorch's own code of such a layer
multiplies matrices; a kernel of another package (mamba_ssm, fla) hides them, there and here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sft.fast import mixers
from sft.watch.scores import OTHER_ATTENTION

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)  # are counted by themselves


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sums the operations of products in ``total``, but for those of layers within the scan."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0.0
        self._paused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and add it if it is a product."""
        output = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None and not self._paused:
            self.total += formula(*args, **(kwargs or {}), out_val=output)
        return output

    def pause(self, *_: Any) -> None:
        """Begin a layer within the scan."""
        self._paused += 1

    def resume(self, *_: Any) -> None:
        """End that layer."""
        self._paused -= 1


def classes(model: Any) -> set[str]:
    """Name the classes of a model's layers that have a recurrent state."""
    kinds = {type(module).__name__ for module in model.modules()}
    linear = {kind for kind in kinds if any(other in kind for other in OTHER_ATTENTION)}
    return {kind for kind in linear if kind.endswith("Attention")} | kinds & {*mixers.scans(model)}


def watch(module: nn.Module, found: Callable[[Any, float], None]) -> Iterator[Any]:
    """Yield the hooks that count each call of a module.

    Args:
        module: A layer with a recurrent state.
        found: Gets the module, and the operations of its forward pass.
    """
    products = Products()

    def begin(*_: Any) -> None:
        products.total = 0.0
        products.__enter__()  # type: ignore[no-untyped-call]

    def end(called: Any, *_: Any) -> None:
        products.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        found(called, products.total)

    for child in module.modules():
        if isinstance(child, LAYERS):
            yield child.register_forward_pre_hook(products.pause)
            yield child.register_forward_hook(products.resume, always_call=True)
    yield module.register_forward_pre_hook(begin)
    yield module.register_forward_hook(end, always_call=True)
