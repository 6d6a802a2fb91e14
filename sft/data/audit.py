"""Count what became of the rows, and warn or stop if a check is above its limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.config.data_settings import CHECKS
from sft.config.settings import DatasetConfig
from sft.data.folders import Location
from sft.errors import DataError

BARS = 24  # in the length histogram


@dataclass
class Counts:
    """The counts of one part: train, eval or eval_NAME. Tokens are counted in the written samples.

    Attributes:
        rows: Rows read.
        bad: Rows that do not fit the format or the template.
        empty: Rows with nothing to train.
        overlong: Documents longer than ``max_length``, for any ``dataset.overlong``.
        dropped: Rows and documents that were left out, for any reason.
        truncated: Documents whose end was cut off.
        unrolled: Conversations that became one sample per turn.
        found: Documents before any was left out.
        documents: Documents that were not left out.
        distinct_trained: Trained tokens, each once: without copies of a document, what
            ``dataset.mix`` repeats, and what two blocks share.
        weighted: Trained tokens whose weight in the loss is below 1, in the written samples.
        cut_tokens: Trained tokens that ``dataset.overlong=truncate`` cuts off.
        most_cut: For each of the rows that lose most of these, by FILE:LINE, how many it loses and
            has.
        samples: Samples written for the trainer: documents, or blocks of them.
        repeated: Tokens that a block shares with the block before, as its context.
        roles: For each role, tokens and trained tokens in the written samples.
        lengths: Percentiles of the documents' tokens, before anything was cut.
        checks: For each check, how many documents it found.
        unused_columns: How many rows fill each column, or key of messages (COLUMN.KEY), that no
            sample holds.
        sources: For each source, its rows and how often an epoch repeats them.
        files: Files read.
        unused_files: Files beside them that were not read.
    """

    rows: int = 0
    bad: int = 0
    empty: int = 0
    overlong: int = 0
    dropped: int = 0
    truncated: int = 0
    unrolled: int = 0
    found: int = 0
    documents: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    weighted: int = 0
    distinct_trained: int = 0
    cut_tokens: int = 0
    longest: int = 0
    repeated: int = 0
    largest_id: int = 0
    max_length: int = 0
    efficiency: float | None = None
    roles: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, int] = field(default_factory=dict)
    most_cut: dict[str, dict[str, int]] = field(default_factory=dict)
    unused_columns: dict[str, int] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: int = 0
    unused_files: list[str] = field(default_factory=list)

    def count_files(self, where: Location) -> None:
        """Add the files of a source."""
        self.files += len(where.files)
        self.unused_files += where.unused

    def share(self, check: str) -> float:
        """Return the share of documents that a check found."""
        return self.checks.get(check, 0) / self.found if self.found else 0.0


def describe_lengths(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Return percentiles, a histogram, and the ``max_length`` that cuts at most 1 % or none."""
    if not len(lengths):
        return {}
    named = {f"p{p}": int(np.percentile(lengths, p, method="higher")) for p in (50, 90, 95, 99)}
    longest = int(lengths.max())
    width = max(1, -(-longest // BARS))
    counts = np.bincount((lengths - 1) // width)
    bars = [[i * width, (i + 1) * width, int(count)] for i, count in enumerate(counts)]
    return {
        "mean": round(float(lengths.mean()), 1),
        **named,
        "max": longest,
        "suggested_max_length": _rounded(named["p99"]),
        "max_length_for_all": _rounded(longest),
        "histogram": bars,
    }


def _rounded(length: int) -> int:
    """Round up to a multiple of 64, or of 8 for lengths up to 64."""
    multiple = 64 if length > 64 else 8
    return -(-length // multiple) * multiple


def verdicts(counts: Counts, config: DatasetConfig) -> Iterator[tuple[str, float, str]]:
    """Yield (check, share, ok | warn | stop) for each check."""
    for check in CHECKS:
        share = counts.share(check)
        stop, warn = config.stop_above.get(check, 1.0), config.warn_above.get(check, 1.0)
        yield check, share, "stop" if share > stop else "warn" if share > warn else "ok"


def gate(parts: dict[str, Counts], config: DatasetConfig, dropped: str) -> list[str]:
    """Check the counts against the limits of the dataset section.

    Returns:
        Warnings, one line each.

    Raises:
        DataError: A limit is exceeded. The message lists each with the setting that raises it.
    """
    stops: list[str] = []
    warnings: list[str] = []
    for name, counts in parts.items():
        if counts.bad > config.max_bad_fraction * counts.rows:
            stops.append(
                f"{counts.bad:,} of {counts.rows:,} {name} rows do not fit the template or "
                f"dataset.format (see {dropped})\n    fix: correct them, or "
                f"dataset.max_bad_fraction={_above(counts.bad, counts.rows)}"
            )
        for check, share, verdict in verdicts(counts, config):
            line = (
                f"{name}: {counts.checks.get(check, 0):,} documents ({share:.1%}) {CHECKS[check]}"
            )
            if verdict == "stop":
                stops.append(f"{line}\n    fix: correct the data, or dataset.stop_above.{check}=1")
            elif verdict == "warn":
                warnings.append(line)
    if absent := [name for name, count in roles_met(parts.values()).items() if not count]:
        warnings.append(f"dataset.roles: no message has the role {' or '.join(absent)}")
    if stops:
        raise DataError("the data exceeds limits that stop the run:\n" + "\n".join(stops))
    return warnings


def roles_met(counts: Iterable[Counts]) -> dict[str, int]:
    """Count the messages that have each name of ``dataset.roles``, in all sources."""
    met: dict[str, int] = {}
    for source in (source for each in counts for source in each.sources.values()):
        for name, count in source.get("roles", {}).items():
            met[name] = met.get(name, 0) + count
    return met


def _above(part: int, whole: int) -> float:
    """Return part / whole, rounded up to a multiple of 0.001."""
    return float(np.ceil(1000 * part / whole) / 1000)


def lines(parts: dict[str, Counts]) -> Iterator[str]:
    """Yield the figures as lines of text."""
    for name, c in parts.items():
        yield (
            f"{'data' if name == 'train' else name}: {c.rows:,} rows, {c.samples:,} samples "
            f"({c.dropped:,} dropped, {c.truncated:,} truncated), {c.tokens:,} tokens of which "
            f"{c.trained_tokens:,} ({c.trained_tokens / max(1, c.tokens):.0%}) are trained, "
            f"longest {c.longest}"
        )
        if c.unused_columns:
            found = ", ".join(f"{key} ({count:,} rows)" for key, count in c.unused_columns.items())
            yield f"    columns that are not used: {found}"
        if c.efficiency is not None:
            yield (
                f"    packed: {c.documents:,} documents in {c.samples:,} blocks of "
                f"{c.max_length}, {c.efficiency:.1%} full"
            )
