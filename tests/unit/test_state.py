"""What a checkpoint holds, and what is said of weights that were not saved as they are."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from sft.checkpoint import random_state as streams
from sft.checkpoint import state, tensors, weights
from sft.checkpoint.optimizer import Optimizer
from sft.checkpoint.restore import restore
from sft.data.sampler import Fillers, Shuffle, samples_of
from sft.errors import CheckpointError
from sft.training import metrics as counts


def draws() -> list[Any]:
    return [random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()]


@pytest.mark.parametrize("odd", [False, True])
def test_random_streams_go_on(tmp_path: Path, odd: bool) -> None:
    """A Gaussian that is kept for the next call belongs to the state too."""
    if odd:
        draws()
    drawn = streams.random_streams()
    state.write_progress(tmp_path, {}, {f"rank0/{key}": value for key, value in drawn.items()})
    expected = [draws() for _ in range(3)]
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    streams.restore_random_streams(tmp_path, seed=7)
    assert [draws() for _ in range(3)] == expected


def test_other_ranks_get_streams_of_their_own(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    both = {
        f"rank{rank}/{key}": value
        for rank in (0, 1)
        for key, value in streams.random_streams().items()
    }
    state.write_progress(folder, {}, both)
    found = []
    for seed in (7, 7, 8):
        streams.restore_random_streams(folder, seed)
        found.append(draws())
    assert found[0] == found[1] != found[2]


def test_tensors_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "SHARD_BYTES", 100)
    made = {f"exp_avg/{i}": torch.full((10,), float(i)) for i in range(5)}
    made["step/0"] = torch.tensor(3)
    writer = tensors.Writer(tmp_path)
    for key, tensor in made.items():
        writer.add(key, tensor)
    writer.flush()
    assert len(list(tmp_path.glob("optimizer-*.safetensors"))) == 2
    reader = tensors.Reader(tmp_path)
    assert reader.where.keys() == made.keys()
    assert all(reader[key].equal(tensor) for key, tensor in made.items())


def small_training() -> tuple[torch.nn.Module, state.Live, Callable[[], None]]:
    """Make a model, what a checkpoint keeps of its training, and a step of that training."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    inner = torch.optim.AdamW([model.weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: 1 / (step + 1))
    wrapped = Accelerator(cpu=True).prepare_optimizer(inner)
    live = state.Live(Optimizer(wrapped, model), schedule, None, "adamw_torch_fused")

    def step() -> None:
        inner.zero_grad()
        (model(torch.ones(3)) ** 2).sum().backward()
        inner.step()
        schedule.step()

    return model, live, step


def test_a_checkpoint_is_taken_up_without_a_trainer(tmp_path: Path) -> None:
    model, live, step = small_training()
    for _ in range(3):
        step()
    writer = tensors.Writer(tmp_path)
    for key, tensor in state.unsharded(live.optimizer):
        writer.add(key, tensor)
    writer.flush()
    assert tensors.Reader(tmp_path).where.keys() == {
        f"{kind}/weight" for kind in (state.VALUE, "exp_avg", "exp_avg_sq", "step")
    }
    record, drawn = state.progress(live, {"tokens": 12})
    assert record["kind"] == "elementwise" and record["schedule"]["last_epoch"] == 3
    state.write_progress(tmp_path, record, drawn)
    assert live.optimizer.held_bytes() == 2 * 6 * 4 + 4  # two moments and a count, in float32

    other, taken_up, other_step = small_training()
    assert restore(taken_up, tmp_path) == [{"tokens": 12}]
    assert other.weight.equal(model.weight)
    step()
    other_step()
    assert other.weight.equal(model.weight)
    assert taken_up.schedule.get_last_lr() == live.schedule.get_last_lr() == [0.1 * (1 / 5)]
    taken_up.optimizer.parameters["other"] = taken_up.optimizer.parameters.pop("weight")
    with pytest.raises(CheckpointError, match="this run train different parameters: other"):
        restore(taken_up, tmp_path)


