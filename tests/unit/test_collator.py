"""Batches: padded, packed and padding-free."""

import pytest
import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sft.data.collator import Collator

PAIR = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [8, 9], "labels": [-100, 9]},
]
PACKED = [{**PAIR[0], "seq_lengths": [2, 1]}, {**PAIR[1], "seq_lengths": [2]}]


def lists(batch: dict[str, torch.Tensor | int]) -> dict[str, object]:
    return {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def test_the_docstring_is_true() -> None:
    assert lists(Collator(0)(PAIR)) == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
        "labels": [[-100, 6, 7], [-100, 9, -100]],
    }
    assert lists(Collator(0)(PACKED)) == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "position_ids": [[0, 1, 0], [0, 1, 0]],
        "labels": [[-100, 6, -100], [-100, 9, -100]],
    }
    assert lists(Collator(0, padding_free=True)(PACKED)) == {
        "input_ids": [[5, 6, 7, 8, 9]],
        "position_ids": [[0, 1, 0, 0, 1]],
        "labels": [[-100, 6, -100, -100, 9]],
    }
    batch = Collator(0, documents=True)(PACKED)
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 2, 3, 5, 6]
    assert (batch["max_length_q"], batch["max_length_k"]) == (2, 2)
    assert "attention_mask" not in batch
    assert Collator(0, loss_positions=True)(PACKED)["loss_positions"].tolist() == [1, 4]


def test_padded_to_a_multiple() -> None:
    batch = Collator(0, pad_to_multiple_of=8)(PAIR)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
    assert batch["attention_mask"].sum(1).tolist() == [3, 2]
    joined = Collator(0, padding_free=True, pad_to_multiple_of=8, documents=True)(PACKED)
    assert joined["position_ids"].tolist() == [[0, 1, 0, 0, 1, 0, 1, 2]]
    assert joined["cu_seq_lens_q"].tolist() == [0, 2, 3, 5, 8]


def test_a_first_label_is_never_trained() -> None:
    batch = Collator(0)([{"input_ids": [1, 2], "labels": [1, 2]}])
    assert batch["labels"].tolist() == [[-100, 2]]


@pytest.mark.parametrize("padding_free", [False, True])
def test_agrees_with_trls(padding_free: bool) -> None:
    samples = PACKED if padding_free else PAIR
    theirs = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=padding_free)(samples)
    ours = Collator(0, padding_free)(samples)
    for key in ("input_ids", "labels", "position_ids", "attention_mask"):
        assert (key in ours) == (key in theirs)
        if key in ours:
            assert torch.equal(ours[key], theirs[key]), key
