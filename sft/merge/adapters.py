"""Read from PEFT how adapters change each parameter of the base.

PEFT loads the adapters onto an architecture whose weights take no memory, so that its rules for
patterns, names and tied weights apply. Tensors and settings that PEFT would ignore are refused.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sft.errors import MergeError
from sft.merge.change import Change, LowRank

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

logger = logging.getLogger("sft")

WEIGHTS = "adapter_model.safetensors"
# Variants of PEFT's LoRA whose forward pass equals adding a product to the weight.
PLAIN_VARIANTS = {"MiCALinearVariant", "MiCAEmbeddingVariant", "VeloraLinearVariant"}
DORA_VARIANTS = {"DoraLinearVariant", "DoraEmbeddingVariant"}
# Settings that cannot be expressed as weights, or that this module does not support.
REFUSED = (
    *("layer_replication", "alora_invocation_tokens", "arrow_config", "use_qalora", "use_bdlora"),
    *("monteclora_config", "kasa_config", "megatron_config"),
)
# These initialisations change the base before the first step, with data that only training had.
UNKNOWN_STARTS = ("corda", "lora_ga", "loftq")
RESTARTING = ("pissa", "olora")  # these subtract the adapter's initial product from the base
_NOTHING = torch.zeros(())


def with_placeholders(architecture: PreTrainedModel) -> PreTrainedModel:
    """Replace meta weights by CPU tensors that expand one shared scalar: real shapes, no memory."""
    architecture.tie_weights()
    # Keeps the original parameters alive: the keys are their id(), which Python would reuse.
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in architecture.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = nn.Parameter(_NOTHING.expand(parameter.shape), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), (empty, parameter))[0]
    return architecture


def is_placeholder(tensor: torch.Tensor) -> bool:
    """Return whether a weight is still a placeholder, because nothing was loaded for it."""
    return tensor.data_ptr() == _NOTHING.data_ptr() or (
        tensor.untyped_storage().nbytes() < tensor.nbytes
    )


def check_file(folder: Path) -> dict[str, tuple[int, ...]]:
    """Refuse an adapter that is damaged, empty, not finite, or whose lora_B are all zero.

    Under ZeRO-3, users got 40-byte files after days of training (TRL #4416, PEFT #2892).

    Returns:
        The shapes of its tensors by name.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    if not path.is_file():
        states = sorted(item.name for item in folder.glob("*zero_pp_rank_*")) or sorted(
            item.name for item in folder.glob("global_step*")
        )
        if states:
            raise MergeError(
                f"{folder} holds DeepSpeed's shards ({states[0]}), not an adapter\n"
                "    fix: adapter=FOLDER with adapter_model.safetensors (a run has it in adapter/)"
            )
        raise MergeError(f"there is no {path}\n    fix: adapter=FOLDER with safetensors weights")
    shapes: dict[str, tuple[int, ...]] = {}
    empty, broken, trained, zero = [], [], 0, 0
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if tensor.numel() == 0:
                    empty.append(name)
                    continue
                low, high = torch.aminmax(tensor)  # one pass; NaN if the tensor holds one
                broken += [name] * (not (low.isfinite() and high.isfinite()))
                if "lora_B" in name or "lora_embedding_B" in name:
                    trained += bool(low or high)
                    zero += not (low or high)
    except SafetensorError as error:
        raise MergeError(f"{path} is damaged: {error}\n    fix: train or copy it again") from None
    if not shapes or empty:
        raise MergeError(f"{path} holds empty tensors {empty[:3]}\n    fix: train it again")
    if broken:
        raise MergeError(
            f"{path} holds NaN or infinite values in {broken[:3]}\n"
            "    fix: train again with a lower learning rate"
        )
    if zero and not trained:
        raise MergeError(f"every lora_B of {path} is zero: the adapter changes nothing")
    if zero:
        logger.info("warning: %d of %d lora_B in %s are zero", zero, zero + trained, path)
    return shapes


def read_config(folder: Path) -> LoraConfig:
    """Read an adapter's settings, and refuse what cannot be merged.

    Raises:
        MergeError: It is not LoRA, or its effect cannot be written as a change of weights.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(str(folder))
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        raise MergeError(f"{folder} is {kind}, not LoRA\n    fix: merge it in memory, with PEFT")
    for name in REFUSED:
        if getattr(config, name, None):
            raise MergeError(
                f"{folder} uses {name}, which cannot be merged\n"
                "    fix: use the adapter without merging it"
            )
    start = config.init_lora_weights
    if isinstance(start, str) and start.startswith((*UNKNOWN_STARTS, "pissa_niter")):
        raise MergeError(
            f"{folder} has init_lora_weights={start}, which changed the base in a way that the "
            "adapter's files do not record\n"
            "    fix: save it with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def name_of(index: int) -> str:
    """Return the name that an adapter gets on the model."""
    return f"adapter{index}"


def attach(
    model: PreTrainedModel, folders: Sequence[Path], configs: Sequence[LoraConfig]
) -> PeftModel:
    """Load adapters onto the architecture, under the names of ``name_of``.

    Raises:
        MergeError: An adapter does not fit the base: modules, shapes or tensors differ.
    """
    from peft import PeftModelForCausalLM
    from transformers.initialization import no_init_weights

    peft_model: Any = None
    for index, (folder, config) in enumerate(zip(folders, configs, strict=True)):
        config = copy.copy(config)
        config.inference_mode = True
        if str(config.init_lora_weights).lower() in RESTARTING:
            config.init_lora_weights = True  # skip the initialisation; see _restart
        try:
            with warnings.catch_warnings(), no_init_weights():
                warnings.simplefilter("ignore")
                if peft_model is None:
                    peft_model = PeftModelForCausalLM(
                        model, config, adapter_name=name_of(0), low_cpu_mem_usage=True
                    )
                result = peft_model.load_adapter(
                    str(folder), name_of(index), torch_device="cpu", low_cpu_mem_usage=True
                )
        except (ValueError, KeyError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise MergeError(
                f"{folder} does not fit the base: {reason}\n    fix: base=THE_ONE_IT_WAS_TRAINED_ON"
            ) from error
        wrong = [*result.unexpected_keys, *result.missing_keys]
        if wrong:
            raise MergeError(
                f"{len(result.unexpected_keys)} tensors of {folder} do not exist in the base, and "
                f"{len(result.missing_keys)} tensors are missing, such as {wrong[0]}\n"
                "    fix: base=THE_ONE_IT_WAS_TRAINED_ON"
            )
    return peft_model


def changes(
    model: PeftModel,
    weights: Sequence[float],
    starts: Sequence[Any],
    partners: Callable[[str], list[str]],
) -> dict[str, Change]:
    """Collect the change of each parameter that the adapters change.

    Args:
        model: The architecture with the adapters on it.
        weights: The factor of each adapter.
        starts: Each adapter's ``init_lora_weights``.
        partners: Returns all names of a tied parameter in the base.

    Returns:
        The changes, by the parameter's name in the base; a tied parameter has an entry under each
        of its names.

    Raises:
        MergeError: A tensor of an adapter would be ignored, or its kind is not supported.
    """
    from peft.tuners.lora.layer import LoraLayer
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.utils.other import ModulesToSaveWrapper

    found: dict[str, Change] = {}
    used: set[int] = set()

    def change(name: str) -> Change:
        return found.setdefault(name, Change())

    inner = model.get_base_model()
    for path, module in inner.named_modules():
        place = base_name(path)
        if isinstance(module, LoraLayer):
            for index, weight in enumerate(weights):
                name = name_of(index)
                if name in module.scaling:
                    _add_product(change, place, module, name, weight, starts[index], used)
        elif isinstance(module, ModulesToSaveWrapper):
            for index in range(len(weights)):
                saved = getattr(module.modules_to_save, name_of(index), None)
                for name, parameter in saved.named_parameters() if saved is not None else ():
                    _replace(change(f"{place}.{name}"), f"{place}.{name}", parameter, used)
        elif isinstance(module, TrainableTokensLayer):
            for index in range(len(weights)):
                if name_of(index) in module.trainable_tokens_delta:
                    values = module.trainable_tokens_delta[name_of(index)]
                    rows = torch.tensor(module.token_indices[name_of(index)])
                    _claim(used, values)
                    change(f"{place}.weight").tokens = (rows, values.detach().float())
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        if is_placeholder(parameter) or id(parameter) in used:
            continue
        if any(part in name for part in (".lora_", ".modules_to_save.", ".token_adapter.")):
            raise MergeError(f"{name} of the adapter is of a kind that cannot be merged")
        # The adapter's file may hold a base weight, such as a resized embedding. PEFT loads it into
        # the one tensor that tied parameters share.
        for partner in partners(base_name(name)):
            _replace(change(partner), partner, parameter, used)
    return found


def base_name(path: str) -> str:
    """Convert the path of a module or parameter of a PEFT model to the base's."""
    wrappers = {"base_layer", "original_module", "token_adapter"}
    return ".".join(part for part in path.split(".") if part not in wrappers)


def _claim(used: set[int], *tensors: torch.Tensor) -> None:
    for tensor in tensors:
        used.add(id(tensor))


def _replace(change: Change, name: str, parameter: torch.Tensor, used: set[int]) -> None:
    if is_placeholder(parameter):
        raise MergeError(f"the adapter has no tensor for {name}\n    fix: train or copy it again")
    if change.replaced is not None and not change.replaced.equal(parameter.detach()):
        raise MergeError(
            f"two adapters hold a different {name}\n    fix: merge one of them, or train them "
            "without modules_to_save"
        )
    change.replaced = parameter.detach()
    _claim(used, parameter)


def _add_product(
    change: Callable[[str], Change],
    place: str,
    module: Any,
    name: str,
    weight: float,
    start: Any,
    used: set[int],
) -> None:
    """Add one adapter's product in one PEFT layer to the layer's change."""
    variant = type(module.lora_variant[name]).__name__ if name in module.lora_variant else None
    if variant is not None and variant not in PLAIN_VARIANTS | DORA_VARIANTS:
        raise MergeError(f"{place} is adapted by {variant}, which cannot be merged")
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
    parameter = f"{place}.{getattr(module, 'parameter_name', 'weight')}"
    entry = change(parameter)
    # PEFT's factors may be transposed views; products need contiguous rows.
    left, right = left.detach().float().contiguous(), right.detach().float().contiguous()
    entry.products.append(LowRank(left, right, scale))
    _claim(used, first, second)
    if variant in DORA_VARIANTS:
        magnitude = module.lora_magnitude_vector[name].weight
        entry.magnitude, entry.by_row = magnitude.detach().float().view(-1), not transposed
        _claim(used, magnitude)
    bias = getattr(module.lora_B[name], "bias", None) if name in module.lora_B else None
    if bias is not None:
        if getattr(module.get_base_layer(), "bias", None) is None:
            raise MergeError(
                f"lora_bias=true, but {place} has no bias to add to\n"
                "    fix: use the adapter without merging it"
            )
        other = change(f"{place}.bias")
        added = bias.detach().float() * scale
        other.added = added if other.added is None else other.added + added
        _claim(used, bias)
    if str(start).lower() in RESTARTING:
        entry.restart = _restart(module, name, str(start).lower())


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
