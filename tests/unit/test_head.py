"""The chunked head gives the loss, the gradients and the metrics of the model's own logits."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import build_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    DogeConfig,
    Gemma2Config,
    GraniteConfig,
    GraniteMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
)
from trl.trainer.utils import add_fused_lm_head

from sft.config.settings import Config, ModelConfig
from sft.data.collator import trained_places
from sft.errors import ConfigError
from sft.fast import attention, balance, head, loss, proof

SHAPE = {
    "vocab_size": 307,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
# What each does to its logits: nothing, a bias (GPT-J), a cap, a factor, a divisor.
SCALED = {
    "gemma2": Gemma2Config(**SHAPE, head_dim=16, final_logit_softcapping=2.0),
    "cohere": CohereConfig(**SHAPE, logit_scale=3.0),
    "granite": GraniteConfig(**SHAPE, logits_scaling=0.25),
}
FAMILIES = ["opt", "llama", "gpt_neox", "gptj", *SCALED]


def model_of(tmp_path: Path, family: str) -> Any:
    torch.manual_seed(0)
    if family in SCALED:
        return AutoModelForCausalLM.from_config(SCALED[family]).eval()
    folder = build_model(tmp_path / family, family, tied=False)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (3, 20), generator=generator)
    labels = ids.clone()
    labels[:, :7] = labels[1, 12:] = labels[2] = -100
    return {"input_ids": ids, "labels": labels}


def found(model: Any, **options: Any) -> tuple[Any, list[torch.Tensor | None]]:
    model.zero_grad()
    output = model(**batch(), fused_lm_head=True, use_cache=False, **options)
    (output.loss / 21).backward()
    return output, [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("dft", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, dft: bool
) -> None:
    monkeypatch.setattr(loss, "CHUNK", 5 * 307)  # several chunks, the last one shorter
    model = model_of(tmp_path, family)
    with torch.no_grad():
        inputs = {key: value for key, value in batch().items() if key != "labels"}
        every = model(**inputs).logits[:, :-1].double().log_softmax(-1)
    labels = batch()["labels"][:, 1:]
    trained = labels != -100
    expected = every[trained].gather(1, labels[trained][:, None])[:, 0]
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))  # as TRL's trainer does
    results = {}
    for kind in ("plain", "chunked", "trl"):
        head.install(model, kind)
        results[kind] = found(model, head_metrics=True, head_dft=dft)
    weights = expected.exp() if dft else 1
    for output, _ in results.values():
        assert output.loss.item() == pytest.approx(-(expected * weights).sum().item(), rel=2e-6)
        torch.testing.assert_close(output.log_probs.double(), expected, rtol=0, atol=3e-6)
        entropy = -(every.exp() * every).sum(-1)[trained]
        torch.testing.assert_close(output.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
        assert torch.equal(output.is_top1, every.argmax(-1)[trained] == labels[trained])
        assert output.label_mask.sum() == trained.sum() == 13 + 5
    plain_grads = results.pop("plain")[1]
    largest = max(float(grad.abs().max()) for grad in plain_grads if grad is not None)
    assert largest > 0
    for _, grads in results.values():
        for a, b in zip(plain_grads, grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6 * largest)


@pytest.mark.parametrize("dft", [False, True])
def test_weights_are_factors_of_the_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dft: bool
) -> None:
    """Against autograd through plain logits in float64."""
    monkeypatch.setattr(loss, "CHUNK", 5 * 307)
    model = model_of(tmp_path, "gemma2")
    labels = batch()["labels"][:, 1:]
    trained = labels != -100
    weights = torch.rand(18, generator=torch.Generator().manual_seed(1))
    precise = copy.deepcopy(model).double()
    scores = precise(input_ids=batch()["input_ids"]).logits[:, :-1][trained]
    each = torch.nn.functional.cross_entropy(scores, labels[trained], reduction="none")
    each = each * (-each).exp().detach() if dft else each
    expected = (weights.double() * each).sum()
    (expected / 21).backward()
    wanted = [parameter.grad for parameter in precise.parameters()]
    largest = max(float(grad.abs().max()) for grad in wanted if grad is not None)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    for kind in ("plain", "chunked", "trl"):
        head.install(model, kind)
        output, grads = found(model, head_dft=dft, loss_weights=weights.view(torch.int32))
        assert output.loss.item() == pytest.approx(expected.item(), rel=2e-6)
        assert output.label_mask.sum() == 18
        for a, b in zip(wanted, grads, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(b.double(), a, rtol=1e-4, atol=1e-6 * largest)


def test_metrics_are_left_out_unless_asked_for(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama")
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    for kind in ("chunked", "trl"):
        head.install(model, kind)
        assert found(model)[0].entropy is None and found(model)[0].is_top1 is None


def test_a_frozen_head_gets_no_gradient_and_autocast_computes_in_bf16(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama")
    head.install(model, "chunked")
    exact, _ = found(model)
    model.get_output_embeddings().weight.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, grads = found(model)
    assert rounded.loss.dtype == torch.float32
    assert rounded.loss.item() == pytest.approx(exact.loss.item(), rel=1e-2)
    assert rounded.loss.item() != exact.loss.item()
    assert grads[-1] is None and grads[0] is not None
    assert model.get_output_embeddings().weight.grad is None


class Waiting(TorchDispatchMode):
    """Refuses what would wait for a GPU: reading a value, or a shape that values decide."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "unique"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["plain", "chunked", "trl"])
