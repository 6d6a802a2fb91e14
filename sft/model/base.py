"""The tokenizer and the base model: loaded, quantised, or built without weights to look at."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.config.rules import AS_SET, Choice
from sft.config.settings import Config, ModelConfig, QuantizationConfig
from sft.errors import ConfigError, ModelError, Problem

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from sft.data.audit import Counts


SMALL = 512  # hidden size, below which auto takes float32 on a CPU
BEGUN = "the run began with it"


@dataclass(frozen=True)
class Precision(Choice):
    """The choice of ``precision``: fp32, bf16 or fp16.

    Attributes:
        products: How bf16 products are computed on a CPU, one of ``sft.fast.half.ways``; empty in
            other precisions and on a GPU.
    """

    products: str = ""

    def identity(self) -> dict[str, str]:
        """Name what a resumed run must keep; it is stored in ``run.json``."""
        return {"precision": self.value, **({"products": self.products} if self.products else {})}


def choose_precision(
    asked: str, begun: Mapping[str, str] | None = None, width: int | None = None
) -> Precision:
    """Choose fp32, bf16 or fp16, and on a CPU how products of bf16 are computed.

    A CPU that has bf16 may still multiply faster in float32, so its speed is measured.

    Args:
        asked: ``precision`` of the config.
        begun: The identity of the run that is resumed, if there is one: ``auto`` takes its
            precision, and products are computed as before where the processor can.
        width: The model's hidden size; None: it is not considered.

    Raises:
        ConfigError: fp16 on a CPU, where the trainer would silently compute in fp32.
    """
    import torch

    begun = begun or {}
    name = begun.get("precision", asked) if asked == "auto" else asked
    why = AS_SET if asked != "auto" else BEGUN
    if not torch.cuda.is_available():
        return _on_cpu(name, why, begun.get("products"), width)
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        reason = f"the GPU has {'bf16' if has_bf16 else 'no bf16'}"
        return _precision("bf16" if has_bf16 else "fp32", reason)
    if name == "bf16" and not has_bf16:
        why += "; the GPU has no bf16 and emulates it, which is slow"
    return _precision(name, why)


def _precision(name: str, reason: str, products: str = "") -> Precision:
    return Precision("precision", name, reason, products)


def _on_cpu(name: str, why: str, products: str | None, width: int | None) -> Precision:
    """Choose on a CPU.

    Args:
        name: What is set, ``auto`` included.
        why: The reason where it is not ``auto``.
        products: How the run that is resumed computed products; None: it is a new run.
        width: The model's hidden size; None: it is not considered.
    """
    import torch

    from sft.fast import half, speed

    if name == "fp16":
        fix = "precision=bf16"
        if why != AS_SET:  # a different precision would be refused on resume
            fix = "resume this run on a GPU, or run_name=NAME for another run"
        rule = "there is no GPU, and only a GPU trains in fp16"
        raise ConfigError([Problem("precision=fp16", rule, fix)])
    ways = half.ways(torch.bfloat16)
    if name == "fp32":
        return _precision(name, why)
    if half.NATIVE not in ways:
        if name == "auto":
            return _precision("fp32", "the CPU has no bf16")
        why += "; the CPU has no bf16: products are computed in float32 and rounded"
        return _precision(name, why, half.WIDENED)
    if name == "auto" and width is not None and width < SMALL:
        # Converting between the precisions costs more than faster products save: the embedded
        # model, 128 wide, takes 1.2 times the CPU time of float32 on a processor whose bf16
        # products are 1.7 times as fast.
        reason = f"layers of width {width} are too small to gain from bf16 on a CPU"
        return _precision("fp32", reason)
    if products in ways:
        reason = f"{why}; products are computed as when it began: {speed.NAMES[products]}"
        return _precision(name, reason, products)
    measured = speed.speeds()
    if name == "auto":
        # Widened products are float32 products and conversions, and so never faster.
        others = [way for way in ways if way != half.WIDENED]
        way = speed.fastest(measured, [speed.FLOAT32, *others])
        name, why = ("fp32" if way == speed.FLOAT32 else "bf16"), "measured on this CPU"
    else:
        way = speed.fastest(measured, ways)
        why += f"; products are computed as {speed.NAMES[way]}, as measured on this CPU"
    reason = f"{why}: {speed.said(measured)}"
    return _precision(name, reason, "" if name == "fp32" else way)


def dtype_of(precision: str) -> torch.dtype:
    """Map fp32, bf16 or fp16 to the torch dtype."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


