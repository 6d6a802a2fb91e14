"""Check on the model itself, before the first step, that no prediction sees what it must not see.

A token's prediction may depend on earlier tokens of its own document only. Three properties of the
model are checked: it is causal; padding changes nothing; and, if a row holds several documents, one
document does not change another, which is then computed as it is alone with the model's own
attention. The checks run the model as training does, with its weights, kernels and precision.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from sft.config.rules import Choice
from sft.data.row_encoder import IGNORE_INDEX
from sft.errors import ModelError
from sft.fast.attention import NAME, UNPACKED, kernel_of
from sft.fast.mixers import INDEXED, experts, largest, mixers, reach, text_config
from sft.fast.probe import Probe, distance

logger = logging.getLogger("sft")

FIRST = 6  # tokens of the document before the one that is observed
ALONE = "train.per_device_train_batch_size=1 train.per_device_eval_batch_size=1"
# Of the effect that seeing the other tokens has: less is not a leak but rounding. A module that
# leaks in one of 32 layers still reaches a larger share.
SHARE = 1 / 64


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off, and compute no gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def own_attention(inner: Any) -> Iterator[None]:
    """Compute with the model's own attention where ours replaces it."""
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    if kernel_of(base.config) != NAME:
        yield
        return
    base.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(NAME)


def _refuse_indexed(probe: Probe, where: str, fix: str) -> None:
    """Raise if the model chooses some tokens to attend to, and a row holds others beside them.

    The indexer of DeepSeek-V3.2 gives many tokens the same score, 0, and topk chooses among these
    by their place in the row, so that padding or other documents change the choice.
    """
    chosen = largest(text_config(probe.inner), *INDEXED)
    if chosen and probe.longest > chosen:
        raise ModelError(
            f"{probe.inner.config.model_type} attends to {chosen} tokens that its indexer chooses, "
            f"and the data has documents of {probe.longest}: {where} would change the choice "
            f"between equal scores\n    fix: {fix}"
        )


def prove_isolation(probe: Probe, may_pad: bool) -> Choice | None:
    """Check that documents in one row do not attend to each other in this model.

    Args:
        probe: The model and the run's collator, which is set to pad samples if the check fails and
            ``may_pad`` allows it.
        may_pad: Whether samples may be padded instead of joined.

    Returns:
        None if the check passes; else the choice that replaces ``train.padding_free``.

    Raises:
        ModelError: The check fails, and samples must be joined.
    """
    try:
        require_isolation(probe)
    except ModelError as error:
        if not may_pad:
            raise
        probe.collator.padding_free = probe.collator.documents = False
        choice = Choice("train.padding_free", False, str(error).splitlines()[0])
        logger.info("train.padding_free=false: %s", choice.reason)
        return choice
    return None


def _rows(probe: Probe, second: list[int], seed: int, apart: bool = True) -> list[dict[str, Any]]:
    """Return two rows around a second document; the first and third one depend on the seed.

    Args:
        probe: Makes the documents.
        second: The token ids of the document that is observed, which ends the first row.
        seed: Chooses the tokens of the others.
        apart: Whether the first row is two documents; false: it is one.
    """
    lengths = [FIRST, len(second)] if apart else [FIRST + len(second)]
    third = probe.document(seed, FIRST - 2)
    first = {
        "input_ids": probe.document(seed, FIRST) + second,
        "labels": [IGNORE_INDEX] * (FIRST + 1) + second[1:],
        "seq_lengths": lengths,
    }
    other = {"input_ids": third, "labels": [IGNORE_INDEX] * len(third)}
    return [first, other | {"seq_lengths": [len(third)]}]