def test_told_what_is_trained_nothing_waits_for_a_gpu(tmp_path: Path, kind: str) -> None:
    model = model_of(tmp_path, "llama")
    attention.register()
    model.set_attn_implementation(attention.NAME)
    head.install(model, kind)
    expected, grads = found(model, head_metrics=True)
    places = trained_places(batch()["labels"])
    model.zero_grad()
    with Waiting():
        inputs = {**batch(), "loss_positions": places, "use_cache": False}
        inputs["position_ids"] = torch.arange(20).expand(3, -1)
        output = model(**inputs, fused_lm_head=True, head_metrics=True)
        (output.loss / 21).backward()
    assert torch.equal(output.loss, expected.loss)
    for value, parameter in zip(grads, model.parameters(), strict=True):
        assert value is None or torch.equal(value, parameter.grad)
    with pytest.raises(AssertionError, match="nonzero"), Waiting():
        model(**batch(), fused_lm_head=True)


def test_nothing_trained_is_a_zero_that_can_be_differentiated(tmp_path: Path) -> None:
    model = model_of(tmp_path, "opt")
    head.install(model, "chunked")
    output = model(torch.tensor([[5, 6, 7]]), labels=torch.full((1, 3), -100), fused_lm_head=True)
    assert output.loss.item() == 0
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_otherwise_the_model_does_what_it_did(tmp_path: Path) -> None:
    model = model_of(tmp_path, "llama")
    ids = batch()["input_ids"]
    before = model(ids, labels=ids)
    add_fused_lm_head(model)
    head.install(model, "chunked")
    after = model(ids, labels=ids)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SCALED)
def test_a_factor_that_is_not_known_is_seen(
    tmp_path: Path, monkeypatch: Any, family: str, dtype: torch.dtype
) -> None:
    def difference() -> float:
        model = model_of(tmp_path, family).to(dtype).train()
        model.get_output_embeddings().weight.data.mul_(30)  # scores as large as a trained model's
        head.install(model, "chunked")
        found = proof.difference(model, torch.device("cpu"), 307, dtype)
        assert model.training
        return found

    assert difference() < 1
    monkeypatch.setattr(loss.Logits, "of", classmethod(lambda cls, config: cls()))
    assert difference() > 10


def architecture_of(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config(num_hidden_layers=1))


@pytest.mark.parametrize(
    ("asked", "device", "config", "chosen"),
    [
        ("auto", "cpu", LlamaConfig, "chunked"),
        ("auto", "cuda", LlamaConfig, "trl"),
        ("plain", "cpu", LlamaConfig, "plain"),
        ("auto", "cpu", MixtralConfig, "trl"),
    ],
)
def test_which_head(
    monkeypatch: pytest.MonkeyPatch, asked: str, device: str, config: Any, chosen: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    architecture = architecture_of(config)
    run = Config(model=ModelConfig(lm_head=asked))
    found = head.choose(run, architecture)
    assert (found.setting, found.value) == ("model.lm_head", chosen)
    assert (found.reason == "as set") is (asked != "auto")


def test_a_head_that_would_lose_the_experts_loss_is_refused() -> None:
    run = Config(model=ModelConfig(lm_head="chunked"))
    run.train.extra = {"router_aux_loss_coef": 0.001}
    architecture = architecture_of(MixtralConfig)
    with pytest.raises(ConfigError, match="balances this model's experts"):
        head.choose(run, architecture)
    run.train.extra = {"router_aux_loss_coef": 0}
    assert head.choose(run, architecture).value == "chunked"


def test_a_trained_copy_of_the_head_gets_the_gradient(tmp_path: Path) -> None:
    """PEFT's modules_to_save puts a copy before the base model's own head, which stays frozen."""
    lora = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = get_peft_model(model_of(tmp_path, "llama"), lora)
    grads = {}
    for kind in ("plain", "chunked"):
        head.install(model.get_base_model(), kind)
        found(model)
        grads[kind] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    assert grads["plain"].keys() == grads["chunked"].keys() >= {name}
    assert not any("original_module" in key for key in grads["plain"])
    largest = grads["plain"][name].abs().max()
    assert largest > 0
    torch.testing.assert_close(
        grads["chunked"][name], grads["plain"][name], rtol=1e-4, atol=1e-6 * float(largest)
    )


def test_experts_that_are_named_otherwise_are_balanced_and_missing_ones_are_not() -> None:
    """TRL asks for num_experts; a config may have the fields of experts without any."""
    granite = architecture_of(GraniteMoeConfig)
    assert balance.balances(Config(), granite)
    assert granite.config.num_experts == granite.config.num_local_experts == 8
    assert not balance.balances(Config(), architecture_of(DogeConfig))
    run = Config()
    run.train.extra = {"router_aux_loss_coef": 0.1}
    with pytest.raises(ConfigError, match="llama4_text adds no loss"):
        balance.balances(run, architecture_of(Llama4TextConfig))
