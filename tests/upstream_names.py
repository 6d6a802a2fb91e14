"""The names of upstream libraries that sft needs and that no library promises to keep.

``UPSTREAM`` maps an owner (``module`` or ``module:Class``) to the names that sft takes from it:
private ones, public ones of modules that are not documented, and attributes of objects that only
the library's own code sets. A name with parentheses also states how sft calls it: first the
positional parameters in their order, then, after ``*``, those passed by name. The files of sft that
use a name are looked up, not listed, so that moving a file changes nothing here.
"""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import inspect
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PACKAGES = {"hydra": "hydra-core"}  # distributions that are not named as their module is

UPSTREAM: dict[str, tuple[str, ...]] = {
    # The training loop.
    "transformers.trainer:Trainer": (
        *("_determine_best_metric(metrics, trial)", "_evaluate(trial, ignore_keys_for_eval)"),
        "_get_dataloader(*, dataset, description, batch_size, sampler_fn, is_training)",
        *("_get_grad_norm(model, grad_norm)", "_get_learning_rate()", "_globalstep_last_logged"),
        "_load_from_checkpoint(resume_from_checkpoint, model)",
        *(
            "_load_rng_state(checkpoint)",
            "_prepare_inputs(inputs)",
            "_save_checkpoint(model, trial)",
        ),
        "_prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)",
        "_run_epoch(*, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, "
        "trial, ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, "
        "steps_trained_in_current_epoch)",
        *("_tr_loss", "_train_batch_size", "compute_loss_context_manager()", "store_flos()"),
        *("callback_handler", "is_deepspeed_enabled", "model_wrapped", "create_model_card"),
    ),
    "transformers.trainer_callback": ("PrinterCallback", "ProgressCallback"),
    "transformers.trainer_callback:ProgressCallback": ("current_step", "training_bar"),
    "transformers.trainer_callback:TrainerState": ("compute_steps(args, max_steps)",),
    "trl.trainer.sft_trainer:SFTTrainer": ("_metrics", "_total_train_tokens", "aux_loss_enabled"),
    "accelerate.optimizer:AcceleratedOptimizer": ("_is_overflow",),
    "accelerate.data_loader:DataLoaderAdapter": ("base_dataloader",),
    "accelerate.state": ("AcceleratorState", "GradientState"),
    "accelerate.state:AcceleratorState": ("_reset_state(reset_partial_state)",),
    "accelerate.state:GradientState": ("_reset_state()",),
    "torch.optim.lr_scheduler:LambdaLR": ("_last_lr", "_step_count", "base_lrs", "lr_lambdas"),
    # The files that sft.upstream reads setting names from.
    "trl.trainer.base_config": ("_BaseConfig",),
    "transformers.training_args": ("OptimizerNames", "TrainingArguments"),
    "transformers.trainer_utils": ("SchedulerType",),
    "peft.config": ("PeftConfig", "PeftConfigMixin"),
    # The LM head.
    "trl.kernels": ("ChunkedLogProbFunction",),
    "trl.kernels:ChunkedLogProbFunction": (
        "forward(ctx, hidden, weight, bias, targets, temperature, chunk_size, "
        "final_logit_softcapping, logit_scale, outputs)",
    ),
    "trl.trainer.utils": ("maybe_gather_lm_head_ctx",),
    # Attention over documents.
    "transformers.integrations.sdpa_attention": (
        "sdpa_attention_forward(module, query, key, value, attention_mask, *, dropout, scaling)",
    ),
    "transformers.masking_utils": (
        "_preprocess_mask_arguments(config, inputs_embeds, attention_mask, past_key_values, "
        "position_ids, layer_idx, encoder_hidden_states)",
        *("AttentionMaskInterface", "sdpa_mask"),
    ),
    "transformers.configuration_utils:PreTrainedConfig": ("_attn_implementation",),
    "transformers.modeling_utils:PreTrainedModel": (
        *("_supports_attention_backend", "_supports_sdpa"),
    ),
    "torch.nn.attention.varlen": (
        "varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size)",
    ),
    # Products on a CPU: kernels that sft calls or replaces.
    "torch.ops.mkldnn": ("_linear_pointwise", "_reorder_linear_weight"),
    "torch.ops.aten": ("_scaled_dot_product_flash_attention_for_cpu",),
    "torch.nn.modules.module:Module": ("_parameters",),
    # Models: built without weights, found on the hub, renamed as they load.
    "transformers.initialization": ("no_init_weights()",),
    "transformers.integrations": ("is_deepspeed_zero3_enabled()",),
    "transformers.integrations.deepspeed": ("unset_hf_deepspeed_config()",),
    "transformers.pytorch_utils": ("Conv1D",),
    "transformers.utils": ("ModelOutput", "is_torch_tf32_available()"),
    "transformers.utils.logging": ("EmptyTqdm", "set_tqdm_hook(hook)"),
    "transformers.utils.hub": (
        *("cached_file(path_or_repo_id, filename)", "convert_file_size_to_int(size)"),
        "extract_commit_hash(resolved_file, commit_hash)",
        "get_checkpoint_shard_files(pretrained_model_name_or_path, index_filename, *, revision)",
    ),
    "transformers.utils.hub:cached_files": (
        *("_raise_exceptions_for_connection_errors", "_raise_exceptions_for_missing_entries"),
    ),
    "transformers.conversion_mapping": ("get_model_conversion_mapping(model)",),
    "transformers.core_model_loading": (
        "rename_source_key(source_key, weight_renamings, weight_converters, base_model_prefix, "
        "meta_state_dict)",
        *("dot_natural_key(s)", "revert_weight_conversion(model, state_dict)"),
        *("WeightConverter", "WeightRenaming", "Chunk", "Concatenate", "MergeModulelist", "Split"),
    ),
    "transformers.core_model_loading:WeightConverter": (
        *("operations", "source_patterns", "target_patterns"),
    ),
    "transformers.quantizers": ("AutoHfQuantizer",),
    "transformers.quantizers.base:HfQuantizer": ("preprocess_model(model)",),
    "transformers.integrations.bitsandbytes": ("source_cls",),
    "transformers.utils.chat_template_utils": (
        "render_jinja_template(*, conversations, tools, chat_template, add_generation_prompt, "
        "return_assistant_tokens_mask)",
    ),
    "transformers.convert_slow_tokenizer": ("bytes_to_unicode()",),
    # Adapters.
    "peft.tuners.lora": ("Linear", "LoraConfig"),
    "peft.tuners.lora.layer": (
        "Linear(base_layer, adapter_name, config, r, lora_alpha)",
        "LoraLayer",
    ),
    "peft.tuners.lora.layer:LoraLayer": (
        *("lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B"),
        *("lora_magnitude_vector", "lora_variant", "scaling", "use_rslora"),
    ),
    "peft.tuners.lora.layer:ParamWrapper": ("get_delta_factors(adapter_name)", "parameter_name"),
    "peft.tuners.lora.variants": (
        *("DoraEmbeddingVariant", "DoraLinearVariant", "MiCAEmbeddingVariant"),
        *("MiCALinearVariant", "VeloraLinearVariant"),
    ),
    "peft.tuners.trainable_tokens": ("TrainableTokensLayer",),
    "peft.tuners.trainable_tokens.layer:TrainableTokensLayer": (
        *("token_indices", "trainable_tokens_delta"),
    ),
    "peft.tuners.tuners_utils": ("BaseTunerLayer",),
    "peft.utils.other": ("AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"),
    "peft.utils.other:ModulesToSaveWrapper": ("modules_to_save", "original_module"),
    "bitsandbytes.functional": (
        *("dequantize_4bit(A, quant_state)", "int8_vectorwise_dequant(A, stats)"),
    ),
    "bitsandbytes.nn": ("Int8Params", "Linear4bit", "Linear8bitLt", "Params4bit"),
    "bitsandbytes.nn.modules:Int8Params": ("SCB",),
    "bitsandbytes.nn.modules:Linear4bit": ("compute_dtype", "support_avx512bf16_for_cpu"),
    "bitsandbytes.nn.modules:Params4bit": ("quant_state",),
    # ZeRO.
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.runtime.bf16_optimizer:BF16_Optimizer": ("fp32_groups_flat_partition",),
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": (
        *("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state()"),
        *("check_grad_overflow", "loss_scaler", "single_partition_of_fp32_groups"),
    ),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": (
        *("fp32_partitioned_groups_flat", "loss_scaler"),
    ),
    "deepspeed.runtime.zero.partition_parameters": (
        *("ds_id", "ds_numel", "ds_shape", "ds_tensor"),
    ),
    "deepspeed.runtime.zero.partitioned_param_coordinator": ("PartitionedParameterCoordinator",),
    "deepspeed.runtime.zero.partitioned_param_coordinator:PartitionedParameterCoordinator": (
        "_PartitionedParameterCoordinator__params_to_release",
        "_PartitionedParameterCoordinator__submodule_order",
    ),
    "deepspeed.utils": (
        *("safe_get_full_fp32_param(param)", "safe_set_full_fp32_param(param, value)"),
        "safe_get_full_optimizer_state(param, optim_state_key)",
        "safe_set_full_optimizer_state(param, value, optim_state_key)",
        "safe_set_local_fp32_param(param, value)",
        "safe_set_local_optimizer_state(param, value, optim_state_key)",
    ),
    "deepspeed.zero": ("GatheredParameters(params, modifier_rank)",),
    # Ranks, data, the command line.
    "torch.distributed.distributed_c10d": ("PrefixStore",),
    "torch.distributed.rendezvous": ("rendezvous(url)",),
    "datasets.arrow_dataset:Dataset": ("_fingerprint",),
    "hydra._internal.utils": ("get_args_parser()",),
    "hydra.core.override_parser.overrides_parser": ("OverridesParser",),
    "hydra.core.override_parser.types": ("ChoiceSweep", "Quote", "QuotedString"),
    "hydra.core.utils": ("JobReturn", "JobStatus"),
    "hydra.plugins.launcher": ("Launcher",),
}


