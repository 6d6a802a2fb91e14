"""Keys of Axolotl's YAML for steps, precision, kernels and logs."""

from __future__ import annotations

import re
from typing import Any

from sft.config.foreign import (
    CONVERTED,
    DIFFERS,
    Key,
    Outcome,
    by,
    done,
    fn,
    listed,
    no,
    off,
    same,
    secret,
    to,
)
from sft.config.foreign_common import (
    ACCUMULATION,
    FUSED,
    GALORE,
    PREFERENCE,
    RUN_NAME,
    TRACKER,
    TRAINING,
    VISION,
    ZERO,
)

KERNEL = "needs the package flash-attn; without the setting sft uses PyTorch's flash kernel"


def optimizer(value: Any) -> Outcome:
    """Choose an optimizer of Transformers; Axolotl adds others."""
    others = ("optimi", "ao_", "adopt", "came", "muon", "dion", "sinkgd", "flash_", "q_galore")
    if str(value).startswith(others):
        return off(f"{value} is Axolotl's own; sft has those of Transformers: train.optim=NAME")
    return Outcome(CONVERTED, {"train.optim": value})


def schedule(value: Any) -> Outcome:
    """Choose a schedule of Transformers; Axolotl adds two."""
    if value in ("one_cycle", "rex"):
        return off(f"{value} is Axolotl's own: train.lr_scheduler_type=cosine")
    return Outcome(CONVERTED, {"train.lr_scheduler_type": value})


def minimum(value: Any) -> Outcome:
    """Choose the cosine schedule that ends at a share of the peak learning rate."""
    settings = {"train.lr_scheduler_type": "cosine_with_min_lr"}
    return Outcome(CONVERTED, {**settings, "train.lr_scheduler_kwargs.min_lr_rate": value})


def of_tracker(tracker: str, setting: str) -> Key:
    """Convert a setting of a tracker, which chooses the tracker too."""

    def becomes(value: Any) -> Outcome:
        return Outcome(CONVERTED, {f"tracker.{tracker}": True, setting: value})

    return fn(f"tracker.{tracker}, {setting}", becomes, example="mine")


def plugins(value: Any) -> Outcome:
    """Leave out plugins that make kernels faster; others change what is trained."""
    others = [name for name in listed(value) if not re.search("liger|cut_cross", str(name).lower())]
    if others:
        return off(f"sft loads no plugins of Axolotl ({', '.join(map(str, others))})")
    return same(FUSED)


def fsdp_config(value: Any) -> Outcome:
    """Split by ZeRO what FSDP splits; without a version, ``fsdp`` says whether it is used."""
    offload = "_offload" if str(value).find("offload_params': True") >= 0 else ""
    return Outcome(DIFFERS, {"zero": f"stage3{offload}"}, "sft splits by DeepSpeed ZeRO")


