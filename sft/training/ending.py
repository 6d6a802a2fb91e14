"""How a run ends: its record, its last lines and its page, whatever ended it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from sft import environment, process
from sft.checkpoint import folders
from sft.errors import RunError, SftError, Stopped
from sft.report import written
from sft.run import closing

if TYPE_CHECKING:
    from sft.run.run import Run


@contextlib.contextmanager
def ending(run: Run) -> Iterator[None]:
    """Record why a run ended early; end its process group and release its folder in any case.

    Raises:
        RunError: Another rank died.
    """
    try:
        yield
    except BaseException as error:
        if process.rank() == 0:
            status = "stopped" if isinstance(error, Stopped) else "failed"
            ours = isinstance(error, SftError)
            run.end(status, str(error) if ours else f"{type(error).__name__}: {error}")
            if isinstance(error, Stopped | KeyboardInterrupt):
                closing.log(closing.stopped(run.dir))
        if isinstance(error, KeyboardInterrupt) and folders.checkpoints(run.dir):
            raise KeyboardInterrupt("give the same command again to resume the run") from None
        if environment.lost_a_rank(error):
            raise RunError(
                "contact with another rank was lost: the rank or its machine died\n"
                "    fix: read the errors of the other ranks, then give the same command again to "
                "resume the run"
            ) from error
        raise
    finally:
        environment.end_process_group()
        if run.claimed:
            written.write(run.dir)
        run.release()
