"""Repeat the blocks of a plan by weight, fill them with tokens and labels, write and count them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sft.data import packing, sources
from sft.data.documents import ROLES
from sft.data.splits import Split
from sft.data.store import Store
from sft.data.token_rows import IGNORE_INDEX
from sft.progress import progress

BLOCKS = 1000  # per Arrow record batch
MIX = np.uint64(0x9E3779B97F4A7C15)  # an odd constant, to mix a slice's place into its hash


def weighted(
    plan: packing.Plan, store: Store, given: Sequence[sources.Source], seed: int
) -> packing.Plan:
    """Repeat each source's blocks ``weight`` times; for a fraction, draw that share of them."""
    sources_of = store.documents["source"][plan.document[plan.first[:-1]]]
    generator = np.random.default_rng(seed)
    chosen: list[NDArray[np.int64]] = []
    for number, source in enumerate(given):
        blocks = np.flatnonzero(sources_of == number)
        times, part = divmod(source.weight, 1)
        chosen += [blocks] * int(times)
        extra = generator.permutation(blocks)[: round(part * len(blocks))]
        chosen.append(np.sort(extra))
    order = np.concatenate(chosen)
    return plan.take([np.arange(plan.first[i], plan.first[i + 1]) for i in order.tolist()])


def write_blocks(path: Path, store: Store, plan: packing.Plan, split: Split) -> None:
    """Write the blocks to an Arrow file, and count their tokens."""
    counts, config = split.counts, split.config
    packed = split.isolated and bool((np.diff(plan.first) > 1).any())
    kinds = dict.fromkeys(("input_ids", "labels", "rows"), pa.list_(pa.int32()))
    if packed:
        kinds["seq_lengths"] = pa.list_(pa.int32())
    # Evaluations count every trained token alike, so that perplexities can be compared.
    weights = store.weights if split.name == "train" else None
    if weights is not None:
        kinds["weights"] = pa.list_(pa.float32())
    roles = np.zeros(2 * len(ROLES), np.int64)
    new = _new(plan, store)
    with (
        pa.OSFile(str(path), "wb") as sink,
        pa.ipc.new_stream(sink, pa.schema(kinds)) as writer,
        progress(f"writing {split.name} samples", plan.blocks, "samples") as bar,
    ):
        for low, high in packing.chunks(plan, BLOCKS):
            pieces = slice(plan.first[low], plan.first[high])
            sizes = plan.stop[pieces] - plan.start[pieces]
            begins = store.begins[plan.document[pieces]] + plan.start[pieces]
            spans = list(zip(begins.tolist(), (begins + sizes).tolist(), strict=True))
            ids = np.concatenate([store.ids[a:b] for a, b in spans])
            marks = np.concatenate([store.marks[a:b] for a, b in spans])
            firsts = np.cumsum(sizes) - sizes
            offsets = plan.first[low : high + 1] - plan.first[low]
            edges = np.concatenate([firsts, [len(ids)]])[offsets]
            labels = np.where(marks & 1, ids, IGNORE_INDEX).astype(np.int32)
            # Nothing precedes the first token of a document, so nothing can predict it.
            labels[firsts if split.isolated else edges[:-1]] = IGNORE_INDEX
            repeated = plan.repeated[pieces]
            counts.repeated += int(repeated.sum())
            if config.boundary_overlap == "context" and repeated.max(initial=0) > 1:
                places = np.arange(len(ids)) - np.repeat(firsts, sizes)
                labels[places < np.repeat(repeated, sizes)] = IGNORE_INDEX
            # Row numbers count from 1 in reading order; an error about a batch names them.
            rows = (store.documents["row"][plan.document[pieces]] + 1).astype(np.int32)
            columns = [_lists(ids, edges), _lists(labels, edges), _lists(rows, offsets)]
            if packed:
                columns.append(_lists(sizes.astype(np.int32), offsets))
            if weights is not None:
                own = np.concatenate([weights[a:b] for a, b in spans])
                columns.append(_lists(own, edges))
                counts.weighted += int(((own < 1) & (labels != IGNORE_INDEX)).sum())
            writer.write_batch(pa.record_batch(columns, list(kinds)))
            seen = labels != IGNORE_INDEX
            fresh = np.repeat(new[pieces], sizes)
            if config.boundary_overlap == "train":
                fresh &= np.arange(len(ids)) >= np.repeat(firsts + repeated, sizes)
            counts.distinct_trained += int((seen & fresh).sum())
            counts.samples += high - low
            counts.tokens += len(ids)
            counts.trained_tokens += int(seen.sum())
            counts.longest = max(counts.longest, int(np.diff(edges).max()))
            counts.largest_id = max(counts.largest_id, int(ids.max()))
            roles += np.bincount(2 * (marks // 2) + seen, minlength=len(roles))
            bar.update(high - low)
    counts.roles = _by_role(roles)
    if packed or (split.text and config.packing != "none"):
        counts.efficiency = counts.tokens / max(1, counts.samples * config.max_length)


def _by_role(counted: NDArray[np.int64]) -> dict[str, dict[str, int]]:
    """Name the counts of tokens that are not trained and trained, of each role in turn."""
    return {
        role: {"tokens": int(pair.sum()), "trained": int(pair[1])}
        for role, pair in zip(ROLES, counted.reshape(-1, 2), strict=True)
        if pair.sum()
    }


def _new(plan: packing.Plan, store: Store) -> NDArray[np.bool_]:
    """Mark the slices that no earlier slice of the plan equals, of the same or an equal document.

    Returns:
        Shape (slices,).
    """
    keys = store.documents["hash"][plan.document] + plan.start.astype(np.uint64) * MIX
    keys = (keys ^ (keys >> np.uint64(32))) * MIX + plan.stop.astype(np.uint64)
    new = np.zeros(len(keys), bool)
    new[np.unique(keys, return_index=True)[1]] = True
    return new


def _lists(values: NDArray[Any], edges: NDArray[np.int64]) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(edges, pa.int32()), pa.array(values))
