"""The optimizer under what Accelerate and DeepSpeed wrap around it, and its state by name.

Its state is one of three kinds:

- ``elementwise``: tensors of a parameter's shape and numbers (Adam, SGD, Lion). It goes on on any
  number of ranks and under any stage.
- ``by parameter``: anything else, held by whole parameters (8-bit Adam, Adafactor without ZeRO).
- ``by rank``: the same under ZeRO, whose partitions a rank's blocks and factors belong to.
"""

from __future__ import annotations

from typing import Any

import torch

from sft.errors import CheckpointError

# Where DeepSpeed's optimizers keep the flat float32 parameters of this rank.
FLAT = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
)


class Optimizer:
    """The torch optimizer under Accelerate's and DeepSpeed's, and the parameters it updates."""

    def __init__(self, wrapped: Any, model: torch.nn.Module) -> None:
        """Look under the wrappers.

        Args:
            wrapped: What Accelerate made of the optimizer.
            model: The model without what is wrapped around it; its names are the state's names.
        """
        outer = wrapped.optimizer
        self.zero: Any = outer if hasattr(outer, "optimizer") else None
        self.torch = outer.optimizer if self.zero else outer
        self.parameters = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @property
    def flat(self) -> list[torch.Tensor]:
        """Under ZeRO, this rank's share of each group of parameters, flat and in float32."""
        name = next(name for name in FLAT if hasattr(self.zero, name))
        partitions: list[torch.Tensor] = getattr(self.zero, name)
        return partitions

    def entries(self) -> dict[str, dict[str, Any]]:
        """Give the state by parameter or, under ZeRO, by partition."""
        if self.zero is not None:
            return {str(index): self.torch.state[flat] for index, flat in enumerate(self.flat)}
        names = {parameter: name for name, parameter in self.parameters.items()}
        return {names[parameter]: entry for parameter, entry in self.torch.state.items()}

    def entry(self, saved: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Give state back as this optimizer keeps it.

        torch's own count their steps in float32 tensors, those of others in integers.
        """
        from_torch = type(self.torch).__module__.startswith("torch.")
        return {
            key: value
            if value.ndim or value.is_floating_point()
            else value.float()
            if from_torch
            else int(value)
            for key, value in saved.items()
        }

    def groups(self) -> list[dict[str, Any]]:
        """Give what an optimizer (such as the schedule-free ones) changes in its groups itself."""
        given = {"params", "lr", "weight_decay"}
        return [
            plain(
                {
                    key: value
                    for key, value in group.items()
                    if key not in given and self.torch.defaults.get(key, value) != value
                }
            )
            for group in self.torch.param_groups
        ]

    def held_bytes(self) -> int:
        """Count the bytes of the state that this rank holds."""
        return sum(
            value.nbytes
            for entry in self.torch.state.values()
            for value in entry.values()
            if isinstance(value, torch.Tensor)
        )

    def link(self) -> None:
        """Let DeepSpeed find each parameter's part of the state.

        Under stages 1 and 2 it does so once, after the first of several groups has made its step.
        """
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def kind(self) -> str:
        """Say which of the three kinds the state is."""
        for entry in self.entries().values():
            for key, value in entry.items():
                if not isinstance(value, (torch.Tensor, int, float)):
                    raise CheckpointError(
                        f"this optimizer keeps a {type(value).__name__} ({key}), which a "
                        "checkpoint cannot hold\n    fix: train.optim=adamw_torch_fused"
                    )
        owners = dict(enumerate(self.flat)) if self.zero is not None else self.parameters
        sizes = {str(name): owner.numel() for name, owner in owners.items()}
        elementwise = all(
            value.ndim == 0 or (value.is_floating_point() and value.numel() == sizes[name])
            for name, entry in self.entries().items()
            for value in entry.values()
            if isinstance(value, torch.Tensor)
        )
        if elementwise:
            return "elementwise"
        return "by parameter" if self.zero is None else "by rank"


def plain(values: dict[str, Any]) -> dict[str, Any]:
    """Keep what JSON can say: a schedule's functions are made anew from the settings."""
    simple = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, simple)
        or (isinstance(value, list) and all(isinstance(item, simple) for item in value))
    }
