"""Learning rates by kind of parameter."""

from typing import Any

import pytest

from sft.config.settings import Config
from sft.errors import ConfigError
from sft.training.groups import Rates, require

RATE, RATIO, EMBEDDING = 1e-3, 16.0, 5e-5


def on_meta(tied: bool = False) -> Any:
    """Build a Llama without weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 300, "intermediate_size": 96}
    config = AutoConfig.for_model("llama", tie_word_embeddings=tied, **sizes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"], "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm", "q_norm"]},
    ],
)
def test_the_rates_of_a_lora_are_those_of_pefts_optimizer(settings: dict[str, Any]) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    model = get_peft_model(on_meta(), LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    expected = create_loraplus_optimizer(
        model,
        torch.optim.SGD,
        lr=RATE,
        loraplus_lr_ratio=RATIO,
        loraplus_lr_embedding=EMBEDDING,
    )
    groups = Rates(RATE, RATIO, EMBEDDING).groups(model, set(), 0.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    wanted = {id(p): group["lr"] for group in expected.param_groups for p in group["params"]}
    assert rates == wanted and groups[0]["lr"] == RATE
    assert len(set(rates.values())) == (3 if "embed_tokens" in settings["target_modules"] else 2)


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_heads_and_single_tokens_have_their_rate(tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    full = on_meta(tied)
    kinds = Rates(RATE, None, EMBEDDING).kinds(full)
    names = {name for name, kind in kinds.items() if kind == "embedding"}
    assert names == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    one = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3])
    kinds = Rates(RATE, None, EMBEDDING).kinds(get_peft_model(on_meta(), one))
    found = [name for name, kind in kinds.items() if kind == "embedding"]
    assert [name.partition("embed_tokens.")[2] for name in found] == [
        "token_adapter.trainable_tokens_delta.default"
    ]
    saved = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    kinds = Rates(RATE, RATIO, EMBEDDING).kinds(get_peft_model(on_meta(), saved))
    assert sum(kind == "embedding" for kind in kinds.values()) == 2


def test_the_groups_keep_weight_decay_and_are_described() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(on_meta(), LoraConfig(target_modules=["q_proj"], bias="all", r=4))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    decayed = {name for name in names if "layers.0" in name}
    groups = Rates(RATE, RATIO).groups(model, decayed, 0.1)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (RATE, 0.1),
        (RATE, 0.0),
        (RATE * RATIO, 0.1),
        (RATE * RATIO, 0.0),
    ]
    assert [len(group["params"]) for group in groups] == [1, 1, 1, 1]
    assert Rates(RATE, RATIO).describe(model) == (
        "0.001 for all other parameters: 512; 0.016 for the adapter's B matrices and vectors "
        "(train.loraplus_lr_ratio): 512"
    )


def test_a_rate_without_embeddings_is_refused() -> None:
    from peft import LoraConfig

    config = Config()
    config.train.embedding_learning_rate = EMBEDDING
    plain = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"no LM head is trained\n.*\[embed_tokens,lm_head\]"):
        require(config, on_meta(), plain)
    only = LoraConfig(target_modules=["embed_tokens"], task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match=r"only embeddings.*\n.*train.learning_rate=5e-05"):
        require(config, on_meta(), only)
    require(config, on_meta(), None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train.loraplus_lr_ratio=16 lora=none", "has no effect with lora.enabled=false"),
        ("train.loraplus_lr_ratio=16 train.optim=lomo", "which groups the parameters"),
        ("train.loraplus_lr_ratio=0", "must be greater than 0"),
        ("train.embedding_learning_rate=-1", "must be greater than 0"),
        ("train.embedding_learning_rate=1e-5 train.optim=galore_adamw", "groups the parameters"),
    ],
)
def test_what_has_no_effect_is_refused(line: str, said: str) -> None:
    from sft.train import main

    with pytest.raises(ConfigError, match=said):
        main.compose(["model=tiny", *line.split()])
