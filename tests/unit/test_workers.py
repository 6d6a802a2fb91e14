"""How a run's loader workers end."""

import functools
from types import SimpleNamespace

from accelerate import Accelerator
from torch.utils.data import DataLoader

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
