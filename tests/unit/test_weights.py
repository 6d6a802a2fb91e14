"""Weights of messages between 0 and 1: from the row to the batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk
from support import TINY
from transformers import AutoTokenizer
from unit.test_values import audit, refused  # noqa: F401

from sft.config.settings import Config, ModelConfig
from sft.data.__main__ import main as data
from sft.data.collator import Collator
from sft.errors import ConfigError
from sft.fast import head

CHAT = "template=plain-chat"


def talk(*answers: tuple[str, Any]) -> dict[str, Any]:
    """Make a row of short questions and these answers, with their weights."""
    messages: list[dict[str, Any]] = []
    for number, (text, weight) in enumerate(answers):
        messages.append({"role": "user", "content": f"q{number}"})
        answer = {"role": "assistant", "content": text}
        messages.append(answer if weight is None else {**answer, "weight": weight})
    return {"messages": messages}


ROWS = [
    talk(("plain", None), ("none", 0)),
    talk(("half", 0.5), ("whole", 1), ("little", "0.1")),
    talk(("last", None)),
]


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Give what ``sft data`` prepares of rows: the samples of a part, and the figures."""
    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(rows: list[Any], *overrides: str, part: str = "train") -> tuple[Any, dict[str, Any]]:
        Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ["model=tiny", "dataset=jsonl", "dataset.path=rows.jsonl"]
        given += [] if any(item.startswith("template=") for item in overrides) else [CHAT]
        data(["--json", *given, "dataset.eval_fraction=0", "dataset.num_proc=1", *overrides])
        result = json.loads(capsys.readouterr().out)
        samples = Dataset.from_file(str(Path(result["folder"]) / f"{part}.arrow"))
        return samples, result["parts"][part]

    return run


