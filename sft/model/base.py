"""The tokenizer and the base model: choose the precision, load, quantise, check."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import process
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
        products: The way in which a CPU computes bf16 products, one of ``sft.fast.half.ways``;
            empty in other precisions and on a GPU.
    """

    products: str = ""

    def identity(self) -> dict[str, str]:
        """Return the values that a resumed run must have too; ``run.json`` stores them."""
        return {"precision": self.value, **({"products": self.products} if self.products else {})}


def choose_precision(
    asked: str, begun: Mapping[str, str] | None = None, width: int | None = None
) -> Precision:
    """Choose fp32, bf16 or fp16, and on a CPU the way to compute bf16 products.

    A CPU with bf16 instructions may still multiply faster in float32, so both are measured.

    Args:
        asked: ``precision`` of the config.
        begun: The identity of the resumed run, if any: ``auto`` takes its precision, and products
            are computed in the same way if this processor supports it.
        width: The model's hidden size; None: do not consider it.

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
        name: The precision or ``auto``.
        why: The reason for a precision.
        products: The way in which the resumed run computed products; None: the run is new.
        width: The model's hidden size; None: do not consider it.
    """
    import torch

    from sft.fast import half, speed

    if name == "fp16":
        fix = "precision=bf16"
        if why != AS_SET:  # a different precision would be refused on resume
            fix = "resume this run on a GPU, or run_name=NAME for a new run"
        rule = "there is no GPU, and only a GPU trains in fp16"
        raise ConfigError([Problem("precision=fp16", rule, fix)])
    ways = half.ways(torch.bfloat16)
    if name == "fp32":
        return _precision(name, why)
    if half.NATIVE not in ways:
        if name == "auto":
            return _precision("fp32", "the CPU has no bf16")
        why += "; the CPU has no bf16, so products are computed in float32 and rounded"
        return _precision(name, why, half.WIDENED)
    if name == "auto" and width is not None and width < SMALL:
        # Conversions between the precisions cost more than faster products save: in bf16 the
        # embedded model (width 128) takes 1.2 times the CPU time of float32, on a processor whose
        # bf16 products are 1.7 times as fast.
        reason = f"layers of width {width} are too small to gain from bf16 on a CPU"
        return _precision("fp32", reason)
    if products in ways:
        reason = f"{why}; products are computed as before: {speed.NAMES[products]}"
        return _precision(name, reason, products)
    measured = speed.speeds()
    if name == "auto":
        # WIDENED is never faster than float32: it is the same product with conversions.
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
    """Replace the libraries' long errors by a ModelError that names a fix."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        name = str(model.name_or_path)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if not Path(name).exists():
            reason = f"it is not a local folder, and the hub did not provide it: {reason}"
        if Path(name).is_absolute() or name.startswith("."):
            fix = "model.name_or_path=FOLDER with config.json, weights and tokenizer files"
        else:
            fix = (
                "check the name and the network; set HF_TOKEN for gated models; HF_HUB_OFFLINE=1 "
                "uses only cached files; model=tiny is embedded"
            )
        raise ModelError(
            f"the {what} of {name} cannot be loaded: {reason}\n    fix: {fix}"
        ) from error


def source(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that name the model."""
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
    """Return the commit of a hub model's cached config; None for a local folder.

    Raises:
        ModelError: The model does not exist or cannot be reached.
    """
    from transformers.utils.hub import cached_file, extract_commit_hash

    where = source(model)
    name = where["pretrained_model_name_or_path"]
    with loading("config", model):
        path = cached_file(name, "config.json", revision=where["revision"])
    commit: str | None = extract_commit_hash(path, None)
    return None if Path(name).is_dir() else commit


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, and use EOS as pad token if it has none (labels mask padding by length).

    Raises:
        ModelError: The tokenizer does not exist, cannot be reached, or has no EOS token.
    """
    from transformers import AutoTokenizer

    with loading("tokenizer", model):
        tokenizer = AutoTokenizer.from_pretrained(**source(model))
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.name_or_path} has no EOS token, so no text could end\n"
            "    fix: set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_architecture(model: ModelConfig, buffers: bool = False) -> PreTrainedModel:
    """Build the model on the meta device: every module and shape, no weights, no memory.

    Args:
        model: The model's name and revision.
        buffers: Create the buffers on the CPU, such as rotary frequencies: a forward pass needs
            them.

    Raises:
        ModelError: The config does not exist or cannot be reached.
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
    """Check that the model has an embedding for each token id and each position.

    Raises:
        ModelError: The tokenizer belongs to a different model, or a sample has more tokens than the
            model has positions.
    """
    rows = architecture.get_input_embeddings().weight.shape[0]
    counts = list(parts)
    largest = max(tokenizer.pad_token_id, *(part.largest_id for part in counts))
    if largest >= rows:
        raise ModelError(
            f"the data has token id {largest}, but the model's embedding has {rows} rows\n"
            "    fix: use the model's own tokenizer"
        )
    longest = max(part.longest for part in counts)
    positions = getattr(architecture.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
        raise ModelError(
            f"a sample has {longest} tokens, but the model has {positions} positions\n"
            f"    fix: dataset.max_length={positions}, or a model with a longer context"
        )


def quantization_config(quantization: QuantizationConfig, compute_dtype: torch.dtype) -> Any:
    """Make Transformers' BitsAndBytesConfig; None if nothing is quantised."""
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
    """Return whether the weights must be loaded in float32, whatever ``precision`` is.

    Mixed precision updates float32 weights. DeepSpeed makes its own float32 copies, and a frozen
    base model is not updated.
    """
    return not config.lora.enabled and config.zero.config is None


def load_base(
    config: Config, architecture: PreTrainedConfig, precision: str, kernel: str | None
) -> PreTrainedModel:
    """Load the base model, or initialise one with random weights.

    Under ZeRO-3 the trainer's config must exist already, so that each rank loads only its share.

    Args:
        config: The run's config.
        architecture: The model's Transformers config.
        precision: fp32, bf16 or fp16.
        kernel: The attention implementation; None: the architecture's own.

    Raises:
        ModelError: The weights do not exist or cannot be reached.
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
                if not is_deepspeed_zero3_enabled():  # ZeRO-3 places the weights itself
                    options["device_map"] = _device_map()
            model = _whole(config.model, **options)
        else:
            model = AutoModelForCausalLM.from_config(
                architecture, trust_remote_code=config.model.trust_remote_code, **options
            )
    if getattr(model, "is_loaded_in_4bit", False):  # set so, or its files are 4-bit
        keep_training_layout(model)
    return model


def _whole(model: ModelConfig, **options: Any) -> PreTrainedModel:
    """Load weights, and raise if one is missing: Transformers would initialise it at random."""
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
    """Load a base model without training it, to generate text or to verify a merge.

    Args:
        model: The model's name and revision.
        quantization: How training stored its weights.
        dtype: ``auto`` for the precision of its files, or a torch dtype.

    Raises:
        ModelError: The model does not exist or cannot be reached.
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
    """Map the whole model to this rank's device; bitsandbytes cannot move it later."""
    import torch

    return {"": process.local_rank() if torch.cuda.is_available() else "cpu"}


def keep_training_layout(model: PreTrainedModel) -> None:
    """Prevent bitsandbytes from repacking 4-bit weights for CPU inference in an eval pass.

    On CPUs with AVX512-BF16 it repacks them, and gradients after the eval pass are wrong.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