MINIMUM = fn("train.lr_scheduler_type, train.lr_scheduler_kwargs.min_lr_rate", minimum, example=0.1)
TRAINING_KEYS: dict[str, Key] = {
    # steps
    "micro_batch_size": to("train.per_device_train_batch_size"),
    "eval_batch_size": to("train.per_device_eval_batch_size"),
    "gradient_accumulation_steps": ACCUMULATION,
    "batch_size": to("train.global_batch_size", "Axolotl counts the rows of one GPU, sft of all"),
    "num_epochs": to("train.num_train_epochs"),
    "optimizer": fn("train.optim", optimizer, example="adamw_8bit"),
    "lr_scheduler": fn("train.lr_scheduler_type", schedule, example="linear"),
    "cosine_min_lr_ratio": MINIMUM,
    "cosine_constant_lr_ratio": no("train.lr_scheduler_type=warmup_stable_decay holds a rate"),
    "lr_quadratic_warmup": no("the warm-up is linear"),
    "lr_groups": no("train.loraplus_lr_ratio and train.embedding_learning_rate are the groups"),
    **dict.fromkeys(("jagged_restart_steps", "jagged_restart_warmup_steps"), no("ReLoRA's")),
    "embedding_lr": to("train.embedding_learning_rate", example=1e-5),
    "embedding_lr_scale": no("train.embedding_learning_rate is the rate itself"),
    "evals_per_epoch": by(
        {0: "train.eval_strategy='no'"}, rest=to("train.evals_per_epoch"), example=4
    ),
    "saves_per_epoch": by({0: ""}, rest=to("train.saves_per_epoch"), example=2),
    "eval_steps": to("train.eval_steps", also="train.eval_strategy=steps"),
    "save_steps": to("train.save_steps", also="train.save_strategy=steps"),
    "save_first_step": no("checkpoints follow train.save_steps"),
    **{
        name: TRAINING[name]
        for name in (
            *(
                "learning_rate",
                "weight_decay",
                "max_grad_norm",
                "lr_scheduler_kwargs",
                "optim_args",
            ),
            *("adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules", "max_steps"),
            *("warmup_steps", "warmup_ratio", "eval_strategy", "evaluation_strategy"),
            *("save_strategy", "save_total_limit", "save_only_model", "logging_steps", "seed"),
            *("gradient_checkpointing_kwargs", "output_dir", "load_best_model_at_end", "tf32"),
            *("metric_for_best_model", "greater_is_better", "resume_from_checkpoint", "bf16"),
            *("neftune_noise_alpha", "torch_compile", "torch_compile_backend", "fp16", "deepspeed"),
            *("torch_compile_mode", "activation_offloading", "ddp_timeout", "ddp_bucket_cap_mb"),
            *("ddp_broadcast_buffers", "ddp_find_unused_parameters", "dataloader_pin_memory"),
            *("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_drop_last"),
            *("torch_empty_cache_steps", "hub_model_id", "hub_strategy", "hub_revision", "fsdp"),
            *("save_safetensors", "local_rank", "accelerator_config", "auto_find_batch_size"),
            "early_stopping_patience",
        )
    },
    "fsdp_config": fn("zero", fsdp_config, "by DeepSpeed ZeRO", {"reshard_after_forward": True}),
    "fsdp_version": done("zero=stage3 needs none of FSDP's options"),
    "auto_resume_from_checkpoints": done("the same command given again resumes the run"),
    "gradient_checkpointing": by(
        {
            "unsloth": Outcome(
                DIFFERS, {"train.gradient_checkpointing": True}, "activations stay on the GPU"
            ),
            "offload": "train.gradient_checkpointing=true train.extra.activation_offloading=true",
        },
        rest=to("train.gradient_checkpointing"),
    ),
    "bfloat16": by({True: "precision=bf16", False: ""}),
    "float16": by({True: "precision=fp16", False: ""}),
    "float32": by({True: "precision=fp32", False: ""}),
    # attention and kernels
    "flash_attention": by({True: "model.attn_implementation=flash_attention_2", False: ""}, KERNEL),
    "sdp_attention": by({True: "model.attn_implementation=sdpa", False: ""}),
    "eager_attention": by({True: "model.attn_implementation=eager", False: ""}),
    "flex_attention": by({True: "model.attn_implementation=flex_attention", False: ""}),
    "attn_implementation": by(
        {
            "xformers": off("model.attn_implementation=auto uses PyTorch's kernels"),
            "sage": off("its 8-bit attention changes the result"),
            "fp8": off("its 8-bit attention changes the result"),
        },
        rest=to("model.attn_implementation", example="sdpa"),
    ),
    "xformers_attention": no("model.attn_implementation=auto uses PyTorch's kernels"),
    "sage_attention": no("its 8-bit attention changes the result"),
    "s2_attention": no("shifted sparse attention changes the result"),
    **dict.fromkeys(
        (
            *("flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_mlp"),
            *("flash_attn_fuse_qkv", "flash_optimum", "lora_mlp_kernel", "lora_qkv_kernel"),
            *("lora_o_kernel", "lora_embedding_kernel", "liger_rope", "liger_rms_norm"),
            *("liger_glu_activation", "liger_swiglu", "liger_layer_norm", "tiled_mlp"),
            *("liger_fused_linear_cross_entropy", "liger_cross_entropy", "use_kernels"),
            *("unsloth_cross_entropy_loss", "unsloth_lora_mlp", "unsloth_lora_qkv"),
            *("unsloth_lora_o", "unsloth_rms_norm", "unsloth_rope", "scaling_softmax"),
            *("liger_rms_norm_gated", "use_scattermoe", "use_sonicmoe", "experts_implementation"),
            *("fused_attn_kernel", "gemma4_hybrid_attn_impl", "flex_attn_compile_kwargs"),
            *("use_glm_dsa_kernels", "use_dsv4_kernels", "large_head_attention", "sdpa_varlen"),
        ),
        no(FUSED),
    ),
    **dict.fromkeys(
        ("chunked_cross_entropy", "cut_cross_entropy"),
        done("model.lm_head=auto never holds all logits"),
    ),
    "plugins": fn("", plugins, example=["axolotl.integrations.kd.KDPlugin"]),
    "deepcompile": no("train.extra.torch_compile=true compiles the model"),
    **dict.fromkeys(
        (
            *("sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size"),
            *("dp_shard_size", "dp_replicate_size", "ring_attn_func", "heads_k_stride"),
            *("expert_parallel_size", "expert_parallel_num_nvl_bytes"),
        ),
        no(ZERO, 1),
    ),
    # logs and the rest
    **{
        f"use_{name}": by({True: f"tracker.{name}=true", False: ""})
        for name in ("wandb", "mlflow", "tensorboard", "trackio")
    },
    "use_comet": by({True: "train.extra.report_to=comet_ml", False: ""}),
    "wandb_project": of_tracker("wandb", "tracker.project"),
    "trackio_project_name": of_tracker("trackio", "tracker.project"),
    "mlflow_experiment_name": of_tracker("mlflow", "tracker.project"),
    "mlflow_tracking_uri": of_tracker("mlflow", "tracker.uri"),
    **dict.fromkeys(("wandb_name", "mlflow_run_name", "trackio_run_name"), no(RUN_NAME)),
    **dict.fromkeys(
        (
            *("wandb_entity", "wandb_watch", "wandb_log_model", "wandb_mode", "wandb_run_id"),
            *("hf_mlflow_log_artifacts", "comet_workspace", "comet_project_name", "comet_mode"),
        ),
        no(TRACKER),
    ),
    "trackio_space_id": no("the command trackio sync uploads what tracker=trackio has written"),
    "comet_api_key": secret(TRACKER),
    **dict.fromkeys(("debug", "verbosity"), no("train.extra.log_level=debug shows more", "")),
    "profiler_steps": to("profile.steps", change=lambda n: n or same(), also="profile=torch"),
    "profiler_steps_start": to("profile.start", change=lambda n: n + 1 if type(n) is int else n),
    **dict.fromkeys(("gc_steps", "gc_collect_steps"), no("sft collects garbage after evaluations")),
    **dict.fromkeys(
        ("loss_watchdog_threshold", "loss_watchdog_patience"),
        no("train.max_loss_jump=3 stops a run whose loss jumps"),
    ),
    **dict.fromkeys(
        ("eval_table_size", "eval_max_new_tokens", "do_causal_lm_eval"),
        no("sample=held-out answers held-out prompts while the model trains"),
    ),
    **dict.fromkeys(("do_bench_eval", "bench_dataset"), no("sft measures the held-out loss")),
    **dict.fromkeys(
        ("lisa_n_layers", "lisa_step_interval", "lisa_layers_attribute"),
        no("sft has no LISA; model.trainable=[REGEX] trains chosen layers"),
    ),
    **dict.fromkeys(
        ("qgalore_rank", "qgalore_scale", "qgalore_update_proj_gap", "qgalore_proj_type"),
        no(GALORE),
    ),
    **dict.fromkeys(
        ("rl", "rl_beta", "reward_model", "process_reward_model", "dpo_beta", "trl", "orpo_alpha"),
        no(PREFERENCE),
    ),
    **dict.fromkeys(
        ("qat", "fp8", "quantization", "fp8_enable_fsdp_float8_all_gather"),
        no("sft trains in bf16, fp16 or fp32"),
    ),
    "use_swanlab": by({True: "train.extra.report_to=swanlab", False: ""}),
    **dict.fromkeys(
        ("swanlab_project", "swanlab_experiment_name", "swanlab_description", "swanlab_mode"),
        no(TRACKER),
    ),
    **dict.fromkeys(("use_eaft", "eaft_alpha", "eaft_k"), no("the losses are nll and dft")),
    **dict.fromkeys(
        ("use_otel_metrics", "otel_metrics_host", "otel_metrics_port"),
        no("metrics.jsonl has every logged line"),
    ),
    "torchdistx_path": no("adamw_anyprecision needs it: train.optim=adamw_8bit"),
    "eta_min": no("train.lr_scheduler_type=cosine_with_min_lr has a lowest rate"),
    "adam_eps": to("train.extra.adam_epsilon", example=1e-8),
    **dict.fromkeys(("processor_type", "freeze_mm_modules", "image_size"), no(VISION)),
    **dict.fromkeys(("use_ray", "ray_num_workers", "ray_run_name"), no("torchrun starts ranks")),
    **dict.fromkeys(("use_pose", "pose_max_context_len"), no("sft has no PoSE")),
    **dict.fromkeys(
        ("scaling_softmax", "scaling_softmax_factor", "scaling_softmax_bias"),
        no("it changes the model's attention; sft trains the model as it is"),
    ),
}