def answers_of(sample: dict[str, Any]) -> list[tuple[str, list[float]]]:
    """List each trained span of a sample: its text, and the weights of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    found: list[tuple[list[int], list[float]]] = []
    before = -100
    for label, weight in zip(sample["labels"], sample["weights"], strict=True):
        if label != -100:
            if before == -100:
                found.append(([], []))
            found[-1][0].append(label)
            found[-1][1].append(weight)
        before = label
    return [(tokenizer.decode(ids).strip(), weights) for ids, weights in found]


@pytest.mark.parametrize("packing", ["none", "bfd"])
def test_each_token_has_the_weight_of_its_message(prepared: Any, packing: str) -> None:
    samples, figures = prepared(ROWS, f"dataset.packing={packing}")
    assert len(samples) == (3 if packing == "none" else 1)
    spans = [span for sample in samples for span in answers_of(sample)]
    expected = {"plain": 1, "half": 0.5, "whole": 1, "little": 0.1, "last": 1}
    assert {text.removesuffix("<|end|>") for text, _ in spans} == set(expected)
    for text, weights in spans:
        weight = np.float32(expected[text.removesuffix("<|end|>")])
        assert set(weights) == {weight}, text
    below = sum(len(w) for text, w in spans if text.startswith(("half", "little")))
    assert figures["weighted"] == below == len("halflittle") + 2 * 2  # a space and the end


def test_the_column_is_there_only_for_fractions_and_not_for_evaluations(prepared: Any) -> None:
    samples, figures = prepared([ROWS[0], ROWS[2]])
    assert samples.column_names == ["input_ids", "labels", "rows"]
    assert figures["weighted"] == 0
    Path("held_out.jsonl").write_text(json.dumps(ROWS[1]) + "\n")
    samples, figures = prepared(ROWS, "dataset.eval_path=held_out.jsonl", part="eval")
    assert samples.column_names == ["input_ids", "labels", "rows"]
    assert figures["trained_tokens"] == len("halfwholelittle") + 2 * 3


def test_prepared_data_keeps_them(prepared: Any) -> None:
    samples, _ = prepared(ROWS, "output=made")
    kept = load_from_disk("made")["train"]
    assert kept.column_names == ["input_ids", "labels", "rows", "weights"]
    assert kept["weights"][:] == samples["weights"][:]


def test_batches_before_the_first_fraction_have_ones(
    prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft.data import workers

    monkeypatch.setattr(workers, "BATCH_ROWS", 1)
    samples, _ = prepared(ROWS)
    weights = [{w for _, each in answers_of(sample) for w in each} for sample in samples]
    assert weights == [{1.0}, {0.5, 1.0, float(np.float32(0.1))}, {1.0}]


def test_a_template_that_makes_a_sample_of_each_turn_keeps_their_weights(
    prepared: Any, tmp_path: Path
) -> None:
    (tmp_path / "drops.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content and loop.last %}"
        "({{ m.reasoning_content }}) {% endif %}{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = talk(("half", 0.5), ("none", 0), ("little", 0.1))
    for message in row["messages"][1::2]:
        message["reasoning_content"] = "why"
    samples, figures = prepared([row], "template=chat", "template.chat_template=drops.jinja")
    assert figures["unrolled"] == 1
    spans = [answers_of(sample) for sample in samples]
    assert [[(text, set(w)) for text, w in span] for span in spans] == [
        [("(why) half<|end|>", {0.5})],
        [("(why) little<|end|>", {float(np.float32(0.1))})],
    ]


def test_weights_are_refused_where_they_have_no_meaning(
    audit: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    everything = (CHAT, "template.train_on=all")
    message = refused(audit, capsys, [talk(("a", 0.5))], *everything)
    assert "an answer of the row has a weight below 1, and template.train_on=all" in message
    asked = talk(("a", None))
    asked["messages"][0]["weight"] = 0.5
    message = refused(audit, capsys, [asked], CHAT)
    assert "message 1 of role user is marked as trained" in message
    for flags, reason in (
        ({"weight": 0.5, "train": False}, "message 2 has flags that disagree: train, weight"),
        ({"weight": 0.5, "loss_weight": 1}, "has flags that disagree: loss_weight, weight"),
        ({"weight": -0.5}, "message 2 has weight=-0.5"),
        ({"weight": "high"}, "message 2 has weight=high"),
        ({"train": 0.5}, "message 2 has train=0.5"),
    ):
        row = talk(("a", None))
        row["messages"][1] |= flags
        assert reason in refused(audit, capsys, [row], CHAT)
    fine = talk(("a", None))
    fine["messages"][1] |= {"weight": 0.5, "train": True, "loss_weight": "0.5"}
    assert len(audit([fine], CHAT)[0]) == 1
    row = {"prompt": "p", "completion": "c", "weight": 0.5}
    message = refused(audit, capsys, [row], "template=completion")
    assert "the row has weight=0.5" in message and "a weight in each message" in message


def test_the_collator_gives_the_weights_of_trained_labels() -> None:
    samples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "weights": [0.0, 0.1, 1.0]},
        {"input_ids": [8, 9], "labels": [8, 9], "weights": [1.0, 0.25]},
        {"input_ids": [0, 0], "labels": [-100, -100]},  # a filler
    ]
    expected = torch.tensor([0.1, 1.0, 0.25])
    for joined in (False, True):
        batch = Collator(0, padding_free=joined, loss_positions=True)(samples)
        assert batch["loss_weights"].dtype == torch.int32
        assert torch.equal(batch["loss_weights"].view(torch.float32), expected)
        assert len(batch["loss_positions"]) == 3
    assert "loss_weights" not in Collator(0, loss_positions=True)(samples[2:])


def test_experts_that_are_balanced_have_no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(model=ModelConfig(lm_head="auto"))
    monkeypatch.setattr(head, "balances", lambda *_: True)
    with pytest.raises(ConfigError) as error:
        head.choose(config, None, weighted=True)  # type: ignore[arg-type]
    assert error.value.problems[0].fix.startswith("train.extra.router_aux_loss_coef=0")
    assert head.choose(config, None).value == "trl"  # type: ignore[arg-type]