def require_isolation(probe: Probe) -> None:
    """Require that a document in a row is computed as it is alone.

    Two documents are packed into a row, and a third one makes a row of its own. If the tokens of
    the first and third change, the output for the second must not. The outputs must be equal to the
    last bit, except where other tokens change the order of a sum: then their difference must be
    small beside the effect of the change on a text that does see these tokens, and no gradient may
    reach the first document, except where sums over the row are subtracted. The output must also
    be that of the second document alone, computed with the model's own attention. The second
    document is longer than all windows and chunks, unless no document of the data is.

    All ranks must call this function.

    Raises:
        ModelError: The documents attend to each other, or windows or positions are wrong.
    """
    inner = probe.inner
    _refuse_indexed(probe, "other documents in the row", UNPACKED)
    length = max(min(reach(inner) + FIRST - 1, probe.longest), FIRST - 1)
    second = probe.document(0, length)
    head = slice(0, 2 * FIRST)  # the tokens after a boundary, which a leak reaches first

    rows = partial(_rows, probe, second)
    # LLM.int8 searches all tokens for outliers, experts get tokens of all documents, and scans over
    # states subtract sums over the row. All three change the order of summation.
    scans = bool(mixers(inner))
    reorders = scans or getattr(inner, "is_loaded_in_8bit", False) or experts(inner)
    # Under ZeRO-3 a backward pass would gather weights; scans leave the rounding of a difference.
    partitioned = is_deepspeed_zero3_enabled()
    influence = 0.0
    with evaluating(probe.model):
        packed, changed = probe.run(rows(1)), probe.run(rows(2))
        visible, moved = (probe.run(rows(seed, apart=False)) for seed in (1, 2))
        if reorders and not (scans or partitioned):
            influence = probe.influence(rows(1), FIRST)
        alone = dataclasses.replace(probe.collator, padding_free=False, documents=False)
        with own_attention(inner):
            wanted = probe.run([{"input_ids": second, "labels": second}], alone)
    scale = float(wanted.abs().max())
    between = distance(packed[head], changed[head])
    if reorders:
        allowed = probe.bound(scale, distance(visible[head], moved[head]), SHARE)
        leaks = not (between <= allowed and influence == 0)
        between = max(between, influence)
    else:
        leaks = not torch.equal(packed, changed)
        between = float((packed - changed).abs().max())
    with_kernel = f"with attn_implementation={kernel_of(inner.config)}, documents that are packed"
    if leaks:
        raise ModelError(
            f"{with_kernel} together attend to each other in this model (outputs differ by "
            f"{between:.2g})\n    fix: {UNPACKED}"
        )
    apart = distance(packed, wanted)
    if not apart <= probe.bound(scale, distance(visible[head], packed[head]), 8 * SHARE):
        raise ModelError(
            f"{with_kernel} together are not computed as they are alone in this model, whose "
            f"positions, windows or chunks are its own (outputs differ by {apart:.2g})\n"
            f"    fix: {UNPACKED}"
        )


def require_rows(probe: Probe, batched: bool = True) -> None:
    """Require that a token's prediction depends on neither later tokens nor padding.

    The row is longer than all windows and chunks, unless no document of the data is. All ranks must
    call this function.

    Args:
        probe: The model.
        batched: Whether rows are padded to the length of others.

    Raises:
        ModelError: The model sees later tokens, or padding changes its outputs.
    """
    inner = probe.inner
    if batched:
        _refuse_indexed(probe, "padding", ALONE)
    kind = inner.config.model_type
    collator = dataclasses.replace(probe.collator, padding_free=False, documents=False)
    length = max(min(reach(inner) + 2 * FIRST, probe.longest), FIRST + 4)

    def seen(ids: list[int], *others: list[int]) -> torch.Tensor:
        labels = [*ids[:-2], IGNORE_INDEX, IGNORE_INDEX]
        rows = [{"input_ids": ids, "labels": labels}]
        rows += [{"input_ids": row, "labels": [IGNORE_INDEX] * len(row)} for row in others]
        return probe.run(rows, collator)

    with evaluating(probe.model), own_attention(inner):
        ids = probe.document(0, length)
        plain = seen(ids)
        earlier = seen([*probe.document(1, 2), *ids[2:]])[2:]
        padded = seen(ids, probe.document(1, length + FIRST)) if batched else plain
        later = seen([*ids[:-2], *probe.document(1, 2)])
    effect, scale = distance(plain[2:], earlier), float(plain.abs().max())
    allowed = probe.bound(scale, effect, 8 * SHARE)
    if not (between := distance(plain, padded)) <= allowed:
        raise ModelError(
            f"{kind} computes a row in a padded batch differently from the row alone (outputs "
            f"differ by {between:.2g})\n    fix: {ALONE}"
        )
    if not (between := distance(plain, later)) <= allowed:
        raise ModelError(
            f"{kind} is not causal: the prediction of a token changes with the tokens after it "
            f"(by {between:.2g}), so the loss would measure copying\n"
            "    fix: model.name_or_path of a model that was trained to predict the next token; a "
            "decoder of this type has is_decoder=true in its config.json"
        )
