"""What became of the rows, what of it is worth a warning, and what must not be trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.config.settings import CHECKS, DatasetConfig
from sft.errors import DataError

BARS = 24  # of the length histogram


@dataclass
class Counts:
    """What became of the rows of one part; tokens are those of the samples that are kept.

    Attributes:
        rows: Rows read.
        bad: Rows that do not fit the format or the template.
        empty: Rows with nothing to train.
        overlong: Documents longer than ``max_length``, whatever was done with them.
        dropped: Rows and documents that are not trained on, for all reasons.
        truncated: Documents whose end was cut off.
        unrolled: Conversations that became one sample a turn.
        found: Documents that the rows became, before any was left out.
        documents: Documents that are kept: a row's sample, or a text.
        samples: What the trainer sees: documents, or blocks of them.
        roles: Role: tokens and trained tokens, as rendered, before anything was cut.
        lengths: Percentiles of the documents' tokens, before anything was cut.
        checks: Check: how many documents it found.
        sources: Source: rows, and how often each is seen in an epoch.
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
    longest: int = 0
    largest_id: int = 0
    max_length: int = 0
    efficiency: float | None = None
    roles: dict[str, dict[str, int]] = field(default_factory=dict)
    lengths: dict[str, Any] = field(default_factory=dict)
    checks: dict[str, int] = field(default_factory=dict)
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)

    def share(self, check: str) -> float:
        """Give the share of documents that a check found."""
        return self.checks.get(check, 0) / self.found if self.found else 0.0


def describe_lengths(lengths: NDArray[np.int64]) -> dict[str, Any]:
    """Give percentiles, a histogram, and the ``max_length`` that keeps 99 % and all whole."""
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
    """Round up to a multiple of 64, or of 8 for the short."""
    multiple = 64 if length > 64 else 8
    return -(-length // multiple) * multiple


def verdicts(counts: Counts, config: DatasetConfig) -> Iterator[tuple[str, float, str]]:
    """Yield (check, share, ok | warn | stop) for each check."""
    for check in CHECKS:
        share = counts.share(check)
        stop, warn = config.stop_above.get(check, 1.0), config.warn_above.get(check, 1.0)
        yield check, share, "stop" if share > stop else "warn" if share > warn else "ok"


def gate(parts: dict[str, Counts], config: DatasetConfig, dropped: str) -> list[str]:
    """Stop before training what must not be trained on.

    Returns:
        Warnings, one a line.

    Raises:
        DataError: With every check that stops the run, and the setting that lets it pass.
    """
    stops: list[str] = []
    warnings: list[str] = []
    for name, counts in parts.items():
        if counts.bad > config.max_bad_fraction * counts.rows:
            stops.append(
                f"{counts.bad:,} of {counts.rows:,} {name} rows do not fit (see {dropped})\n"
                f"    fix: mend them, or dataset.max_bad_fraction={_above(counts.bad, counts.rows)}"
            )
        for check, share, verdict in verdicts(counts, config):
            line = f"{name}: {counts.checks.get(check, 0):,} ({share:.1%}) {CHECKS[check]}"
            if verdict == "stop":
                stops.append(f"{line}\n    fix: mend the data, or dataset.stop_above.{check}=1")
            elif verdict == "warn":
                warnings.append(line)
    if stops:
        raise DataError("the data must not be trained on:\n" + "\n".join(stops))
    return warnings


def _above(part: int, whole: int) -> float:
    """Give a round share that is not less than part / whole."""
    return float(np.ceil(1000 * part / whole) / 1000)


def lines(parts: dict[str, Counts]) -> Iterator[str]:
    """Put the figures into a few lines for the terminal."""
    for name, c in parts.items():
        yield (
            f"{'data' if name == 'train' else name}: {c.rows:,} rows, {c.samples:,} samples "
            f"({c.dropped:,} dropped, {c.truncated:,} truncated), {c.tokens:,} tokens of which "
            f"{c.trained_tokens:,} ({c.trained_tokens / max(1, c.tokens):.0%}) are trained, "
            f"longest {c.longest}"
        )
        if c.efficiency is not None:
            yield (
                f"    packed: {c.documents:,} documents in {c.samples:,} blocks of "
                f"{c.max_length}, {c.efficiency:.1%} full"
            )
