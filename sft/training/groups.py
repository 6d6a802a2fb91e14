"""Learning rates by kind of parameter: the adapter's B matrices (LoRA+), and embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.checkpoint import sharded
from sft.config.settings import Config, TrainConfig
from sft.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig
    from transformers import PreTrainedModel

EMBEDDING = "train.embedding_learning_rate"
KINDS = {  # in the order of the optimizer's groups: the rate of the first one is logged
    "": "all other parameters",
    "B": "the adapter's B matrices and vectors (train.loraplus_lr_ratio)",
    "embedding": f"embeddings and LM heads ({EMBEDDING})",
}


@dataclass(frozen=True)
class Rates:
    """The peak learning rate of each kind of parameter; the schedule scales all of them alike.

    Attributes:
        base: ``train.learning_rate``.
        ratio: ``train.loraplus_lr_ratio``: the factor for B matrices and for vectors, such as
            biases and DoRA's magnitudes (arXiv 2402.12354; PEFT's ``create_loraplus_optimizer``
            and the authors' code give it to vectors, too).
        embedding: ``train.embedding_learning_rate``.
    """

    base: float
    ratio: float | None = None
    embedding: float | None = None

    @classmethod
    def of(cls, train: TrainConfig) -> Rates:
        """Take the rates from the settings."""
        return cls(train.learning_rate, train.loraplus_lr_ratio, train.embedding_learning_rate)

    @property
    def differ(self) -> bool:
        """Whether a kind of parameter has a rate of its own."""
        return self.ratio is not None or self.embedding is not None

    def value(self, kind: str) -> float:
        """Return the rate of a kind."""
        if kind == "B":
            return self.base * (self.ratio or 1.0)
        return self.base if kind == "" or self.embedding is None else self.embedding

    def kinds(self, model: Any) -> dict[str, str]:
        """Map the names of the trained parameters to their kinds."""
        embeddings = set(map(id, _of_embeddings(model))) if self.embedding is not None else set()
        found = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                # ZeRO-3 empties the parameters that it has sharded.
                vector = len(sharded.shape_of(parameter)) == 1
                found[name] = ""
                if id(parameter) in embeddings:
                    found[name] = "embedding"
                elif self.ratio is not None and ("lora_B" in name or vector):
                    found[name] = "B"
        return found

    def groups(self, model: Any, decayed: set[str], weight_decay: float) -> list[dict[str, Any]]:
        """Make the optimizer's groups of parameters: by kind, with and without weight decay.

        Args:
            model: The model, not wrapped.
            decayed: Names of the parameters that decay.
            weight_decay: ``train.weight_decay``.
        """
        kinds, parameters = self.kinds(model), dict(model.named_parameters())
        found = []
        for kind in KINDS:
            for decays in (True, False):
                members = [
                    parameters[name]
                    for name, own in kinds.items()
                    if own == kind and (name in decayed) == decays
                ]
                decay = weight_decay if decays else 0.0
                if members:
                    group = {"params": members, "lr": self.value(kind), "weight_decay": decay}
                    found.append(group)
        return found

    def describe(self, model: Any) -> str:
        """Describe the rates and how many parameters have them; the first one is logged."""
        kinds, parameters = self.kinds(model), dict(model.named_parameters())
        counts = dict.fromkeys(KINDS, 0)
        for name, kind in kinds.items():
            counts[kind] += sharded.shape_of(parameters[name]).numel()
        return "; ".join(
            f"{self.value(kind):g} for {KINDS[kind]}: {count:,}"
            for kind, count in counts.items()
            if count
        )


def _of_embeddings(model: Any) -> Iterator[torch.nn.Parameter]:
    """Yield the parameters of embeddings, of LM heads, and of adapters on embeddings."""
    from peft.tuners.lora import Embedding
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from torch import nn

    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    heads = (bare.get_input_embeddings(), bare.get_output_embeddings())
    for module in model.modules():
        kinds = (nn.Embedding, Embedding, TrainableTokensLayer)
        if isinstance(module, kinds) or any(module is head for head in heads):
            yield from module.parameters()


def require(config: Config, architecture: PreTrainedModel, lora: LoraConfig | None) -> None:
    """Check that ``train.embedding_learning_rate`` has an effect, before any weight loads.

    Args:
        config: The run's config.
        architecture: The model on the meta device; without an adapter, frozen as in training.
        lora: PEFT's config of the run's adapter.

    Raises:
        ConfigError: No embedding is trained, or nothing else is.
    """
    from sft.model.adapter import attached

    rates = Rates.of(config.train)
    if rates.embedding is None:
        return
    model = architecture if lora is None else attached(lora, architecture)
    found = set(rates.kinds(model).values())
    setting = f"{EMBEDDING}={rates.embedding:g}"
    if "embedding" not in found:
        layers = (architecture.get_input_embeddings(), architecture.get_output_embeddings())
        paths = [path for path, module in architecture.named_modules() if module in layers]
        names = ",".join(dict.fromkeys(path.rpartition(".")[2] for path in paths))
        fix = f"{EMBEDDING}=null" + (f", or lora.modules_to_save=[{names}]" if lora else "")
        raise ConfigError([Problem(setting, "no embedding and no LM head is trained", fix)])
    if found == {"embedding"}:
        rule = "only embeddings are trained, so nothing would have train.learning_rate"
        fix = f"train.learning_rate={rates.embedding:g} {EMBEDDING}=null"
        raise ConfigError([Problem(setting, rule, fix)])
