"""How a run's loader workers and the workers that tokenise end."""

import functools
import itertools
import multiprocessing
import os
from types import SimpleNamespace

import psutil
from accelerate import Accelerator
from torch.utils.data import DataLoader

from sft.data.workers import in_parallel
from sft.training.signals import end_with_rank
from sft.training.trainer import Trainer


def test_persistent_loader_workers_end_by_themselves() -> None:
    """With exit code 0: PyTorch sends SIGTERM to a worker that has not ended after 5 seconds."""
    loader = DataLoader(
        list(range(64)),  # type: ignore[arg-type]
        num_workers=2,
        persistent_workers=True,
        worker_init_fn=functools.partial(end_with_rank, int),
    )
    wrapped = Accelerator(cpu=True).prepare_data_loader(loader)
    for _ in wrapped:  # train.max_steps may end a run in the middle of an epoch
        break
    trainer = SimpleNamespace(_loader=wrapped.base_dataloader)
    workers = trainer._loader._iterator._workers
    assert [worker.is_alive() for worker in workers] == [True, True]
    Trainer.end_workers(trainer)  # type: ignore[arg-type]
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_workers_that_tokenise_die_with_their_run() -> None:
    """Each would wait for its next batch for ever: the others hold the pipe's other end, too."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    class Maker:
        encoder = SimpleNamespace(accelerate=lambda: None)

        def __call__(self, batch: object) -> int:
            return os.getpid()

    def run() -> None:
        batches = itertools.repeat([])
        for _, pid in in_parallel(Maker(), batches, num_proc=2, ahead=False):  # type: ignore
            theirs.send(pid)

    process = context.Process(target=run)
    process.start()
    pids: set[int] = set()
    while len(pids) < 3 and ours.poll(60):  # the run's own, for the first batches, and two workers
        pids.add(ours.recv())
    workers = [psutil.Process(pid) for pid in pids - {process.pid}]
    process.kill()
    process.join(10)
    _, alive = psutil.wait_procs(workers, timeout=10)
    for left in alive:
        left.kill()
    assert len(workers) == 2 and alive == []