def problem(owner: str, entry: str, files: str) -> str | None:
    """Check one entry of ``UPSTREAM`` against the installed library.

    Args:
        owner: A key of ``UPSTREAM``.
        entry: One of its names.
        files: The files of sft that use it.

    Returns:
        One sentence that says what is wrong, or None.
    """
    name, _, called = entry.partition("(")
    library = owner.partition(".")[0]
    version = importlib.metadata.version(PACKAGES.get(library, library))
    end = f"in {library} {version}; sft needs it in {files}"
    where = f"{owner.replace(':', '.')}.{name}"
    try:
        module, _, class_name = owner.partition(":")
        place = _resolved(module)
        place = getattr(place, class_name) if class_name else place
    except (ImportError, AttributeError):
        return f"{where} is gone {end}"
    if not _has(place, name):
        return f"{where} is gone {end}" if name not in _assigned(place) else None
    if not called:
        return None
    found = list(inspect.signature(getattr(place, name)).parameters.values())
    wrong = _mismatch(called.rstrip(")"), found[found[:1] != [] and found[0].name == "self" :])
    return f"{where} has changed {end}: {wrong}" if wrong else None


def _resolved(path: str) -> Any:
    """Import a module, or the attribute of one that acts as a module (``torch.ops.mkldnn``)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError:
            above, _, name = path.rpartition(".")
            if not above:
                raise
            return getattr(_resolved(above), name)


def _has(place: Any, name: str) -> bool:
    """Say whether a module or class defines a name, without calling a module's ``__getattr__``."""
    lazy = vars(place).get("__getattr__") if inspect.ismodule(place) else None
    if lazy is not None and name not in vars(place):
        return repr(name).replace("'", '"') in inspect.getsource(lazy)
    return hasattr(place, name)


