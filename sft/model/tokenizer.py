"""Load a tokenizer, add new tokens to it, and choose the tokens that end and pad a text."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sft.config.new_tokens import NAME, read_new_tokens
from sft.config.rules import written
from sft.config.upstream import did_you_mean
from sft.errors import ConfigError, ModelError, Problem
from sft.model.source import loading, source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sft.config.settings import ModelConfig

logger = logging.getLogger("sft")

CONTROL = re.compile(r"<.+>|\[.+\]", re.DOTALL)  # what tokens are called that are no text


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


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer with its new tokens; see ``load_tokens``."""
    return load_tokens(model)[0]


def load_tokens(model: ModelConfig) -> tuple[PreTrainedTokenizerBase, NewTokens]:
    """Load the tokenizer, add new tokens, and choose EOS and pad token.

    EOS is the pad token of a tokenizer that has none; labels mask padding by length.

    Raises:
        ModelError: The tokenizer does not exist, cannot be reached, or has no EOS token, or its
            files are missing.
        ConfigError: A token that is set does not exist, or cannot be added.
    """
    from transformers import AutoTokenizer

    with loading("tokenizer", model):
        tokenizer = AutoTokenizer.from_pretrained(**source(model))
        if not isinstance(tokenizer.model_max_length, int | float):
            raise ValueError(f"model_max_length={tokenizer.model_max_length} must be a number")
    # Without files, Transformers creates an empty tokenizer of the model's kind.
    folder = Path(str(model.name_or_path))
    files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if folder.is_dir() and not any((folder / file).is_file() for file in files):
        raise ModelError(
            f"{folder} has no tokenizer: none of the files {', '.join(sorted(files))}\n"
            "    fix: copy them from where the weights come from"
        )
    new = add(tokenizer, model)
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {model.name_or_path} has no EOS token, so no text could end\n"
            "    fix: model.eos_token=TOKEN, or set eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, new


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
    try:
        tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in fresh])
    except (NotImplementedError, ValueError) as error:
        rule = f"{type(tokenizer).__name__} takes no new tokens: {error}"
        raise ConfigError([Problem(NAME, rule, f"{NAME}=null")]) from error
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
