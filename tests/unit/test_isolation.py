"""The proofs before the first step catch what they must: planted leaks, padding, later tokens."""

import types
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sft import train
from sft.data.collator import Collator
from sft.errors import ConfigError, ModelError
from sft.fast import attention, head, isolation, mixers
from sft.fast.probe import Probe
from sft.plan import kernel

DTYPES = [torch.float32, torch.bfloat16]


def model_of(kind: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    torch.manual_seed(0)
    attention.register()
    model = AutoModelForCausalLM.from_config(small_models.small_config(kind, **changed))
    small_models.widen(model)
    return model.to(dtype).eval()


def probe_of(model: Any, **options: Any) -> Probe:
    collator = Collator(0, **{"padding_free": True, "documents": True, **options})
    head.install(model, "chunked")
    return Probe(model, collator, torch.device("cpu"), 250)


def packed(kind: str, dtype: torch.dtype = torch.float32, **changed: Any) -> Any:
    model = model_of(kind, dtype, **changed)
    model.set_attn_implementation(attention.NAME)
    return model


def leak(model: Any, strength: float) -> None:
    """Add a share of the token before to each token after the first MLP, across documents too."""
    layer = model.get_decoder().layers[0].mlp
    stock = layer.forward

    def forward(_: Any, states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shifted = torch.nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]
        return stock(states + strength * shifted, *args, **kwargs)

    layer.forward = types.MethodType(forward, layer)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3_moe", "granitemoe", "mixtral"])
def test_a_leak_outside_of_attention_is_caught(kind: str, dtype: torch.dtype) -> None:
    model = packed(kind, dtype)
    isolation.require_isolation(probe_of(model))
    if not hasattr(model.get_decoder().layers[0], "mlp"):
        model.get_decoder().layers[0].mlp = model.get_decoder().layers[0].block_sparse_moe
    leak(model, 0.25)
    with pytest.raises(ModelError, match=r"attend to each other .*differ by"):
        isolation.require_isolation(probe_of(model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind", ["lfm2", "lfm2_moe", "granitemoehybrid", "qwen3_next", "nemotron_h"]
)
def test_convolutions_and_states_without_boundaries_are_caught(
    kind: str, dtype: torch.dtype
) -> None:
    """Given positions only, as a CPU would run them, these models leak."""
    probe = probe_of(model_of(kind, dtype), documents=False)
    with pytest.raises(ModelError, match="attend to each other"):
        isolation.require_isolation(probe)


@pytest.mark.parametrize("kind", ["lfm2", "falcon_h1", "qwen3_5_text"])
def test_boundaries_are_passed_and_refused_without_kernels(kind: str) -> None:
    """Transformers raises once the boundaries arrive at code that cannot use them."""
    with pytest.raises(ModelError, match=r"can't keep packed sequences apart.*\n.*packing=none"):
        isolation.require_isolation(probe_of(packed(kind)))
    architecture = model_of(kind)
    config = train.main.compose(["model=tiny"])
    attention_choice, joined = kernel.choose(config, architecture, "fp32", packed=False)
    assert (attention_choice.value, joined.value) == (None, False)
    assert "mixes positions and is not attention" in joined.reason
    with pytest.raises(ConfigError, match="would change each other"):
        kernel.choose(config, architecture, "fp32", packed=True)


def test_with_kernels_hybrids_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU with the packages, the choice is our attention and one row."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    architecture = model_of("qwen3_next")
    assert "fla" in mixers.lacking(architecture)
    monkeypatch.setattr(mixers, "installed", lambda name: True)
    assert mixers.lacking(architecture) == ""
    config = train.main.compose(["model=tiny"])
    chosen, joined = kernel.choose(config, architecture, "bf16", packed=True)
    assert (chosen.value, joined.value) == (None, True)  # sdpa separates by positions
    config.train.padding_free = False
    with pytest.raises(ConfigError, match="take one row"):
        kernel.choose(config, architecture, "bf16", packed=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_that_our_attention_lacks_are_caught(dtype: torch.dtype) -> None:
    """Llama-4's chunks are built by the model; documents shorter than one cannot show it."""
    probe = probe_of(packed("llama4_text", dtype))
    with pytest.raises(ModelError, match="not computed as they are alone"):
        isolation.require_isolation(probe)
    probe.longest = small_models.WINDOW
    isolation.require_isolation(probe)


def test_positions_of_its_own_are_caught() -> None:
    """RoBERTa's decoders count positions from the padding id, so that ours are wrong."""
    with pytest.raises(ModelError, match="not computed as they are alone"):
        isolation.require_isolation(probe_of(packed("camembert")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_model_that_sees_later_tokens_is_refused(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match=r"not causal.*\n.*is_decoder=true"):
        isolation.require_rows(probe_of(model_of(kind, dtype, is_decoder=False)))
    isolation.require_rows(probe_of(model_of(kind, dtype)))


def test_rounding_to_eight_bits_is_not_taken_for_a_leak(tmp_path: Path) -> None:
    """LLM.int8 rounds a column unless one of all tokens has an outlier there; these models do."""
    attention.register()
    small_models.build(tmp_path, "gemma3_text")
    bits = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=bits).eval()
    isolation.require_rows(probe_of(model))
    model.set_attn_implementation(attention.NAME)
    isolation.require_isolation(probe_of(model))
    leak(model, 0.25)
    with pytest.raises(ModelError, match="attend to each other"):
        isolation.require_isolation(probe_of(model))


def test_a_choice_between_equal_scores_is_refused() -> None:
    probe = probe_of(model_of("deepseek_v32"), documents=False)
    with pytest.raises(ModelError, match=r"attends to 8 tokens(?s:.*)" + isolation.ALONE):
        isolation.require_rows(probe)
    isolation.require_rows(probe, batched=False)
    probe.longest = 8
    isolation.require_rows(probe)


def test_no_field_counts_as_experts_by_its_name() -> None:
    """Every config of Transformers 5.23 has ``_experts_implementation_internal``."""
    assert not mixers.experts(model_of("llama")) and mixers.experts(model_of("granitemoe"))
    assert mixers.mixers(model_of("llama")) == []
    assert mixers.mixers(model_of("lfm2"))[0] == "Lfm2ShortConv"
    assert mixers.scans(model_of("lfm2")) == []
    assert mixers.scans(model_of("qwen3_next"))[0] == "Qwen3NextGatedDeltaNet"
    assert mixers.reach(model_of("llama4_text")) == small_models.WINDOW


def test_each_tokens_document_is_numbered() -> None:
    samples = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7], "seq_lengths": [2, 1]}]
    samples += [{"input_ids": [8, 9], "labels": [8, 9]}]
    batch = Collator(0, documents=True)(samples)
    assert batch["seq_idx"].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert batch["seq_idx"].dtype == torch.int32
    assert Collator(0, True, documents=True)(samples)["seq_idx"].tolist() == [[0, 0, 1, 2, 2]]
