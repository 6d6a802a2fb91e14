"""The optimizer inside the wrappers of Accelerate and DeepSpeed, and its state by name.

The state is of one of three kinds:

- ``elementwise``: tensors of a parameter's shape, and numbers (Adam, SGD, Lion). It can be resumed
  on any number of ranks and under any ZeRO stage.
- ``by parameter``: any other state of unsharded parameters (8-bit Adam, Adafactor without ZeRO).
- ``by rank``: such state under ZeRO, where its blocks and factors belong to one rank's partition.
"""

from __future__ import annotations

from typing import Any

import torch

from sft.errors import CheckpointError

# The attributes in which DeepSpeed's optimizers keep this rank's flat float32 parameters.
FLAT = (
    "single_partition_of_fp32_groups",
    "fp32_partitioned_groups_flat",
    "fp32_groups_flat_partition",
)


class Optimizer:
    """The torch optimizer under Accelerate's and DeepSpeed's, and the parameters it updates."""

    def __init__(self, wrapped: Any, model: torch.nn.Module) -> None:
        """Find the torch optimizer inside the wrappers.

        Args:
            wrapped: The optimizer as Accelerate wrapped it.
            model: The unwrapped model, whose parameter names are the names of the state.
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
        """Return the state by parameter or, under ZeRO, by partition."""
        if self.zero is not None:
            return {str(index): self.torch.state[flat] for index, flat in enumerate(self.flat)}
        names = {parameter: name for name, parameter in self.parameters.items()}
        return {names[parameter]: entry for parameter, entry in self.torch.state.items()}

    def entry(self, saved: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Convert a saved entry to the types that this optimizer uses.

        torch's optimizers count steps in float32 tensors, those of other libraries in integers.
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
        """Return the group values that the optimizer itself changes, as schedule-free ones do."""
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
        """Make DeepSpeed map each parameter to its part of the state again.

        Under stages 1 and 2 DeepSpeed does this once, after the step of the first parameter group,
        when the other groups have no state yet.
        """
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state"):
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()

    def kind(self) -> str:
        """Return which of the three kinds the state is.

        Raises:
            CheckpointError: The state contains a value that is neither a tensor nor a number.
        """
        for entry in self.entries().values():
            for key, value in entry.items():
                if not isinstance(value, (torch.Tensor, int, float)):
                    raise CheckpointError(
                        f"this optimizer's state contains a {type(value).__name__} ({key}), which "
                        "a checkpoint cannot store\n    fix: train.optim=adamw_torch_fused"
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
    """Return the values that JSON can represent; a schedule's functions come from the settings."""
    simple = (bool, int, float, str, type(None))
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, simple)
        or (isinstance(value, list) and all(isinstance(item, simple) for item in value))
    }
