"""Watch the training of a run: everything that is logged, shown or recorded while it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from transformers.trainer_callback import PrinterCallback, ProgressCallback

from sft import process
from sft.run import record
from sft.watch import trackers
from sft.watch.callbacks import BeforeTraining, EverySteps, MetricsFile, RanksAgree
from sft.watch.lines import Lines
from sft.watch.samples import Samples

if TYPE_CHECKING:
    from sft.inference.prompts import Prompts
    from sft.run.run import Run
    from sft.training.timed import TimedTrainer


@contextlib.contextmanager
def watched(
    run: Run, trainer: TimedTrainer, prompts: Prompts | None, write_page: Callable[[], object]
) -> Iterator[None]:
    """Watch the training within a block; however the block ends, nothing of it goes on.

    Args:
        run: The run, whose folder has been claimed.
        trainer: Gets our callbacks instead of the Trainer's printing ones.
        prompts: What is answered while the model trains; None: nothing.
        write_page: Writes the page of the run, for ``report.every``.
    """
    profile, every = run.config.profile, run.config.report.every
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # The figures come first: they add to the records that the others write.
    callbacks = [trainer.figures, Lines(), MetricsFile(run.dir / record.METRICS), RanksAgree()]
    with contextlib.ExitStack() as ending:
        if profile.torch:
            from sft.watch.profile import TorchProfile

            folder = run.dir / record.PROFILE
            # The first, so that the work of the others after a step is not recorded.
            callbacks.insert(0, ending.enter_context(TorchProfile(trainer, profile, folder)))
        if profile.system and process.local_rank() == 0:
            from sft.watch.system import System, file_of

            file = file_of(run.dir / record.SYSTEM, process.node())
            ending.enter_context(System(file, profile.interval))
        if prompts is not None:
            callbacks.append(Samples(trainer, prompts, run.dir / record.SAMPLES))
        if every is not None:
            callbacks.append(EverySteps(every, write_page))
        # After the callback of metrics.jsonl, which removes the records that will be logged again.
        send = BeforeTraining(lambda: trackers.start(run.dir, run.config.tracker))
        callbacks.append(send)
        for callback in callbacks:
            trainer.add_callback(callback)
        yield
