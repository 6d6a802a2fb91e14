"""Tokens are drawn from the model's distribution, by each prompt's own generator."""

import pytest
import torch

from sft.config.settings import SampleConfig
from sft.inference.answers import rounds
from sft.inference.sampling import Draw

CPU = torch.device("cpu")
SCORES = torch.tensor([2.0, 1.0, 0.0, -1.0, -torch.inf])


def drawn(count: int, **settings: float) -> torch.Tensor:
    """Draw a token for each of many prompts; return how often each token came."""
    draw = Draw(SampleConfig(**{"temperature": 1.0, **settings}), [1] * count, range(count), CPU)
    found = draw(torch.zeros(count, 1, dtype=torch.long), SCORES.repeat(count, 1)).argmax(-1)
    return found.bincount(minlength=5) / count


def test_tokens_are_drawn_from_the_softmax_of_their_scores() -> None:
    for settings, kept in (
        ({}, [0, 1, 2, 3]),
        ({"temperature": 0.5}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.9}, [0, 1, 2]),  # 0.644 + 0.237 < 0.9
    ):
        wanted = torch.full((5,), -torch.inf)
        wanted[kept] = SCORES[kept] / settings.get("temperature", 1.0)
        # 4,000 draws: the standard deviation of a share is at most 0.008.
        assert (drawn(4000, **settings) - wanted.softmax(0)).abs().max() < 0.03, settings


def test_a_draw_depends_on_the_prompt_and_the_seed_alone() -> None:
    settings = SampleConfig(temperature=1.0, seed=3)
    scores, ids = torch.zeros(3, 50), torch.zeros(3, 4, dtype=torch.long)
    before = torch.get_rng_state()

    def tokens(numbers: list[int], seed: int = 3) -> list[list[int]]:
        settings.seed = seed
        draw = Draw(settings, [4] * len(numbers), numbers, CPU)
        rows = slice(len(numbers))
        return torch.stack([draw(ids[rows], scores[rows]).argmax(-1) for _ in range(5)]).T.tolist()

    one, two, three = tokens([0, 1, 2])
    assert one != two != three
    assert tokens([2, 0]) == [three, one]
    assert tokens([1]) == [two] != tokens([1], seed=4)
    assert torch.equal(before, torch.get_rng_state())


def test_padding_is_not_a_repetition() -> None:
    """The padding is often EOS: an answer in a batch would end later than alone."""
    draw = Draw(SampleConfig(repetition_penalty=2.0), [3, 1], [0, 1], CPU)
    scores = torch.tensor([[4.0, 4.0, -4.0], [4.0, 4.0, -4.0]])
    found = draw(torch.tensor([[1, 1, 2], [0, 0, 1]]), scores)
    assert found.tolist() == [[4.0, 2.0, -8.0], [4.0, 2.0, -4.0]]


@pytest.mark.parametrize(("count", "size"), [(1, 4), (4, 2), (5, 2), (9, 1)])
def test_every_rank_has_as_many_batches(
    count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for rank in range(3):
        monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
        monkeypatch.setattr("torch.distributed.get_rank", lambda rank=rank: rank)
        monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
        found.append(list(rounds(count, size)))
    assert len({tuple(start for start, _ in rank) for rank in found}) == 1
    assert sorted(n for rank in found for _, numbers in rank for n in numbers) == list(range(count))
    assert all(len(numbers) <= size for rank in found for _, numbers in rank)
