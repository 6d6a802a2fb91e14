"""The names of upstream libraries that sft needs and that no library promises to keep.

``UPSTREAM`` maps an owner (``module`` or ``module:Class``) to the names that sft takes from it:
private ones, public ones of modules that are not documented, and attributes of objects that only
the library's own code sets. A name with parentheses also states how sft calls it: first the
positional parameters in their order, then, after ``*``, those passed by name. The files of sft that
use a name are looked up, not listed, so that moving a file changes nothing here.
"""

UPSTREAM: dict[str, tuple[str, ...]] = {
    # The training loop.
    "transformers.trainer:Trainer": (
        *("_determine_best_metric(metrics, trial)", "_evaluate(trial, ignore_keys_for_eval)"),
        "_finalize_training(trial, num_train_samples, start_time)",
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
    "transformers.trainer_callback:TrainerState": ("compute_steps(args, max_steps)",),
    "trl.trainer.sft_trainer:SFTTrainer": ("_metrics", "_total_train_tokens", "aux_loss_enabled"),
    "trl.trainer": ("sft_trainer",),
    "trl.trainer.sft_trainer": ("get_peft_model",),
    "accelerate.accelerator:Accelerator": ("optimizer_step_was_skipped", "scaler"),
    "accelerate.optimizer:AcceleratedOptimizer": ("_is_overflow", "optimizer"),
    "accelerate.scheduler:AcceleratedScheduler": ("scheduler",),
    "accelerate.data_loader:DataLoaderAdapter": ("base_dataloader",),
    "accelerate.state": ("AcceleratorState", "GradientState"),
    "accelerate.state:AcceleratorState": ("_reset_state(reset_partial_state)",),
    "accelerate.state:GradientState": ("_reset_state()",),
    "torch.utils.data:DataLoader": ("_iterator",),
    # Operations of scans.
    "torch.utils._python_dispatch": ("TorchDispatchMode",),
    "torch.ops.aten.mm.default": ("_overloadpacket",),
    # Profiles.
    "torch.autograd": ("_profiler_enabled",),
    "torch.cuda.memory": (
        "_record_memory_history(*, enabled, context, stacks, max_entries)",
        "_snapshot()",
    ),
    "torch.optim:AdamW": ("_step_supports_amp_scaling",),
    "torch.optim.lr_scheduler:LambdaLR": ("_last_lr", "_step_count", "base_lrs", "lr_lambdas"),
    # The files that sft.config.upstream reads setting names from.
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
    "trl.trainer.utils:FusedCausalLMOutput": ("label_mask", "log_probs", "loss"),
    # What some architectures do to their logits and scores: sft takes a missing one for none.
    "transformers.models.cohere.configuration_cohere:CohereConfig": ("logit_scale",),
    "transformers.models.deepseek_v32.configuration_deepseek_v32:DeepseekV32Config": (
        "index_topk",
    ),
    "transformers.models.falcon_h1.configuration_falcon_h1:FalconH1Config": ("lm_head_multiplier",),
    "transformers.models.gemma2.configuration_gemma2:Gemma2Config": (
        *("attn_logit_softcapping", "final_logit_softcapping"),
    ),
    "transformers.models.granite.configuration_granite:GraniteConfig": ("logits_scaling",),
    "transformers.models.muse_spark.configuration_muse_spark:MuseSparkTextConfig": (
        "output_multiplier",
    ),
    # Attention over documents.
    "transformers.integrations.sdpa_attention": (
        "sdpa_attention_forward(module, query, key, value, attention_mask, *, dropout, scaling)",
    ),
    "transformers.masking_utils": (
        "_preprocess_mask_arguments(config, inputs_embeds, attention_mask, past_key_values, "
        "position_ids, layer_idx, encoder_hidden_states)",
        *("AttentionMaskInterface", "sdpa_mask"),
    ),
    "transformers.configuration_utils:PreTrainedConfig": ("_attn_implementation", "_name_or_path"),
    "transformers.modeling_rope_utils": ("RopeParameters",),
    "transformers.modeling_utils:PreTrainedModel": (
        *("_can_record_outputs", "_supports_attention_backend", "_supports_sdpa"),
        "_get_dtype_plan(dtype)",
        "_keep_in_fp32_modules",
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
    "transformers.utils": (
        "ModelOutput",
        "find_adapter_config_file(model_id, cache_dir, force_download, proxies, token, revision, "
        "local_files_only, subfolder)",
        "is_torch_tf32_available()",
    ),
    "transformers.utils.import_utils": (
        *("KERNELS_MAX_VERSION", "KERNELS_MIN_VERSION", "is_kernels_available()"),
        "enable_tf32",
    ),
    "transformers.utils.import_utils.enable_tf32": ("cache_clear",),
    "transformers.utils.logging": ("EmptyTqdm", "set_tqdm_hook(hook)"),
    "datasets.utils": ("tqdm",),
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
        "_weight_conversions",
        *("WeightConverter", "WeightRenaming", "Chunk", "Concatenate", "MergeModulelist", "Split"),
    ),
    "transformers.core_model_loading:WeightConverter": (
        *("operations", "source_patterns", "target_patterns"),
    ),
    "transformers.quantizers": ("AutoHfQuantizer",),
    "transformers.quantizers.quantizers_utils": ("should_convert_module(full_name, patterns)",),
    "transformers.quantizers.base:HfQuantizer": ("is_quantized", "preprocess_model(model)"),
    "transformers.quantizers.quantizer_bnb_4bit": ("is_loaded_in_4bit",),
    "transformers.quantizers.quantizer_bnb_8bit": ("is_loaded_in_8bit",),
    "transformers.integrations.bitsandbytes": ("source_cls",),
    "transformers.utils.chat_template_utils": (
        "_compile_jinja_template(chat_template)",
        "render_jinja_template(*, conversations, tools, chat_template, add_generation_prompt, "
        "return_assistant_tokens_mask)",
    ),
    "transformers.convert_slow_tokenizer": ("bytes_to_unicode()",),
    # Adapters.
    "peft.tuners.lora": ("Embedding", "Linear", "LoraConfig"),
    "peft.tuners.lora.layer": (
        "Linear(base_layer, adapter_name, config, r, lora_alpha)",
        *("LoraLayer", "ParamWrapper"),
    ),
    "peft.tuners.lora.layer:LoraLayer": (
        *("lora_A", "lora_B", "lora_dropout", "lora_embedding_A", "lora_embedding_B"),
        *("lora_magnitude_vector", "lora_variant", "scaling", "use_rslora"),
    ),
    "peft.tuners.lora.layer:Linear": (
        *("active_adapters", "disable_adapters", "fan_in_fan_out", "merged"),
    ),
    "peft.tuners.lora.layer:ParamWrapper": (
        *("get_delta_factors(adapter_name)", "num_experts", "parameter_name"),
    ),
    # A merge refuses adapters by these settings, and takes a missing one for unset.
    "peft.tuners.lora.config:LoraConfig": (
        *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication"),
        *("megatron_config", "monteclora_config", "use_bdlora", "use_qalora"),
    ),
    "peft.tuners.lora.variants": (
        *("DoraEmbeddingVariant", "DoraLinearVariant", "MiCAEmbeddingVariant"),
        *("MiCALinearVariant", "VeloraLinearVariant"),
    ),
    "peft.tuners.trainable_tokens": ("TrainableTokensLayer",),
    "peft.tuners.trainable_tokens.layer:TrainableTokensLayer": (
        *("_collect_token_weights(weight, rows, embed_dim)", "token_indices"),
        "trainable_tokens_delta",
    ),
    "peft.tuners.tuners_utils:BaseTunerLayer": ("_get_embed_scale()",),
    "peft.tuners.tuners_utils": (
        *("BaseTunerLayer", "_check_lora_target_modules_mamba(peft_config, model, target_name)"),
        "check_target_module_exists(config, key)",
    ),
    "peft.utils.constants": ("EMBEDDING_LAYER_NAMES",),
    "peft.utils.integrations": ("gather_params_ctx(param, modifier_rank)",),
    "peft.utils.other": (
        *("AuxiliaryTrainingWrapper", "ModulesToSaveWrapper", "TrainableTokensWrapper"),
    ),
    "peft.utils.transformers_weight_conversion": (
        "convert_peft_adapter_state_dict_for_transformers("
        "model, peft_config, adapter_state_dict, adapter_name)",
    ),
    "peft.utils.other:TrainableTokensWrapper": ("original_module",),
    "peft.utils.other:ModulesToSaveWrapper": ("modules_to_save", "original_module"),
    "bitsandbytes.functional": (
        *("dequantize_4bit(A, quant_state)", "int8_vectorwise_dequant(A, stats)"),
    ),
    "bitsandbytes.nn": ("Int8Params", "Linear4bit", "Linear8bitLt", "Params4bit"),
    "bitsandbytes.nn.modules:Int8Params": ("SCB",),
    "bitsandbytes.nn.modules:Linear4bit": ("compute_dtype", "support_avx512bf16_for_cpu"),
    "bitsandbytes.nn.modules:Params4bit": ("quant_state",),
    # ZeRO.
    "deepspeed.runtime.precision_config": ("DeepSpeedBF16Config", "DeepSpeedFP16Config"),
    "deepspeed.runtime.zero.config": ("DeepSpeedZeroConfig",),
    "deepspeed.ops": ("__compatible_ops__",),
    "deepspeed.runtime.bf16_optimizer:BF16_Optimizer": ("fp32_groups_flat_partition",),
    "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer": (
        *("_hp_optimizer_states_linked", "_lazy_init_hp_params_optimizer_state()"),
        *("check_grad_overflow", "loss_scaler", "optimizer", "single_partition_of_fp32_groups"),
    ),
    "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3": (
        *("fp32_partitioned_groups_flat", "loss_scaler", "optimizer"),
    ),
    "deepspeed.runtime.zero.partition_parameters": (*("ds_id", "ds_shape", "ds_tensor"),),
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
    "deepspeed.zero": (
        "GatheredParameters(params, modifier_rank)",
        "register_external_parameter(module, parameter)",
    ),
    # Ranks, data, the command line.
    "torch.distributed.distributed_c10d": ("PrefixStore",),
    "torch.distributed.rendezvous": ("rendezvous(url)",),
    "datasets.arrow_dataset:Dataset": ("_fingerprint",),
    # A key of the state.json that save_to_disk writes.
    "datasets.arrow_dataset": ("_data_files",),
    "hydra.core.override_parser.overrides_parser": ("OverridesParser",),
    "hydra.core.override_parser.types": (
        "ChoiceSweep",
        "IntervalSweep",
        "Quote",
        "QuotedString",
        "RangeSweep",
    ),
    "hydra.core.override_parser.types:Override": ("_value",),
    "hydra.core.utils": ("JobReturn", "JobStatus"),
    "hydra.plugins.launcher": ("Launcher",),
    "hydra.types:TargetConf": ("_target_",),
    # Trackers: what their own functions write, without the threads of these.
    "tensorboard.compat.proto.event_pb2": ("Event",),
    "tensorboard.compat.proto.summary_pb2": ("Summary",),
    "tensorboard.plugins.hparams.summary_v2": ("hparams_pb(hparams, trial_id)",),
    "tensorboard.plugins.text.summary_v2": ("text_pb(tag, data)",),
    "tensorboard.summary.writer.record_writer": ("RecordWriter",),
    "trackio.run": ("_Created", "_Group"),
    "trackio.sqlite_storage": ("SQLiteStorage",),
    "trackio.sqlite_storage:SQLiteStorage": (
        "bulk_log(project, run, metrics_list, *, run_id, steps, timestamps, config, log_ids)",
    ),
    "trackio.markdown": ("_type", "_value"),
}