@contextlib.contextmanager
def loading(what: str, model: ModelConfig) -> Iterator[None]:
    """Turn the libraries' long errors into one that names the fix."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        name = str(model.name_or_path)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if not Path(name).exists():
            reason = f"it is no folder here, and not to be had from the hub: {reason}"
        if Path(name).is_absolute() or name.startswith("."):
            fix = "model.name_or_path=FOLDER with config.json, weights and tokenizer files"
        else:
            fix = (
                "check the name and the network; HF_TOKEN for gated models; HF_HUB_OFFLINE=1 uses "
                "only what is cached; model=tiny is embedded"
            )
        raise ModelError(
            f"the {what} of {name} cannot be loaded: {reason}\n    fix: {fix}"
        ) from error


def source(model: ModelConfig) -> dict[str, Any]:
    """Give the arguments that name a model to ``from_pretrained``."""
    name = str(model.name_or_path)
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
        raise ModelError(
            f"there is no model folder {name}\n    fix: model.name_or_path=HUB_ID_OR_FOLDER, or "
            "model=tiny"
        )
    return {
        "pretrained_model_name_or_path": name,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
    }


def commit_of(model: ModelConfig) -> str | None:
    """Name the commit of a model on the hub, as it is cached now; None for a folder.

    Raises:
        ModelError: It is not there or cannot be reached.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    where = source(model)
    name = where["pretrained_model_name_or_path"]
    with loading("config", model):
        path = cached_file(name, "config.json", revision=where["revision"])
    commit: str | None = extract_commit_hash(path, None)
    return None if Path(name).is_dir() else commit


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer; one without a pad token pads with EOS (labels hide padding by length).

    Raises:
        ModelError: It is not there, cannot be reached, or has no EOS token.
    """
    from transformers import AutoTokenizer

    with loading("tokenizer", model):
        tokenizer = AutoTokenizer.from_pretrained(**source(model))
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.name_or_path} has no EOS token, so nothing could end a text\n"
            "    fix: set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_architecture(model: ModelConfig, buffers: bool = False) -> PreTrainedModel:
    """Build the model on the meta device: every module and shape, no weights, no memory.

    Args:
        model: Which.
        buffers: Make these for real, such as rotary frequencies, as a forward pass needs them.

    Raises:
        ModelError: Its config is not there or cannot be reached.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with loading("config", model):
        config = AutoConfig.from_pretrained(**source(model))
        options: dict[str, Any] = {"dtype": torch.float32} if buffers else {}
        empty = init_empty_weights(include_buffers=False) if buffers else torch.device("meta")
        with no_init_weights(), empty:
            architecture = AutoModelForCausalLM.from_config(
                config, trust_remote_code=model.trust_remote_code, **options
            )
    return architecture


