"""Check the adapter's settings on the embedding and the head, which often share their weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sft.config.lora_checks import head_targeted
from sft.config.settings import LoraSection
from sft.errors import Problem
from sft.model.tokenizer import NewTokens
from sft.model.tokens import is_tied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TYING = "ensure_weight_tying"


def matches(path: str, name: str) -> bool:
    """Match a module's path with a list's entry as PEFT does: equal, or a suffix of the path."""
    return path == name or path.endswith(f".{name}")


def problems(lora: LoraSection, model: PreTrainedModel, adapted: list[str]) -> Iterator[Problem]:
    """Yield the settings of the adapter that do not fit the weights of embedding and head.

    Args:
        lora: The adapter's settings.
        model: The architecture.
        adapted: The paths of the modules that get an adapter.
    """
    yield from _tying(lora, model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = is_tied(model)
    written = f"lora.target_modules={lora.target_modules}"
    for path in adapted:
        module = model.get_submodule(path)
        if module is head:
            yield head_targeted(lora.target_modules, path)
        elif module is embedding and tied:
            yield Problem(
                written,
                f"LoRA on {path} cannot be merged correctly: the head shares its weight",
                _saved_instead(lora, path),
            )
    rows = lora.extra.get("trainable_token_indices")
    yield from _row_problems(rows, embedding.num_embeddings)
    if rows is not None and getattr(head, "bias", None) is not None:
        named = rows if isinstance(rows, dict) else ()
        if tied or any(matches(path, name) for path in _paths(model, head) for name in named):
            rule = "PEFT would leave out the head's bias beside single rows"
            fix = f"lora.modules_to_save=[{_leaf(model, head)}]"
            yield Problem(f"lora.extra.trainable_token_indices={rows}", rule, fix)
    if lora.extra.get("lora_bias"):
        bare = [
            path for path in adapted if getattr(model.get_submodule(path), "bias", None) is None
        ]
        if bare:
            yield Problem(
                "lora.extra.lora_bias=true",
                f"{bare[0]} has no bias into which the adapter's can be merged",
                "lora.extra.lora_bias=false",
            )


def _row_problems(rows: Any, count: int) -> Iterator[Problem]:
    """Yield the rows that no embedding of ``count`` rows has, and lists without rows."""
    setting = "lora.extra.trainable_token_indices"
    for given in rows.values() if isinstance(rows, dict) else [rows]:
        if given is None:
            continue
        if not isinstance(given, list) or not given or not all(type(row) is int for row in given):
            rule, fix = "must be a list of rows", f"{setting}=[{count - 1}], or leave it out"
            yield Problem(f"{setting}={rows}", rule, fix)
        elif wrong := [row for row in given if not 0 <= row < count]:
            rule = f"has {wrong[0]}, and the embedding has the rows 0 to {count - 1}"
            yield Problem(f"{setting}={rows}", rule, f"{setting}=[{count - 1}]")


def _saved_instead(lora: LoraSection, path: str) -> str:
    """Return the settings that train a module in full instead of adapting it."""
    given = lora.target_modules
    kept = [] if isinstance(given, str) else [name for name in given if not matches(path, name)]
    targets = f"[{','.join(kept)}]" if kept else "all-linear"
    return f"lora.target_modules={targets} lora.modules_to_save=[{path.rpartition('.')[2]}]"


def _tying(lora: LoraSection, model: PreTrainedModel) -> Iterator[Problem]:
    """Yield the settings with which PEFT would not train a weight that two modules share as one."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    saved = lora.modules_to_save or ()
    if not (lora.extra.get(TYING) and is_tied(model) and _whole(lora, model)):
        return
    both = ",".join(_leaf(model, end) for end in (embedding, head))
    setting = f"lora.extra.{TYING}=true"
    if getattr(head, "bias", None) is not None:
        rule = "PEFT would train the head without its bias"
        fix = f"lora.extra.{TYING}=false lora.modules_to_save=[{both}], which are trained apart"
        yield Problem(setting, rule, fix)
    elif not any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in saved):
        rule = f"PEFT ties no module of the names {', '.join(saved)}"
        named = any(name in EMBEDDING_LAYER_NAMES for name in both.split(","))
        apart = f"lora.extra.{TYING}=false lora.modules_to_save=[{both}], which are trained apart"
        yield Problem(setting, rule, f"lora.modules_to_save=[{both}]" if named else apart)


def _whole(lora: LoraSection, model: PreTrainedModel) -> list[Any]:
    """List the modules of embedding and head that ``lora.modules_to_save`` trains in full."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    saved = lora.modules_to_save or ()
    return [
        end
        for end in ends
        if any(matches(path, name) for path in _paths(model, end) for name in saved)
    ]


def new_token_problems(
    lora: LoraSection, model: PreTrainedModel, new: NewTokens, adapted: list[str]
) -> Iterator[Problem]:
    """Yield the settings with which the rows of new tokens would not be trained as they are used.

    Args:
        lora: The adapter's settings.
        model: The architecture.
        new: The new tokens.
        adapted: The paths of the modules that get an adapter.
    """
    if not new:
        return
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    for path in (path for path in adapted if model.get_submodule(path) is embedding):
        rule = "an embedding with an adapter cannot train the rows of model.new_tokens too"
        written = f"lora.target_modules={lora.target_modules}"
        yield Problem(written, rule, _saved_instead(lora, path))
    saved = lora.modules_to_save or ()
    whole = _whole(lora, model)
    if not is_tied(model):
        return
    if len(whole) == 1 and not lora.extra.get(TYING):
        both = ",".join(_leaf(model, end) for end in (embedding, head))
        rule = "unties the head from the embedding, and the new tokens' rows of one stay untrained"
        written = f"lora.modules_to_save=[{','.join(saved)}]"
        fix = (
            f"lora.modules_to_save=null, which trains these rows, or lora.modules_to_save=[{both}]"
        )
        yield Problem(written, rule, fix)
    if not whole and getattr(head, "bias", None) is not None:
        rule = "PEFT cannot train single rows of a tied embedding beside the head's bias"
        both = ",".join(_leaf(model, end) for end in (embedding, head))
        fix = f"lora.modules_to_save=[{both}], which are trained apart, or lora=none"
        yield Problem("model.new_tokens", rule, fix)


def _paths(model: PreTrainedModel, wanted: Any) -> list[str]:
    return [path for path, module in model.named_modules() if module is wanted]


def _leaf(model: PreTrainedModel, wanted: Any) -> str:
    return _paths(model, wanted)[0].rpartition(".")[2]
