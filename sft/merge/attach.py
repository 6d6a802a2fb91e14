"""Load adapters onto a base with PEFT, for generation and for merging.

Tensors and settings that PEFT would ignore are refused.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.errors import MergeError
from sft.merge.adapter_files import is_lora, require_quick_patterns, restarts
from sft.model.config_checks import MOST_LAYERS
from sft.model.source import named
from sft.model.tokens import grow

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

# Tensors that PEFT makes from others as it loads an adapter, and reports as missing.
MADE_ELSEWHERE = ("vblora_vector_bank", "prompt_encoder")


def name_of(index: int) -> str:
    """Return the name that an adapter gets on the model."""
    return f"adapter{index}"


def attach(
    model: PreTrainedModel,
    folders: Sequence[Path],
    configs: Sequence[PeftConfig],
    device: str = "cpu",
    loaded: bool = False,
) -> PeftModel:
    """Load adapters onto a base, under the names of ``name_of``.

    Args:
        model: The base, or its architecture without weights.
        folders: The adapters' folders.
        configs: Their settings.
        device: Where the adapters' tensors are put.
        loaded: Whether the base has its weights; some adapters change these as they are made.

    Raises:
        MergeError: An adapter does not fit the base: modules, shapes or tensors differ.
    """
    from peft import PeftModelForCausalLM
    from transformers.initialization import no_init_weights

    peft_model: Any = None
    fix = f"{named().name}=THE_ONE_IT_WAS_TRAINED_ON"
    for index, (folder, config) in enumerate(zip(folders, configs, strict=True)):
        paths = [path for path, _ in model.named_modules()]
        require_quick_patterns(folder, config, paths)
        config = copy.deepcopy(config)
        config.inference_mode = True
        # The others take the shapes that the settings name, and real memory for them.
        empty = is_lora(config) and not (loaded and restarts(config))
        if restarts(config) and not loaded:
            config.init_lora_weights = True  # skip the initialisation; see _restart
        initialised = contextlib.nullcontext() if loaded else no_init_weights()
        try:
            _require_modules(config, paths)
            with warnings.catch_warnings(), initialised, names_kept():
                warnings.simplefilter("ignore")
                if peft_model is None:
                    peft_model = PeftModelForCausalLM(
                        model, config, adapter_name=name_of(0), low_cpu_mem_usage=empty
                    )
                result = peft_model.load_adapter(
                    str(folder), name_of(index), torch_device=device, low_cpu_mem_usage=empty
                )
        except Exception as error:  # the settings may hold anything, and PEFT checks little of it
            raise MergeError(
                f"{folder} does not fit the base: {_reason(error)}\n    fix: {fix}"
            ) from error
        missing = [name for name in result.missing_keys if not any(map(name.count, MADE_ELSEWHERE))]
        wrong = [*result.unexpected_keys, *missing]
        if wrong:
            raise MergeError(
                f"{len(result.unexpected_keys)} tensors of {folder} do not exist in the base, and "
                f"{len(missing)} tensors are missing, such as {wrong[0]}\n    fix: {fix}"
            )
    return peft_model


def convert_saved(model: PeftModel) -> None:
    """Convert the modules that an adapter holds whole to the precision of those they replace.

    PEFT converts the inputs of LoRA's layers only. Training saves such modules in float32, or under
    DeepSpeed in the run's precision, whatever the base's is.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            values = module.original_module.parameters()
            dtype = next((value.dtype for value in values if value.is_floating_point()), None)
            for parameter in module.modules_to_save.parameters():  # tied ones stay tied
                parameter.data = parameter.data.to(dtype)


def _require_modules(config: PeftConfig, paths: Sequence[str]) -> None:
    """Check what PEFT does not: modules that are saved whole, and the number of repeated layers.

    Raises:
        ValueError: The base has no such module, or there would be more layers than any model has.
    """
    for name in getattr(config, "modules_to_save", None) or ():
        if not any(path.endswith(name) for path in paths):  # as PEFT matches them
            raise ValueError(f"modules_to_save={name} matches no module of the base")
    repeated = getattr(config, "layer_replication", None) or ()
    if (layers := sum(end - start for start, end in repeated)) > MOST_LAYERS:
        raise ValueError(f"layer_replication makes {layers:,} layers, more than {MOST_LAYERS:,}")


@contextlib.contextmanager
def names_kept() -> Iterator[None]:
    """Within, PEFT loads an adapter whose tensors have the model's own names without renaming them.

    PEFT applies to every adapter the renamings with which Transformers reads old checkpoints. Not
    all of them leave new names unchanged: the pattern ``mlp.shared_expert.`` of Laguna, a regular
    expression, also matches ``mlp.shared_experts``.
    """
    import peft.utils.transformers_weight_conversion as conversion
    from peft import get_peft_model_state_dict

    module: Any = conversion
    stock = module.convert_peft_adapter_state_dict_for_transformers

    def convert(model: Any, peft_config: Any, adapter_state_dict: Any, adapter_name: str) -> Any:
        if is_lora(peft_config):
            options = {"adapter_name": adapter_name, "save_embedding_layers": False}
            own = get_peft_model_state_dict(model, **options)
            if _lora_shapes(own) == _lora_shapes(adapter_state_dict):
                return adapter_state_dict
        return stock(model, peft_config, adapter_state_dict, adapter_name)

    module.convert_peft_adapter_state_dict_for_transformers = convert
    try:
        yield
    finally:
        module.convert_peft_adapter_state_dict_for_transformers = stock


def _lora_shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in tensors.items() if ".lora_" in name}


def _reason(error: Exception) -> str:
    """Return the first line that says something: torch begins with the name of the method."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [repr(error)]
    return lines[1] if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def resize_embedding(
    model: PreTrainedModel,
    shapes: Sequence[dict[str, tuple[int, ...]]],
    configs: Sequence[PeftConfig],
) -> int | None:
    """Resize the embedding to the adapter's vocabulary.

    Args:
        model: The base.
        shapes: The shapes of each adapter's tensors, by name.
        configs: Their settings, which may name rows that are trained one by one.

    Returns:
        The new number of rows; None if no adapter has other rows than the base.
    """
    embedding = model.get_input_embeddings()
    before = embedding.num_embeddings
    paths = [name for name, module in model.named_modules() if module is embedding]
    paths += [
        name for name, module in model.named_modules() if module is model.get_output_embeddings()
    ]
    endings = tuple(f"{path}{part}.weight" for path in paths for part in ("", ".base_layer"))
    for tensors in shapes:
        for tensor, shape in tensors.items():
            if tensor.endswith(endings) and shape[0] != before:
                if shape[0] < before:
                    model.resize_token_embeddings(shape[0], mean_resizing=False)
                grow(model, shape[0])
                return shape[0]
    needed = max((row + 1 for config in configs for row in _rows(config)), default=0)
    grow(model, needed)
    return needed if needed > before else None


def _rows(config: PeftConfig) -> list[int]:
    """List the rows of embedding and head that an adapter trains one by one."""
    given = getattr(config, "trainable_token_indices", None) or []
    lists = given.values() if isinstance(given, dict) else [given]
    return [row for rows in lists for row in rows]