def check_fits(
    architecture: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, parts: Iterable[Counts]
) -> None:
    """Refuse token ids and positions that the model has no row for.

    Raises:
        ModelError: The tokenizer is another model's, or a sample is longer than the positions.
    """
    rows = architecture.get_input_embeddings().weight.shape[0]
    counts = list(parts)
    largest = max(tokenizer.pad_token_id, *(part.largest_id for part in counts))
    if largest >= rows:
        raise ModelError(
            f"the data has token {largest}, the model's embedding {rows} rows\n"
            "    fix: the model's own tokenizer"
        )
    longest = max(part.longest for part in counts)
    positions = getattr(architecture.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ModelError(
            f"a sample has {longest} tokens, the model {positions} positions\n"
            f"    fix: dataset.max_length={positions}, or a model with a longer context"
        )


def quantization_config(quantization: QuantizationConfig, compute_dtype: torch.dtype) -> Any:
    """Give Transformers' BitsAndBytesConfig, or None where nothing is quantised."""
    from transformers import BitsAndBytesConfig

    if not (quantization.load_in_4bit or quantization.load_in_8bit):
        return None
    return BitsAndBytesConfig(
        load_in_8bit=quantization.load_in_8bit,
        load_in_4bit=quantization.load_in_4bit,
        bnb_4bit_quant_type=quantization.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=quantization.bnb_4bit_use_double_quant,
        **{"bnb_4bit_compute_dtype": compute_dtype, **quantization.extra},
    )


def needs_masters(config: Config) -> bool:
    """Tell whether the model's weights are float32 masters, whatever ``precision`` is.

    Mixed precision updates float32 weights. DeepSpeed keeps copies of its own, and a frozen base
    model is not updated.
    """
    return not config.lora.enabled and config.zero.config is None


def load_base(
    config: Config, architecture: PreTrainedConfig, precision: str, kernel: str | None
) -> PreTrainedModel:
    """Load the base model, or make one with random weights.

    Under ZeRO-3 the trainer's config must exist already: then each rank holds its share only.

    Args:
        config: The run's config.
        architecture: The model's Transformers config.
        precision: fp32, bf16 or fp16.
        kernel: The attention implementation; None: the architecture's own.

    Raises:
        ModelError: The weights are not there or cannot be reached.
    """
    from transformers import AutoModelForCausalLM, set_seed
    from transformers.integrations import is_deepspeed_zero3_enabled

    dtype = dtype_of("fp32" if needs_masters(config) else precision)
    options: dict[str, Any] = {"dtype": dtype}
    if kernel is not None:
        options["attn_implementation"] = kernel
    set_seed(config.seed)
    with loading("weights", config.model):
        if config.model.pretrained:
            quantized = quantization_config(config.quantization, dtype)
            if quantized is not None:
                options["quantization_config"] = quantized
                if not is_deepspeed_zero3_enabled():  # which places the weights itself
                    options["device_map"] = _device_map()
            model = _whole(config.model, **options)
        else:
            model = AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=config.model.trust_remote_code, **options
            )
    if getattr(model, "is_loaded_in_4bit", False):  # as asked, or as its files are
        keep_training_layout(model)
    return model


def _whole(model: ModelConfig, **options: Any) -> PreTrainedModel:
    """Load weights, all of them: what a file lacks would silently be random."""
    from transformers import AutoModelForCausalLM

    loaded, info = AutoModelForCausalLM.from_pretrained(
        **source(model), use_safetensors=True, output_loading_info=True, **options
    )
    lacking = sorted({*map(str, info["missing_keys"]), *map(str, info["mismatched_keys"])})
    if lacking:
        raise ModelError(
            f"the weights of {model.name_or_path} lack {len(lacking)} tensors that its config "
            f"names, such as {lacking[0]}\n    fix: download or save the model again"
        )
    return loaded


def load_frozen(
    model: ModelConfig, quantization: QuantizationConfig, dtype: Any = "auto"
) -> PreTrainedModel:
    """Load a base model as it was trained on, to answer or to merge into; nothing is trained.

    Args:
        model: Which.
        quantization: How it was stored in training.
        dtype: ``auto`` for the precision that its files have, or a torch dtype.

    Raises:
        ModelError: It is not there or cannot be reached.
    """
    import torch

    options: dict[str, Any] = {"dtype": dtype}
    quantized = quantization_config(quantization, torch.float32 if dtype == "auto" else dtype)
    if quantized is not None:
        options |= {"quantization_config": quantized, "device_map": _device_map()}
    elif torch.cuda.is_available() and dtype == "auto":
        options["device_map"] = _device_map()
    with loading("weights", model):
        return _whole(model, **options).eval()


def _device_map() -> dict[str, Any]:
    """Put a quantised model on this rank's device whole; bitsandbytes cannot move it later."""
    import os

    import torch

    return {"": int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"}


def keep_training_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights for CPU inference in an eval pass.

    On CPUs with AVX512-BF16 it does so, and later gradients are wrong.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
