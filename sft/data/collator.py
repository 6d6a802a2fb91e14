"""Collate samples into a batch: padded, packed, or joined into one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sft.data.row_encoder import IGNORE_INDEX


@dataclass
class Collator:
    """Make a batch of samples: see ``sft.data.prepared.Samples``.

    Padded, for samples of 3 and 2 tokens::

        input_ids       [[5, 6, 7], [8, 9, 0]]              (2, 3)
        attention_mask  [[1, 1, 1], [1, 1, 0]]              (2, 3)
        labels          [[-100, 6, 7], [-100, 9, -100]]     (2, 3)

    Packed, if the first sample holds documents of 2 and 1 tokens (``seq_lengths`` [2, 1]). Padding
    counts as a separate document, so that no mask is needed::

        input_ids       [[5, 6, 7], [8, 9, 0]]              (2, 3)
        position_ids    [[0, 1, 0], [0, 1, 0]]              (2, 3)
        labels          [[-100, 6, -100], [-100, 9, -100]]  (2, 3)

    Padding-free, for the same two samples::

        input_ids       [[5, 6, 7, 8, 9]]                   (1, 5)
        position_ids    [[0, 1, 0, 0, 1]]                   (1, 5)
        labels          [[-100, 6, -100, -100, 9]]          (1, 5)

    With ``documents``, for ``sft.fast.attention``, also the document boundaries in all rows::

        cu_seq_lens_q   [0, 2, 3, 5, 6]   int32, and cu_seq_lens_k; padding is [5, 6)
        max_length_q    2                 and max_length_k
        seq_idx         [[0, 0, 1], [0, 0, 1]]   int32: each token's document within its row

    With ``loss_positions``, for ``sft.fast.head``, also the positions of trained labels in all
    rows; finding them on the GPU would make the CPU wait for it::

        loss_positions  [1, 4]

    If samples have ``weights``, also those of the trained labels, in the order of the positions::

        loss_weights    [1.0, 0.5]   float32, whose bits an int32 tensor holds

    Attributes:
        pad_token_id: Id of the padding, which is never trained.
        padding_free: Join the samples into one row.
        pad_to_multiple_of: Round the length of the rows up to a multiple of this.
        documents: Add the document boundaries, in every mode.
        loss_positions: Add the positions of trained labels.
    """

    pad_token_id: int
    padding_free: bool = False
    pad_to_multiple_of: int | None = None
    documents: bool = False
    loss_positions: bool = False

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Collate."""
        ids = [np.asarray(sample["input_ids"], np.int64) for sample in samples]
        labels = [np.array(sample["labels"], np.int64) for sample in samples]
        sizes = [
            np.asarray(sample.get("seq_lengths") or [len(row)], np.int64)
            for sample, row in zip(samples, ids, strict=True)
        ]
        for row, lengths in zip(labels, sizes, strict=True):
            # Nothing precedes the first token of a document, so nothing can predict it.
            row[np.cumsum(lengths) - lengths] = IGNORE_INDEX
        weights = [
            np.asarray(sample.get("weights", np.ones(len(row))), np.float32)
            for sample, row in zip(samples, ids, strict=True)
        ]
        packed = any("seq_lengths" in sample for sample in samples)
        if self.padding_free:
            ids, labels = [np.concatenate(ids)], [np.concatenate(labels)]
            sizes, weights = [np.concatenate(sizes)], [np.concatenate(weights)]
        width = max(map(len, ids))
        width += -width % (self.pad_to_multiple_of or 1)
        batch: dict[str, Any] = {
            "input_ids": _filled(ids, width, self.pad_token_id),
            "labels": _filled(labels, width, IGNORE_INDEX),
        }
        if self.loss_positions:
            batch["loss_positions"] = trained_places(batch["labels"])
        if self.loss_positions and any("weights" in sample for sample in samples):
            table = _filled(weights, width, 0, np.float32)
            # DeepSpeed rounds floating-point inputs to 16 bits, so the bits travel as integers.
            batch["loss_weights"] = table.flatten()[batch["loss_positions"]].view(torch.int32)
        if not (packed or self.padding_free or self.documents):
            batch["attention_mask"] = _filled([np.ones_like(row) for row in ids], width, 0)
            return batch
        sizes = [
            np.append(lengths, width - len(row)) if len(row) < width else lengths
            for row, lengths in zip(ids, sizes, strict=True)
        ]
        places = [np.concatenate([np.arange(n) for n in lengths]) for lengths in sizes]
        batch["position_ids"] = torch.from_numpy(np.stack(places))
        if self.documents:
            lengths = np.concatenate(sizes)
            bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = torch.from_numpy(bounds)
            batch["max_length_q"] = batch["max_length_k"] = int(lengths.max())
            numbers = [np.repeat(np.arange(len(row)), row) for row in sizes]
            batch["seq_idx"] = torch.from_numpy(np.stack(numbers).astype(np.int32))
        return batch


def trained_places(labels: torch.Tensor) -> torch.Tensor:
    """Return the positions of trained labels in the flattened batch, without each row's first.

    Args:
        labels: (batch, length), -100 where nothing is trained.

    Returns:
        (N,), int64.
    """
    trained = labels != IGNORE_INDEX
    trained[:, 0] = False
    return trained.flatten().nonzero()[:, 0]


def _filled(rows: list[Any], width: int, value: int, kind: Any = np.int64) -> torch.Tensor:
    """Stack rows of different lengths, padded on the right with ``value``."""
    table = np.full((len(rows), width), value, kind)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return torch.from_numpy(table)
