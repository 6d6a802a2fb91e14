"""Tokens that a run chooses or adds: in the tokenizer, in the model's rows, and for generation."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sft.config.new_tokens import NAME, read_new_tokens
from sft.config.rules import Choice, written
from sft.config.upstream import did_you_mean
from sft.errors import ConfigError, Problem

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft.config.settings import Config, ModelConfig

logger = logging.getLogger("sft")

CONTROL = re.compile(r"<.+>|\[.+\]", re.DOTALL)  # what tokens are called that are no text
SLICE = 1 << 13  # rows of an embedding that are summed at once in float64


@dataclass(frozen=True)
class NewTokens:
    """The tokens that ``model.new_tokens`` adds to a tokenizer.

    Attributes:
        rows: The id of each new token, and the ids of its description's tokens; None: it has none.
        known: The ids that the tokenizer had before.
    """

    rows: dict[int, list[int] | None]
    known: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def ids(self) -> list[int]:
        """The ids of the new tokens, in ascending order."""
        return sorted(self.rows)

    @property
    def needed(self) -> int:
        """The number of rows that an embedding must have; 0 without new tokens."""
        return max(self.rows, default=-1) + 1


NO_TOKENS = NewTokens({}, ())


def add(tokenizer: PreTrainedTokenizerBase, model: ModelConfig) -> NewTokens:
    """Add the new tokens to a tokenizer, and choose its EOS and pad token.

    New tokens are ordinary: they are split from a text before anything else is, and an answer shows
    them. A token that ends or pads a text is a special one.

    Raises:
        ConfigError: The tokenizer has no token of the name of EOS or pad, or a new token cannot be
            added.
    """
    from tokenizers import AddedToken

    given = read_new_tokens(model.new_tokens) or []
    known = tokenizer.get_vocab()
    described = given if isinstance(given, dict) else dict.fromkeys(given)
    fresh = [token for token in described if token not in known]
    if old := [token for token in described if token in known]:
        logger.info("%s: the tokenizer has %s already", NAME, ", ".join(map(repr, old)))
    rows = {token: _encoded(tokenizer, token, described[token]) for token in fresh}
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in fresh])
    found = tokenizer.get_vocab()
    split = (tokenizer.encode(token, add_special_tokens=False) for token in fresh)
    if lost := [t for t, ids in zip(fresh, split, strict=True) if ids != [found.get(t)]]:
        rule = "the tokenizer does not encode it as one token"
        raise ConfigError([Problem(f"{NAME}: {token!r}", rule, "leave it out") for token in lost])
    for name in ("eos_token", "pad_token"):
        if (token := getattr(model, name)) is not None:
            _require_token(tokenizer, f"model.{name}", token)
            tokenizer.add_special_tokens({name: token})
    return NewTokens({found[t]: ids for t, ids in rows.items()}, tuple(sorted(known.values())))


def _encoded(tokenizer: PreTrainedTokenizerBase, token: str, text: str | None) -> list[int] | None:
    if text is None:
        return None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        rule = f"its description {text!r} has no tokens"
        raise ConfigError([Problem(f"{NAME}: {token!r}", rule, "a longer description, or null")])
    return ids


def _require_token(tokenizer: PreTrainedTokenizerBase, name: str, token: str) -> None:
    """Require that a token exists and is not a part of texts, which it would cut there.

    Raises:
        ConfigError: It does not exist, or is text.
    """
    added = [item.content for item in tokenizer.added_tokens_decoder.values()]
    vocabulary = tokenizer.get_vocab()
    if token in added or (token in vocabulary and CONTROL.fullmatch(token)):
        return
    hint = did_you_mean(token, [*added, *filter(CONTROL.fullmatch, vocabulary)])
    if token in vocabulary:
        rule = "is text in the tokenizer's vocabulary, so that texts would be cut there"
    else:
        rule = "the tokenizer has no such token"
        hint += f", or add it with '{NAME}=[\"{token}\"]'"
    raise ConfigError([Problem(written(name, token), rule, hint)])


def grow(model: PreTrainedModel, rows: int) -> None:
    """Append rows to the embedding and the head, where there are fewer; see ``initialise``.

    The head's bias gets the mean of its values there, so that a merge computes the same.
    """
    import torch
    from peft.utils.integrations import gather_params_ctx

    before = model.get_input_embeddings().num_embeddings
    if before >= rows:
        return
    head = model.get_output_embeddings()
    bias = None if head is None else getattr(head, "bias", None)
    if bias is not None:
        with gather_params_ctx([bias], modifier_rank=None):
            mean = bias.double().mean()
    model.resize_token_embeddings(rows, mean_resizing=False)
    if bias is not None:
        longer = model.get_output_embeddings().bias
        with torch.no_grad(), gather_params_ctx([longer], modifier_rank=0):
            longer.data[before:] = mean.to(longer.dtype)


def initialise(model: PreTrainedModel, new: NewTokens) -> None:
    """Add rows for the new tokens, and set them in the embedding and the head.

    A row is the mean of the rows of its description's tokens, or without one of all rows that have
    a token. Rows that an embedding has beyond its vocabulary are used before rows are added. All
    ranks must call it.
    """
    import torch
    from peft.utils.integrations import gather_params_ctx

    if not new:
        return
    grow(model, new.needed)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(end.weight): end.weight for end in ends if end is not None}
    for weight in weights.values():
        with gather_params_ctx([weight], modifier_rank=0):
            data = weight.data
            mean = _mean(data, [row for row in new.known if row < len(data)])
            texts = (new.rows[token] for token in new.ids)
            values = [mean if ids is None else _mean(data, ids) for ids in texts]
            data[new.ids] = torch.stack(values)


def _mean(weight: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Return the mean of rows of a weight, summed in float64: shape (width,)."""
    import torch

    total = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for start in range(0, len(rows), SLICE):
        total += weight[rows[start : start + SLICE]].double().sum(0)
    return (total / len(rows)).to(weight.dtype)


def choose_rows(config: Config, model: PreTrainedModel, new: NewTokens) -> Choice | None:
    """Describe which rows are trained for the new tokens, and why; None without new tokens.

    Args:
        config: The run's config.
        model: The model on the meta device, with the rows of the new tokens.
        new: The new tokens.
    """
    if not new:
        return None
    count = len(new.ids)
    if not config.lora.enabled:
        return Choice(NAME, count, "lora=none trains every row")
    found = trained_rows(model, new, config.lora.modules_to_save)
    if not found:
        return Choice(NAME, count, "lora.modules_to_save trains every row")
    width = sum(model.get_submodule(path).weight.shape[1] for path in found)
    reason = f"only the rows of new tokens are trained beside the adapter, in {' and '.join(found)}"
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        reason += ", which the head shares"
    return Choice(NAME, count, f"{reason}: {count * width:,} parameters")


def trained_rows(
    model: PreTrainedModel, new: NewTokens, saved: Sequence[str] | None
) -> dict[str, list[int]]:
    """Return PEFT's ``trainable_token_indices`` for the new tokens.

    Args:
        model: The model, with or without weights.
        new: The tokens.
        saved: ``lora.modules_to_save``, whose modules are trained whole.

    Returns:
        The ids by the path of the embedding and, if it has a weight of its own, of the head.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embedding] if head.weight is embedding.weight else [embedding, head]
    found = {}
    for path, module in model.named_modules():
        whole = any(path == name or path.endswith(f".{name}") for name in saved or ())
        if any(module is end for end in ends) and not whole:
            found[path] = new.ids
    return found