def _mismatch(called: str, found: list[inspect.Parameter]) -> str | None:
    """Say why a function with these parameters cannot be called as ``UPSTREAM`` states."""
    positional, _, named = called.partition("*")
    first = [name.strip() for name in positional.split(",") if name.strip()]
    rest = [name.strip() for name in named.split(",") if name.strip()]
    names = [parameter.name for parameter in found]
    if names[: len(first)] != first:
        return f"it takes ({', '.join(names)}) instead of ({', '.join(first)}, ...)"
    if lacking := [name for name in rest if name not in names]:
        return f"it does not take {', '.join(lacking)}"
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [
        parameter.name
        for parameter in found
        if parameter.default is parameter.empty and parameter.kind not in free
    ]
    if more := [name for name in required if name not in first + rest]:
        return f"it now requires {', '.join(more)}"
    return None


@functools.cache
def _assigned(place: Any) -> frozenset[str]:
    """Name the parameters of a function, or what a module or a class and its bases assign."""
    if inspect.isfunction(place):
        return frozenset(inspect.signature(place).parameters)
    modules = (
        [place]
        if inspect.ismodule(place)
        else [sys.modules[base.__module__] for base in inspect.getmro(place) if base is not object]
    )
    classes = None if inspect.ismodule(place) else {base.__name__ for base in inspect.getmro(place)}
    found: set[str] = set()
    for module in modules:
        if file := getattr(module, "__file__", None):
            found |= _stored(Path(file), None if classes is None else frozenset(classes))
    return frozenset(found)


@functools.cache
def _stored(file: Path, classes: frozenset[str] | None) -> frozenset[str]:
    """Name the attributes that a file assigns: in these classes, or anywhere (None)."""
    if file.suffix != ".py":
        return frozenset()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts: Iterator[ast.AST] = ast.walk(tree)
    if classes is not None:
        parts = (
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and node.name in classes
            for inner in ast.walk(node)
        )
    found = set()
    for node in parts:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found |= {node.target.id} if node.value is None else set()
    # Inside a class, self.__name is stored under the class's name.
    return frozenset(
        found
        | {f"_{name}{attr}" for name in classes or () for attr in found if attr.startswith("__")}
    )
