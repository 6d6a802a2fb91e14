"""Keys of LLaMA-Factory's YAML for rows, logs and export."""

from __future__ import annotations

from typing import Any

from sft.config.foreign import DIFFERS, Key, Outcome, by, done, fn, listed, no, off, secret, to
from sft.config.foreign_common import HELD_OUT, PUSH, TRACKER

OWN = "the tokenizer's own chat template is used, not LLaMA-Factory's copy of one"
TEMPLATES: dict[str, str | Outcome] = {
    "chatml": "template=chatml",
    **{name: f"template.chat_template={name}" for name in ("llama3", "gemma", "gemma3", "gemma4")},
    **{name: f"template.chat_template={name}" for name in ("qwen3", "qwen3_6", "cohere", "lfm2")},
    "qwen": "template.chat_template=qwen2_5",
    "qwen3_nothink": "template.chat_template=qwen3_instruct_2507",
    "qwen3_5": "template.chat_template=qwen3_5_think",
    "qwen3_5_nothink": "template.chat_template=qwen3_5_nothink",
    "deepseek3": "template.chat_template=deepseekv3",
    "phi": "template.chat_template=phi3",
    "gpt_oss": "template.chat_template=gptoss",
    "glm4_moe": "template.chat_template=glm4moe",
}
TEMPLATE = Key(DIFFERS, lambda value: Outcome(DIFFERS, note=OWN), "template.kind", OWN)
CUT = "LLaMA-Factory shortens prompt and answer of longer rows; dataset.overlong=truncate cuts off"
CUT += " the end, and error, the default, stops"
NAMES = "dataset_info.json says where NAME is: sft import reads it; dataset.path=FILE_OR_HUB_ID"


def datasets(value: Any) -> Outcome:
    """Convert a name of a data set, which is a path only together with dataset_info.json."""
    names = [str(name) for name in listed(value)]
    return Outcome(DIFFERS, {"dataset.path": names[0]}, NAMES) if len(names) == 1 else off(NAMES)


ROWS: dict[str, Key] = {
    # rows
    "dataset": fn("dataset.path", datasets, NAMES, "rows.jsonl"),
    "eval_dataset": to("dataset.eval_path", NAMES),
    "dataset_dir": no("sft import reads DIR/dataset_info.json; dataset.path=FILE_OR_HUB_ID"),
    "template": by(TEMPLATES, rest=TEMPLATE),
    "cutoff_len": to("dataset.max_length", CUT, also="dataset.overlong=truncate", example=2048),
    "train_on_prompt": by({True: "template.train_on=all", False: ""}),
    "mask_history": by({True: "template.train_on=last_assistant", False: ""}),
    "packing": by({True: "dataset.packing=bfd", False: "dataset.packing=none"}),
    "neat_packing": by({True: "dataset.packing=bfd", False: ""}),
    "max_samples": to("dataset.max_rows"),
    "val_size": HELD_OUT,
    "preprocessing_num_workers": to("dataset.num_proc", example=8),
    **dict.fromkeys(
        ("overwrite_cache", "preprocessing_batch_size", "data_shared_file_system"),
        done("samples are cached by content, and made again when rows or settings change"),
    ),
    "tokenized_path": done("samples are cached by content; sft data output=DIR keeps them"),
    "streaming": to("dataset.streaming", example=True),
    "buffer_size": no("the buffer of streamed rows is sft's own"),
    "mix_strategy": by({"concat": ""}, rest=no("dataset.mix.NAME.weight=W draws more of a source")),
    "interleave_probs": no("dataset.mix.NAME.weight=W draws more of a source"),
    "default_system": to("template.system"),
    "enable_thinking": by({True: "", False: "template.kwargs.enable_thinking=false"}),
    "preserve_thinking": to("template.kwargs.preserve_thinking", example=True),
    "tool_format": no("tools are written as the tokenizer's chat template writes them"),
    "ignore_pad_token_for_loss": done("padding is never trained"),
    "eval_on_each_dataset": no("all held-out rows make one loss"),
    "reserved_label_len": no("dataset.overlong=truncate keeps the beginning"),
    "overwrite_output_dir": by({True: "overwrite=true", False: ""}),
    # logs and the rest
    "use_swanlab": by({True: "train.extra.report_to=swanlab", False: ""}),
    **dict.fromkeys(
        ("swanlab_project", "swanlab_run_name", "swanlab_workspace", "swanlab_mode"), no(TRACKER)
    ),
    **dict.fromkeys(
        ("swanlab_api_key", "swanlab_lark_webhook_url", "swanlab_lark_secret"), secret(TRACKER)
    ),
    **dict.fromkeys(
        ("export_dir", "export_size", "export_device", "export_legacy_format"),
        no("sft merge run=DIR writes the full weights"),
    ),
    "export_hub_model_id": no(PUSH),
    **dict.fromkeys(
        ("fp8", "fp8_backend", "fp8_enable_fsdp_float8_all_gather"),
        no("sft trains in bf16, fp16 or fp32"),
    ),
    **dict.fromkeys(("ray_run_name", "ray_num_workers", "ray_storage_path"), no("torchrun")),
    **dict.fromkeys(
        ("max_new_tokens", "top_p", "top_k", "temperature", "do_sample", "num_beams"),
        no("sft generate run=DIR has the settings of generation"),
    ),
}
