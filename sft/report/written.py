"""Write a run's page while the run goes on and at its end; no fault of the page ends the run."""

from __future__ import annotations

import logging
from pathlib import Path

from sft.files import write_text
from sft.report import folder, page
from sft.run import record

logger = logging.getLogger("sft")


def write(path: Path) -> None:
    """Write the page into the run's folder; on rank 0."""
    try:
        write_text(path / record.REPORT, page.page([folder.read(path)]))
    except Exception as error:  # the run is worth more than its page
        reason = f"{type(error).__name__}: {error}"
        logger.info("%s could not be written: %s", path / record.REPORT, reason)
