"""Filter, cut, pack and count the documents of one part: train, eval, or a set of dataset.eval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.config.data_settings import CHECKS
from sft.config.settings import DatasetConfig
from sft.data import packing, sources
from sft.data.audit import Counts, describe_lengths
from sft.data.cut import losses, most_cut
from sft.data.store import Dropped, Store
from sft.data.template import Template
from sft.errors import DataError


def _near_duplicates(found: NDArray[Any]) -> int:
    """Count the documents that differ from an earlier one only in white space and case."""
    _, first = np.unique(found["hash"], return_index=True)  # exact copies are counted apart
    return len(first) - len(np.unique(found["near_hash"][first]))


def parts_of(
    store: Store, given: Sequence[sources.Source], config: DatasetConfig, seed: int
) -> dict[str, NDArray[np.int64]]:
    """List the documents of each part: those of its sources, or for ``eval`` a share of the rows.

    Raises:
        DataError: Holding out ``dataset.eval_fraction`` leaves no row to train on.
    """
    documents = store.documents
    found: dict[str, NDArray[np.int64]] = {}
    for part in dict.fromkeys(source.part for source in given):
        own = np.array([source.part == part for source in given])
        found[part] = np.flatnonzero(own[documents["source"]])
    if config.eval_fraction:
        all_rows = found["train"]
        apart = _share(store, all_rows, given, config, seed)
        sets = {part: own for part, own in found.items() if part != "train"}
        found = {"train": all_rows[~apart], "eval": all_rows[apart], **sets}
    return found


def _share(
    store: Store,
    documents: NDArray[np.int64],
    given: Sequence[sources.Source],
    config: DatasetConfig,
    seed: int,
) -> NDArray[np.bool_]:
    """Mark the documents of the rows that ``dataset.eval_fraction`` holds out."""
    numbers = store.documents["row"][documents]
    rows = np.unique(numbers)
    count = max(1, round(len(rows) * config.eval_fraction))
    if count >= len(rows):
        raise DataError(
            f"dataset.eval_fraction={config.eval_fraction} of {len(rows)} "
            f"row{'s' * (len(rows) != 1)} leaves none to train on\n    fix: dataset.eval_fraction=0"
        )
    # The rows are the two halves of one text (see sources.halves): hold out the second.
    trained = [source for source in given if not source.held_out]
    halves = store.read[trained[0].name]["rows"] == 2 and len(trained) == 1
    chosen = rows[-1:] if halves else np.random.default_rng(seed).permutation(rows)[:count]
    return np.isin(numbers, chosen)


class Split:
    """The documents of one part, and their plan of samples."""

    def __init__(
        self,
        name: str,
        store: Store,
        documents: NDArray[np.int64],
        config: DatasetConfig,
        template: Template,
        dropped: Dropped,
    ) -> None:
        self.name, self.store, self.documents = name, store, documents
        self.config, self.template, self.dropped = config, template, dropped
        self.text = template.config.kind == "text"
        # Plain-text rows without EOS (template.append_eos=false) form one document.
        self.isolated = not self.text or template.config.append_eos
        self.counts = Counts(max_length=config.max_length)

    def count_read(self, given: Sequence[sources.Source]) -> None:
        """Count the rows, and the documents that each check finds."""
        found, counts = self.store.documents[self.documents], self.counts
        counts.rows = len(np.unique(found["row"]))
        counts.found = len(found)
        for source in given:
            read = self.store.read[source.name]
            counts.sources[source.name] = {**read, "weight": source.weight}
            counts.rows += read["bad"] + read["empty"]
            counts.bad += read["bad"]
            counts.empty += read["empty"]
        counts.dropped = counts.bad + counts.empty
        counts.unrolled = len(np.unique(found["row"][found["unrolled"]]))
        counts.unused_columns = self._unused(found)
        counts.lengths = describe_lengths(found["length"])
        counts.checks = dict.fromkeys(CHECKS, 0) | {
            "control_tokens": int(found["control"].sum()),
            "double_bos": int(found["double_bos"].sum()),
            "never_stops": int(found["never_stops"].sum()),
            "prompt_differs": int(found["prompt_differs"].sum()),
            "empty_answers": int(found["empty_answers"].sum()),
            "duplicates": len(found) - len(np.unique(found["hash"])),
            "near_duplicates": _near_duplicates(found),
        }

    def compare(self, trained: NDArray[Any]) -> None:
        """Count the held-out documents that are trained on too, and those that nearly are.

        Args:
            trained: Records of the documents to train on.
        """
        found = self.store.documents[self.documents]
        exact = np.isin(found["hash"], trained["hash"])
        near = np.isin(found["near_hash"], trained["near_hash"]) & ~exact
        self.counts.checks["eval_in_train"] = int(exact.sum())
        self.counts.checks["eval_near_train"] = int(near.sum())

    def _unused(self, found: NDArray[Any]) -> dict[str, int]:
        """Count the rows that fill each unused column, the most frequent first."""
        _, first = np.unique(found["row"], return_index=True)
        kinds, numbers = np.unique(found["unused"][first], return_counts=True)
        total: Counter[str] = Counter()
        for kind, number in zip(kinds.tolist(), numbers.tolist(), strict=True):
            total.update(dict.fromkeys(self.store.unused[kind], number))
        return dict(total.most_common())

    def planned(self, seed: int) -> packing.Plan:
        """Plan which documents go into which block."""
        config, counts, store = self.config, self.counts, self.store
        lengths = store.documents["length"]
        # Held-out documents are not packed: each is scored in a row of its own.
        training = self.name == "train"
        strategy = config.packing if training or self.text else "none"
        share = config.sample if training else 1.0
        if strategy in ("wrapped", "boundary"):
            order = self._ordered(seed)
            if strategy == "wrapped":
                plan = packing.wrapped(order, lengths, config.max_length, self.isolated)
            else:
                plan = self._at_boundaries(order)
            counts.documents = len(order)
            return plan.keep(share)
        overlong = "split" if config.packing == "bfd_split" else config.overlong
        documents = self._trainable(overlong)
        if overlong == "split":
            plan = packing.split(documents, lengths, config.max_length)
            plan = self._with_labels(plan)
        else:
            plan = packing.whole(documents, lengths, config.max_length)
        counts.documents = len(np.unique(plan.document))
        if strategy != "none":
            plan = packing.best_fit(plan, config.max_length)
        return plan.keep(share)

    def _ordered(self, seed: int) -> NDArray[np.int64]:
        """Return the documents in the order in which ``dataset.order`` joins them."""
        lengths = self.store.documents["length"][self.documents]
        if self.config.order == "random":
            return np.random.default_rng(seed).permutation(self.documents)
        if self.config.order in ("shortest", "longest"):
            sign = 1 if self.config.order == "shortest" else -1
            return self.documents[np.argsort(sign * lengths, kind="stable")]
        return self.documents

    def _trainable(self, overlong: str) -> NDArray[np.int64]:
        """Return the documents to train on; count those left out, too long or not trained."""
        config, counts = self.config, self.counts
        found = self.store.documents[self.documents]
        long = found["length"] > config.max_length
        counts.overlong = int(long.sum())
        nothing = found["trained"] == 0
        out = nothing.copy()
        if overlong == "error" and counts.overlong:
            first = found[long][0]
            raise DataError(
                f"{counts.overlong:,} {self.name} documents are longer than dataset.max_length="
                f"{config.max_length}, the first with {first['length']} tokens at "
                f"{self.store.files[first['file']]}:{first['line']}\n"
                f"    fix: dataset.max_length={counts.lengths['max_length_for_all']}, or "
                "dataset.overlong=split, truncate (cuts off the end, EOS included) or drop"
            )
        if overlong == "drop":
            out |= long
        if overlong == "truncate":
            documents = self.documents[long]
            first, trained, cut_off = losses(self.store, documents, config.max_length)
            counts.cut_tokens = int(cut_off.sum())
            counts.most_cut = most_cut(self.store, documents, trained, cut_off)
            lost = np.zeros(len(found), bool)
            lost[long] = first >= config.max_length
            nothing |= lost
            out |= lost
            counts.truncated = int((long & ~out).sum())
            cut = long & ~out & (found["last"] >= config.max_length)
            counts.checks["answer_cut"] = int(cut.sum())
        counts.checks["nothing_trained"] = int(nothing.sum())
        counts.dropped += int(out.sum())
        for record, empty in zip(found[out], nothing[out], strict=True):
            reason = (
                "the document has no trained token"
                if empty
                else f"the document has {record['length']} tokens, more than dataset.max_length"
            )
            file = self.store.files[record["file"]]
            self.dropped.add(self.name, file, int(record["line"]), reason)
        kept: NDArray[np.int64] = self.documents[~out]
        return kept

    def _with_labels(self, plan: packing.Plan) -> packing.Plan:
        """Leave out slices of split documents in which no token is trained."""
        begins = self.store.begins[plan.document]
        kept = [
            index
            for index, (low, high) in enumerate(
                zip((begins + plan.start + 1).tolist(), (begins + plan.stop).tolist(), strict=True)
            )
            if (self.store.marks[low:high] & 1).any()
        ]
        return plan.take([np.array([index]) for index in kept])

    def _at_boundaries(self, order: NDArray[np.int64]) -> packing.Plan:
        tokenizer, store = self.template.tokenizer, self.store
        ids = tokenizer(self.config.boundary, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise DataError(
                f"dataset.boundary={self.config.boundary!r} is {len(ids)} tokens, not one\n"
                "    fix: a dataset.boundary of one token, or dataset.packing=wrapped"
            )
        lengths = store.documents["length"][order]
        ends = np.cumsum(lengths)
        # From positions in the joined documents to positions in the store.
        shifts = store.begins[order] - (ends - lengths)

        def whole_character(stop: int) -> int:
            document = int(np.searchsorted(ends, stop))
            begin, end = int(store.begins[order[document]]), stop + int(shifts[document])
            for back in range(min(4, end - begin)):  # a character has at most 4 bytes
                tail = store.ids[max(begin, end - back - 4) : end - back].tolist()
                if not tokenizer.decode(tail).endswith("\ufffd"):
                    return stop - back
            return stop

        found = [
            np.flatnonzero(store.ids[begin : begin + length] == ids[0]) + begin - shift
            for begin, length, shift in zip(store.begins[order], lengths, shifts, strict=True)
        ]
        return packing.at_boundaries(
            order,
            store.documents["length"],
            self.config.max_length,
            np.concatenate(found),
            whole_character,
            self.config.boundary_overlap == "context",
            self.isolated,
        )

    def require_something(self) -> None:
        """Refuse a split without trained tokens."""
        c = self.counts
        if c.trained_tokens == 0:
            raise DataError(
                f"the {self.name} data has no trained token: {c.rows:,} rows, of which {c.bad:,} "
                f"do not fit; {c.dropped:,} dropped in all, {c.truncated:,} truncated\n"
                "    fix: dataset.max_length=2048"
            )
