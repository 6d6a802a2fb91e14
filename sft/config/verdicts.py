"""What becomes of each field of trl.SFTConfig and peft.LoraConfig, and of each DeepSpeed key.

A field has one verdict: a setting of ours decides it (declared with the setting, or ``OWNED``), it
is passed on (``PASSED``), or it is refused with a reason (``REFUSED``). ``tests/unit/
test_verdicts.py`` compares them with the installed libraries, so that a field which an update adds
gets a verdict before it can be used.
"""

from __future__ import annotations

# Fields of SFTConfig that sft sets itself, or must not have; the tables of keys (``foreign_*.py``)
# say what to do instead.
TRAIN_OWNED = frozenset(
    (
        *("use_cpu", "local_rank", "hub_token", "save_only_model", "ignore_data_skip"),
        *("restore_callback_states_from_checkpoint", "save_on_each_node", "push_to_hub"),
        *("hub_strategy", "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision"),
        *("dataloader_multiprocessing_context", "accelerator_config", "load_best_model_at_end"),
        *("enable_jit_checkpoint", "average_tokens_across_devices", "label_smoothing_factor"),
        *("dataloader_drop_last", "disable_tqdm", "assistant_only_loss", "chat_template_path"),
        *("completion_only_loss", "dataset_kwargs", "dataset_num_proc", "dataset_text_field"),
        *("eos_token", "eval_packing", "label_names", "packing", "packing_strategy", "pad_token"),
        *("padding_free", "remove_unused_columns", "shuffle_dataset", "truncation_mode"),
    )
)
# Fields of SFTConfig that would have no effect, because sft does otherwise: the reason.
_ORDER = "the seed alone decides the order of the rows; train.padding_free joins rows of any length"
_EVALUATION = "sft computes the evaluation itself: the mean loss over all held-out tokens"
TRAIN_REFUSED = {
    **dict.fromkeys(
        ("train_sampling_strategy", "length_column_name", "dataloader_in_order"), _ORDER
    ),
    **dict.fromkeys(
        (
            *("batch_eval_metrics", "eval_accumulation_steps", "eval_do_concat_batches"),
            *("eval_use_gather_object", "include_for_metrics", "prediction_loss_only"),
        ),
        _EVALUATION,
    ),
    **dict.fromkeys(
        ("do_train", "do_eval", "do_predict"),
        "a run trains, and evaluates if there are held-out rows",
    ),
    **dict.fromkeys(
        ("trackio_bucket_id", "trackio_space_id", "trackio_static_space_id"),
        "tracker=trackio writes to this machine, and the command trackio sync uploads it",
    ),
    "use_cache": "training never uses the cache of keys and values",
}
# Fields of SFTConfig that are passed on as they are.
TRAIN_PASSED = frozenset(
    (
        *("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
        *("activation_offloading", "torch_empty_cache_steps", "full_determinism"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules"),
        *("dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
        *("ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_static_graph"),
        *("ddp_find_unused_parameters", "ddp_timeout", "debug", "eval_delay"),
        "include_num_input_tokens_seen",
        *("liger_kernel_config", "use_liger_kernel", "loss_type", "router_aux_loss_coef"),
        *("log_level", "log_level_replica", "log_on_each_node", "logging_first_step"),
        *("logging_nan_inf_filter", "neftune_noise_alpha", "report_to"),
        *("skip_memory_metrics", "tf32", "torch_compile", "torch_compile_backend"),
        "torch_compile_mode",
    )
)

# Fields of LoraConfig.
LORA_OWNED = frozenset(("task_type", "peft_type", "inference_mode", "fan_in_fan_out"))
_PASS = "sft does not run the pass over data that this initialisation needs"
_UNSUPPORTED = "sft trains no adapter of this kind"
LORA_REFUSED = {
    **dict.fromkeys(("corda_config", "eva_config", "loftq_config", "lora_ga_config"), _PASS),
    **dict.fromkeys(("megatron_config", "megatron_core", "arrow_config"), _UNSUPPORTED),
    **dict.fromkeys(("auto_mapping", "peft_version", "runtime_config"), "PEFT writes it itself"),
}
LORA_PASSED = frozenset(
    (
        *("alora_invocation_tokens", "bias", "ensure_weight_tying", "exclude_modules"),
        *("init_lora_weights", "kasa_config", "layer_replication", "layers_pattern"),
        *("layers_to_transform", "lora_bias", "monteclora_config", "qalora_group_size"),
        *("target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora"),
        "velora_config",
    )
)

# Keys of the DeepSpeed JSON that would change what is trained: the reason for the refusal. A
# section that is switched off, such as {"enabled": false}, is left out instead.
_TRAINED = "would change what is trained"
_PARALLEL = "sft splits optimizer, gradients and parameters over ranks, and nothing else"
_ZERO = "zero_optimization."
DEEPSPEED_REFUSED: dict[str, str] = {
    "tensor_parallel": "AutoTP computes a wrong loss: the fused LM head reads one shard of the "
    "vocabulary",
    "autotuning": "autotuning would change the batch, which train.global_batch_size sets",
    "elasticity": "elasticity would change the batch, which train.global_batch_size sets",
    **dict.fromkeys(
        (
            *("compression_training", "curriculum_learning", "data_efficiency", "eigenvalue"),
            *("progressive_layer_drop", "quantize_training", "sparse_attention"),
            *("sparse_gradients", "weight_quantization", "gradient_allreduce_op"),
            "managed_gradient_accumulation",
        ),
        _TRAINED,
    ),
    **dict.fromkeys(("expert_parallel", "use_data_before_expert_parallelism"), _PARALLEL),
    f"{_ZERO}zenflow": "ZenFlow changes the losses of the stage",
}
# Keys that settings of the run decide, so that a JSON of another tool loses no run: ``zero_json``
# says both values. ``optimizer`` and ``scheduler`` are left out, the others become "auto", which
# the Trainer replaces by the values of these settings.
DEEPSPEED_DECIDED = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.per_device_train_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "optimizer": "train.optim",
    "scheduler": "train.lr_scheduler_type",
}
# Keys without effect in a run of sft: why, and the setting to use instead, if there is one. A JSON
# may hold them; they are left out.
_CHECKPOINT = "sft writes its own checkpoints, which DeepSpeed does not read", ""
_TRACKER = "metrics are logged by sft", "tracker=tensorboard"
_PRECISION = "the precision is a setting of the run", "precision=bf16"
_UNUSED = "sft does not use it", ""
_UNKNOWN = "DeepSpeed has no such key", ""
# Keys that other tools write, and that no DeepSpeed reads.
DEEPSPEED_FOREIGN = ("comms_config", "monitor_config", "fp8", "sparse_checkpoint")
DEEPSPEED_DROPPED: dict[str, tuple[str, str]] = {
    "activation_checkpointing": (
        "Transformers recomputes activations, and DeepSpeed does not",
        "train.gradient_checkpointing=true",
    ),
    "compile": ("DeepSpeed's compiler is not used", "train.extra.torch_compile=true"),
    "dataloader_drop_last": ("sft makes the batches, and leaves out no row", ""),
    "hybrid_engine": ("it generates text while it trains, which sft does not", ""),
    "pipeline": (_PARALLEL, ""),
    **dict.fromkeys(("amp", "torch_autocast"), _PRECISION),
    **dict.fromkeys(("tensorboard", "wandb", "comet", "csv_monitor"), _TRACKER),
    **dict.fromkeys(("checkpoint", "datastates_ckpt", "nebula"), _CHECKPOINT),
    **dict.fromkeys(
        (
            *("disable_python_gc", "graph_harvesting", "log_level", "timers", "vocabulary_size"),
            "seq_parallel_communication_data_type",
        ),
        _UNUSED,
    ),
    **dict.fromkeys(
        (
            *(f"{_ZERO}elastic_checkpoint", f"{_ZERO}load_from_fp32_weights"),
            *(f"{_ZERO}pipeline_loading_checkpoint", f"{_ZERO}save_muon_momentum_buffer_in_memory"),
        ),
        _CHECKPOINT,
    ),
    **dict.fromkeys(DEEPSPEED_FOREIGN, _UNKNOWN),
}
# Older names, which DeepSpeed still reads; ``zero_json`` writes the present ones.
DEEPSPEED_RENAMED = {
    "bfloat16": "bf16",
    f"{_ZERO}cpu_offload": f"{_ZERO}offload_optimizer",
    f"{_ZERO}cpu_offload_param": f"{_ZERO}offload_param",
    f"{_ZERO}cpu_offload_use_pin_memory": f"{_ZERO}offload_optimizer.pin_memory",
    f"{_ZERO}stage3_gather_fp16_weights_on_model_save": (
        f"{_ZERO}stage3_gather_16bit_weights_on_model_save"
    ),
}
# Keys that are passed on, by section; "" is the top level.
DEEPSPEED_PASSED: dict[str, frozenset[str]] = {
    section: frozenset(names.split())
    for section, names in {
        "": "steps_per_print dump_state disable_allgather communication_data_type "
        "prescale_gradients gradient_predivide_factor wall_clock_breakdown memory_breakdown "
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer zero_optimization bf16 fp16 "
        "comms_logger aio data_types flops_profiler",
        "zero_optimization": "allgather_bucket_size allgather_partitions allgather_sequential "
        "compute_grad_norm contiguous_gradients enable_sanity_checks "
        "gather_16bit_weights_on_model_save ignore_unused_parameters leaf_module legacy_stage1 "
        "log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear "
        "model_persistence_threshold module_granularity_threshold offload_optimizer offload_param "
        "overlap_comm override_module_apply param_persistence_threshold parameter_alignment "
        "prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients stage "
        "stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save "
        "stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold "
        "stage3_module_granularity_threshold stage3_param_persistence_threshold "
        "stage3_prefetch_bucket_size stage3_use_all_reduce_for_fetch_params sub_group_size "
        "use_all_reduce_for_fetch_params use_multi_rank_bucket_allreduce zero_hpz_partition_size "
        "zero_quantized_gradients zero_quantized_nontrainable_weights zero_quantized_weights",
        "zero_optimization.offload_optimizer": "buffer_count cpuadam_cores_perc device fast_init "
        "nvme_path pin_memory pipeline_read pipeline_write ratio super_offload",
        "zero_optimization.offload_param": "buffer_count buffer_size device max_in_cpu nvme_path "
        "pin_memory",
        "zero_optimization.leaf_module": "classes name_suffixes names",
        "bf16": "bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow enabled "
        "immediate_grad_update",
        "fp16": "auto_cast consecutive_hysteresis enabled fp16_master_weights_and_grads hysteresis "
        "initial_scale_power loss_scale loss_scale_window min_loss_scale",
        "comms_logger": "debug enabled prof_all prof_ops verbose",
        "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
        "data_types": "grad_accum_dtype",
        "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules "
        "detailed output_file",
    }.items()
}
