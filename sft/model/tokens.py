"""The rows of new tokens in a model: added, initialised, and trained beside an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft.config.new_tokens import NAME
from sft.config.rules import Choice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from sft.config.settings import Config, LoraSection
    from sft.model.tokenizer import NewTokens

SLICE = 1 << 13  # rows of an embedding that are summed at once in float64


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


def is_tied(model: PreTrainedModel) -> bool:
    """Return whether the head shares its weight with the embedding, by the model's config."""
    return bool(model.config.get_text_config().tie_word_embeddings)


def choose_rows(
    config: Config, model: PreTrainedModel, new: NewTokens, largest_id: int
) -> Choice | None:
    """Describe which rows are trained for the new tokens, and why; None without new tokens.

    Args:
        config: The run's config.
        model: The model on the meta device, with the rows of the new tokens.
        new: The new tokens.
        largest_id: The largest token id of the data.
    """
    if not new:
        return None
    reason = _rows_reason(config, model, new)
    if largest_id < new.ids[0]:
        reason += "; warning: no sample holds one of them: neither template nor data writes it"
    return Choice(NAME, len(new.ids), reason)


def _rows_reason(config: Config, model: PreTrainedModel, new: NewTokens) -> str:
    if not config.lora.enabled:
        return "lora=none trains every row"
    chosen = trained_beside(model, new, config.lora)
    found, reasons = chosen["trainable_token_indices"], []
    if found:
        widths = (model.get_submodule(path).weight.shape[1] for path in found)
        shared = ", which the head shares" * is_tied(model)
        reasons += [
            f"only the rows of new tokens are trained beside the adapter, in {' and '.join(found)}"
            f"{shared}: {len(new.ids) * sum(widths):,} parameters"
        ]
    saved = chosen["modules_to_save"] or []
    if added := [path for path in saved if path not in (config.lora.modules_to_save or ())]:
        reasons += [f"{added[0]} is trained whole, because PEFT cannot train rows beside its bias"]
    return "; ".join(reasons) or "lora.modules_to_save trains every row"


def trains_rows(config: Config, model: PreTrainedModel, new: NewTokens) -> bool:
    """Return whether single rows of an embedding or a head are trained beside an adapter."""
    if not config.lora.enabled:
        return False
    if config.lora.extra.get("trainable_token_indices"):
        return True
    return bool(new) and bool(trained_beside(model, new, config.lora)["trainable_token_indices"])


def trained_beside(model: PreTrainedModel, new: NewTokens, lora: LoraSection) -> dict[str, Any]:
    """Return PEFT's settings with which the rows of new tokens are trained beside an adapter.

    Args:
        model: The model, with or without weights.
        new: The tokens.
        lora: The adapter's settings; the modules of ``modules_to_save`` are trained whole.

    Returns:
        ``trainable_token_indices``: the ids by the path of the embedding and, if it has a weight
        of its own, of the head. ``modules_to_save``: what is given, and a head with a bias, which
        PEFT would leave out beside single rows.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = [embedding] if is_tied(model) else [embedding, head]
    rows, whole = {}, list(lora.modules_to_save or ())
    found = [(p, module) for p, module in model.named_modules() if module in (embedding, head)]
    saved = [p for p, _ in found if any(p == name or p.endswith(f".{name}") for name in whole)]
    if saved and is_tied(model) and lora.extra.get("ensure_weight_tying"):
        found = []  # PEFT trains both whole, whichever of them is named
    for path, module in found:
        if path in saved or not any(module is end for end in ends):
            continue
        if getattr(module, "bias", None) is None:
            rows[path] = new.ids
        else:
            whole.append(path)
    return {"trainable_token_indices": rows, "modules_to_save": whole or None}
