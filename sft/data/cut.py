"""Count the trained tokens that truncation cuts off, and list the rows that lose most of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sft.data.store import Store

MOST_CUT = 5  # rows that the audit lists


def losses(store: Store, documents: NDArray[np.int64], max_length: int) -> NDArray[np.int64]:
    """Return what truncation does to the tokens in the loss of each document.

    Returns:
        Shape (3, documents): the position of the first token in the loss (the length if there is
        none), the number of these tokens, and how many of them are beyond ``max_length``.
    """
    found = np.zeros((3, len(documents)), np.int64)
    for index, document in enumerate(documents.tolist()):
        begin, length = store.begins[document], store.documents["length"][document]
        marks = store.marks[begin : begin + length]
        places = np.flatnonzero(marks[1:] & 1) + 1  # nothing predicts the first token
        beyond = len(places) - np.searchsorted(places, max_length)
        found[:, index] = places[0] if len(places) else length, len(places), beyond
    return found


def most_cut(
    store: Store,
    documents: NDArray[np.int64],
    trained: NDArray[np.int64],
    cut_off: NDArray[np.int64],
) -> dict[str, dict[str, int]]:
    """Return the rows that lose the most trained tokens, by FILE:LINE, the worst first.

    Args:
        store: Holds the documents.
        documents: Documents, of which a row may have several.
        trained: The trained tokens of each.
        cut_off: Those that are cut off.
    """
    found = store.documents[documents]
    rows, first, index = np.unique(found["row"], return_index=True, return_inverse=True)
    lost = np.bincount(index, cut_off, len(rows)).astype(np.int64)
    total = np.bincount(index, trained, len(rows)).astype(np.int64)
    worst = [row for row in np.argsort(-lost, kind="stable")[:MOST_CUT].tolist() if lost[row]]
    places = {row: found[first[row]] for row in worst}
    return {
        f"{store.files[place['file']]}:{place['line']}": {
            "cut_off": int(lost[row]),
            "trained_tokens": int(total[row]),
        }
        for row, place in places.items()
    }