def test_counts_are_shared_among_another_number_of_ranks() -> None:
    saved: list[dict[str, Any]] = [
        {"loss": 2.0, "logged_at": 8, "sums": [1.0, 2.0, 3.0], "tokens": 10},
        {"loss": 4.0, "logged_at": 8, "sums": None, "tokens": 20},
    ]
    assert counts.share_of(saved, rank=1, ranks=2) == saved[1]
    shared = {"loss": 3.0, "logged_at": 8, "sums": [0.25, 0.5, 0.75], "tokens": 7.5}
    assert counts.share_of(saved, rank=3, ranks=4) == shared
    here, there = counts.RunningMetrics(), counts.RunningMetrics()
    here.see({"input_ids": torch.ones(2, 4)})
    here.see({"input_ids": torch.ones(1, 4), "attention_mask": torch.tensor([[1, 1, 1, 0]])})
    here.sums = torch.tensor([4.0, 1.0, 2.0], dtype=torch.float64)
    kept = json.loads(json.dumps(here.state()))
    assert kept == {"sums": [4.0, 1.0, 2.0], "tokens": 11}
    there.restore(kept, torch.device("cpu"))
    assert there.flush(100) == {"entropy": 2.0, "mean_token_accuracy": 0.5, "num_tokens": 111}
    assert there.state() == {"sums": None, "tokens": 0}


GOOD = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(3, 2)}
NAN = torch.tensor([[1.0, float("nan")]] * 3)


@pytest.mark.parametrize(
    ("saved", "live", "updated", "wrong"),
    [
        (GOOD, GOOD, True, None),
        ({**GOOD, "a.lora_B.weight": torch.zeros(3, 2)}, None, False, None),
        ({**GOOD, "a.lora_B.weight": torch.zeros(3, 2)}, None, True, "1 all zero after training"),
        ({**GOOD, "b.lora_B.weight": torch.zeros(3, 2)}, None, False, "1 all zero after training"),
        ({**GOOD, "a.lora_B.weight": NAN}, None, True, "1 not finite: a.lora_B.weight"),
        ({**GOOD, "a.lora_B.weight": torch.ones(0)}, None, True, "1 empty: a.lora_B.weight"),
        ({"a.lora_A.weight": torch.ones(2, 3)}, GOOD, True, "1 missing: a.lora_B.weight"),
        ({**GOOD, "c": torch.ones(1)}, GOOD, True, "1 unknown to the model: c"),
        ({**GOOD, "a.lora_A.weight": torch.full((2, 3), 1.1)}, GOOD, True, "1 not the model's"),
        ({**GOOD, "a.lora_A.weight": torch.ones(3, 2)}, GOOD, True, "1 not the model's"),
        ({**GOOD, "a.lora_A.weight": torch.ones(2, 3).half()}, GOOD, True, "1 not the model's"),
    ],
)
def test_saved_weights_are_held_against_the_live_ones(
    tmp_path: Path, saved: Any, live: Any, updated: bool, wrong: str | None
) -> None:
    save_file(saved, tmp_path / "adapter_model.safetensors")
    if wrong is None:
        weights.check(tmp_path, live or saved, adapter=True, updated=updated)
        return
    with pytest.raises(CheckpointError, match=rf"(?s){wrong}.*\n    fix: [a-z]"):
        weights.check(tmp_path, live or saved, adapter=True, updated=updated)


def test_an_empty_file_is_no_adapter(tmp_path: Path) -> None:
    """The 40 bytes that users of ZeRO-3 found after days (TRL #4416)."""
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="every tensor"):
        weights.check(tmp_path, {}, adapter=True, updated=True)


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(1, 2, 3), (2, 3, 1), (3, 2, 1)])
def test_the_samples_of_a_step_are_those_that_the_loader_gave(
    ranks: int, micro: int, accumulation: int
) -> None:
    """Against Accelerate's own way of dealing batches out to the ranks."""
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    count, seed, epochs = 20, 5, 2
    samples = [{"input_ids": [i], "labels": [i]} for i in range(count)]
    fillers = Fillers(samples, micro * ranks, 0)
    for rank in range(ranks):
        given: list[list[int]] = []
        for epoch in range(epochs):
            shuffle = Shuffle(fillers, seed)
            shuffle.set_epoch(epoch)
            batches = BatchSampler(shuffle, micro, drop_last=False)
            mine = list(BatchSamplerShard(batches, ranks, rank))
            given += [
                sum(mine[start : start + accumulation], [])  # noqa: RUF017
                for start in range(0, len(mine), accumulation)
            ]
        for step, expected in enumerate(given, 1):
            found = samples_of(
                step,
                range(accumulation),
                count=count,
                seed=seed,
                micro=micro,
                accumulation=accumulation,
                rank=rank,
                ranks=ranks,
            )
            assert found == [index for index in expected if index < count]
