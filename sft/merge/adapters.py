"""Read from PEFT how adapters change each parameter of the base.

PEFT has loaded the adapters onto an architecture whose weights take no memory, so that its rules
for patterns, names and tied weights apply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from sft.errors import MergeError
from sft.merge.adapter_files import restarts
from sft.merge.attach import name_of
from sft.merge.change import Change, LowRank
from sft.merge.placeholders import base_name, is_placeholder

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

# Variants of PEFT's LoRA whose forward pass equals adding a product to the weight.
PLAIN_VARIANTS = {"MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant"}
DORA_VARIANTS = {"DoraLinearVariant", "DoraEmbeddingVariant"}


def changes(
    model: PeftModel,
    weights: Sequence[float],
    configs: Sequence[LoraConfig],
    partners: Callable[[str], list[str]],
) -> dict[str, Change]:
    """Collect the change of each parameter that the adapters change.

    Args:
        model: The architecture with the adapters on it.
        weights: The factor of each adapter.
        configs: PEFT's config of each adapter.
        partners: Returns all names of a tied parameter in the base.

    Returns:
        The changes, by the parameter's name in the base; a tied parameter has an entry under each
        of its names.

    Raises:
        MergeError: A tensor of an adapter would be ignored, or its kind is not supported.
    """
    collected = _Collected()
    inner = model.get_base_model()
    for path, module in inner.named_modules():
        for index, (weight, config) in enumerate(zip(weights, configs, strict=True)):
            collected.add(base_name(path), module, name_of(index), weight, config)
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        if is_placeholder(parameter) or id(parameter) in collected.used:
            continue
        if any(part in name for part in (".lora_", ".modules_to_save.", ".token_adapter.")):
            raise MergeError(f"{name} of the adapter is of a kind that cannot be merged")
        # The adapter's file may hold a base weight, such as a resized embedding. PEFT loads it into
        # the one tensor that tied parameters share.
        for partner in partners(base_name(name)):
            collected.replace(partner, parameter)
    return collected.changes


@dataclass
class _Collected:
    """The changes that were found, by parameter, and the id() of each tensor that they use."""

    changes: dict[str, Change] = field(default_factory=dict)
    used: set[int] = field(default_factory=set)

    def change(self, parameter: str) -> Change:
        """Return the change of a parameter; a new one if it has none."""
        return self.changes.setdefault(parameter, Change())

    def use(self, *tensors: torch.Tensor) -> None:
        """Note tensors that a change expresses."""
        self.used |= {id(tensor) for tensor in tensors}

    def add(self, path: str, module: Any, name: str, weight: float, config: LoraConfig) -> None:
        """Add what one adapter changes at one module.

        Args:
            path: The module's path in the base.
            module: A module of the model; only PEFT's own change anything.
            name: The adapter's name.
            weight: The adapter's factor.
            config: The adapter's settings.
        """
        if isinstance(module, LoraLayer):
            if name in module.scaling:
                self._add_product(path, module, name, weight, config)
        elif isinstance(module, ModulesToSaveWrapper):
            saved = getattr(module.modules_to_save, name, None)
            for inner, parameter in saved.named_parameters() if saved is not None else ():
                self.replace(f"{path}.{inner}", parameter)
        elif isinstance(module, TrainableTokensLayer) and name in module.trainable_tokens_delta:
            values, rows = module.trainable_tokens_delta[name], module.token_indices[name]
            self.use(values)
            change = self.change(f"{path}.weight")
            change.tokens = (torch.tensor(rows), values.detach().float())

    def replace(self, name: str, parameter: torch.Tensor) -> None:
        """Replace a parameter by the adapter's own tensor."""
        if is_placeholder(parameter):
            raise MergeError(
                f"the adapter has no tensor for {name}\n    fix: train or copy it again"
            )
        change = self.change(name)
        if change.replaced is not None and not change.replaced.equal(parameter.detach()):
            raise MergeError(
                f"two adapters hold a different {name}\n    fix: merge one of them, or train them "
                "without modules_to_save"
            )
        change.replaced = parameter.detach()
        self.use(parameter)

    def _add_product(
        self, path: str, module: Any, name: str, weight: float, config: LoraConfig
    ) -> None:
        """Add one adapter's product in one LoRA layer to the layer's change."""
        variant = type(module.lora_variant[name]).__name__ if name in module.lora_variant else None
        if variant is not None and variant not in PLAIN_VARIANTS | DORA_VARIANTS:
            raise MergeError(f"{path} is adapted by {variant}, which cannot be merged")
        scale = module.scaling[name] * weight
        if name in module.lora_embedding_A:
            first, second = module.lora_embedding_A[name], module.lora_embedding_B[name]
            left, right, transposed = first.T[None], second.T[None], True
        else:
            first, second = module.lora_A[name].weight, module.lora_B[name].weight
            transposed = bool(getattr(module, "fan_in_fan_out", False))
            if hasattr(module, "get_delta_factors") and module.num_experts > 1:
                left, right, _ = module.get_delta_factors(name)
            elif transposed:
                left, right = first.T[None], second.T[None]
            else:
                left, right = second[None], first[None]
        change = self.change(f"{path}.{getattr(module, 'parameter_name', 'weight')}")
        # PEFT's factors may be transposed views; products need contiguous rows.
        left, right = left.detach().float().contiguous(), right.detach().float().contiguous()
        change.products.append(LowRank(left, right, scale))
        self.use(first, second)
        if variant in DORA_VARIANTS:
            magnitude = module.lora_magnitude_vector[name].weight
            change.magnitude, change.by_row = magnitude.detach().float().view(-1), not transposed
            self.use(magnitude)
        if name in module.lora_B and getattr(module.lora_B[name], "bias", None) is not None:
            self._add_bias(path, module, module.lora_B[name].bias, scale)
        if restarts(config):
            change.restart = _restart(module, name, str(config.init_lora_weights).lower())

    def _add_bias(self, path: str, module: Any, bias: torch.Tensor, scale: float) -> None:
        """Add the bias of a layer's lora_B to the layer's own."""
        if getattr(module.get_base_layer(), "bias", None) is None:
            raise MergeError(
                f"lora_bias=true, but {path} has no bias to add to\n"
                "    fix: use the adapter without merging it"
            )
        change = self.change(f"{path}.bias")
        added = bias.detach().float() * scale
        change.added = added if change.added is None else change.added + added
        self.use(bias)


def _restart(module: Any, name: str, start: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that subtracts the initial product from a weight, as PEFT does."""
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear

    transposed = bool(getattr(module, "fan_in_fan_out", False))
    rank, alpha, root = module.r[name], module.lora_alpha[name], module.use_rslora[name]

    def restart(weight: torch.Tensor) -> torch.Tensor:
        rows, columns = weight.shape
        layer: Any = nn.Linear(1, 1, bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        layer.in_features, layer.out_features = (rows, columns) if transposed else (columns, rows)
        config = LoraConfig(r=rank, lora_alpha=alpha, use_rslora=root, init_lora_weights=start)
        config.fan_in_fan_out = transposed
        Linear(layer, "restart", config, r=rank, lora_alpha=alpha)
        result: torch.Tensor = layer.weight.data
        return result

    return restart
