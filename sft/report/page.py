"""The page of a run or of several, as one HTML file without network access."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from sft.report.folder import Folder

MARK = '<meta name="generator" content="sft">'


def page(runs: Sequence[Folder]) -> str:
    """Return the page of a run, or the comparison of several."""
    names = "".join(f"<h1>{escape(run.name)}</h1><p>{escape(run.status)}</p>" for run in runs)
    return f"<!doctype html><html lang=en><meta charset=utf-8>{MARK}<title>sft</title>{names}"
