"""The report of a merge: the file merge_report.json, and its lines in the log."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from sft.files import to_json, write_text
from sft.run import record

logger = logging.getLogger("sft")

REPORT = record.MERGE_REPORT


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write the report into the folder of the merged model."""
    write_text(folder / REPORT, to_json(report, indent=2) + "\n")


def log_report(output: Path, report: dict[str, Any]) -> None:
    """Log how far the merged model in the output folder is from base + adapter."""
    if report["passed"] is None:
        logger.info("merged into %s (%s); verify=false: not verified", output, report["dtype"])
        return
    effect = report["adapter_effect"]
    texts = report["greedy_texts"]
    logger.info("merged into %s (%s, %.1f s)", output, report["dtype"], report["seconds"])
    logger.info(
        "verified on %s: logits differ from base + adapter by at most %.2g (allowed %.2g; the "
        "adapter changes them by up to %.2g); the top token is the same at %.1f %% of positions, "
        "KL is %.2g; %d of %d greedy texts are equal",
        report["compared_on"],
        report["max_difference"],
        report["allowed_difference"],
        effect["max_difference"],
        100 * report["top1_agreement"],
        report["kl"],
        texts["equal"],
        texts["of"],
    )
    losses = report["eval_loss"]
    if losses["merged"] is not None:
        logger.info(
            "loss on the trained tokens of these samples: base + adapter %.6f, merged %.6f",
            losses["base_and_adapter"],
            losses["merged"],
        )
