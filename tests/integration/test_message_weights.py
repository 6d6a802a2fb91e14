"""Runs with weights of messages, compared with plain PyTorch."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from support import records
from transformers import AutoModelForCausalLM
from warm import run_warm

from sft.errors import ConfigError
from sft.train import main as train

WEIGHTS = (0.5, None, 0.1, 0, 0.25)  # of the answers, in turn
RATE, STEPS = 1e-2, 3
ROLES = ("user", "assistant", "user")


@pytest.fixture
def talks(tmp_path: Path) -> Path:
    """Give 6 conversations of two answers each."""
    lines = []
    for row in range(6):
        messages: list[dict[str, Any]] = []
        for turn in range(2):
            weight = WEIGHTS[(2 * row + turn) % len(WEIGHTS)]
            messages.append({"role": "user", "content": f"{row} {turn}?"})
            answer: dict[str, Any] = {"role": "assistant", "content": "ab" * (1 + row) + str(turn)}
            messages.append(answer if weight is None else {**answer, "weight": weight})
        lines.append({"messages": messages})
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(llama: Path, talks: Path) -> list[str]:
    """Train every weight on all samples in each step."""
    return [
        *("model=hf", f"model.name_or_path={llama}", "template=chat", "lora=none"),
        *(f"dataset={talks}", f"dataset.eval_path={talks}", "dataset.eval_fraction=0"),
        "train.global_batch_size=6",
        *(f"train.learning_rate={RATE}", "train.logging_steps=1", f"train.max_steps={STEPS}"),
        *("train.lr_scheduler_type=constant", "train.max_grad_norm=1e9", "train.optim=adamw_torch"),
        *("train.save_strategy=steps", "train.save_steps=1", "train.warmup_steps=0"),
        *("precision=fp32", "train.save_total_limit=null"),
    ]


def plainly(llama: Path, talks: Path, samples: Any) -> tuple[list[tuple[float, float]], float, Any]:
    """Train with plain PyTorch: the loss and gradient norm of each step, the first evaluation.

    The weights are taken from the rows: the trained spans of a sample are the answers of its row
    whose weight is not 0, in order.
    """
    rows = [json.loads(line) for line in talks.open()]
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    batches = []
    for sample in samples:
        turns = rows[sample["rows"][0] - 1]["messages"][1::2]
        of_answers = iter([turn.get("weight", 1.0) for turn in turns if turn.get("weight") != 0])
        labels, weights, weight = sample["labels"], [], 0.0
        for place, label in enumerate(labels):
            if label != -100 and labels[place - 1] == -100:
                weight = next(of_answers)
            weights.append(weight if label != -100 else 0.0)
        assert next(of_answers, None) is None
        batches.append((torch.tensor([sample["input_ids"]]), torch.tensor(weights[1:])))

    def losses() -> tuple[torch.Tensor, torch.Tensor]:
        each, weights = [], []
        for ids, weight in batches:
            scores = model(input_ids=ids).logits[0, :-1]
            each.append(torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="none"))
            weights.append(weight)
        return torch.cat(each), torch.cat(weights)

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    figures = []
    with torch.no_grad():
        each, weights = losses()
        evaluated = float(each[weights > 0].mean())
    for _ in range(STEPS):
        optimizer.zero_grad()
        each, weights = losses()
        loss = (each * weights).sum() / weights.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
        figures.append((loss.item(), norm.item()))
    return figures, evaluated, model.state_dict()


def test_the_loss_is_the_weighted_mean_over_all_ranks_and_micro_batches(
    tmp_path: Path, llama: Path, talks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sft import prove

    monkeypatch.setenv("SFT_CACHE_DIR", str(tmp_path / "cache"))
    command = settings(llama, talks)
    micro = "train.per_device_train_batch_size"
    runs = {
        "chunked": (1, [f"{micro}=3", "model.lm_head=chunked"]),
        "packed": (1, [f"{micro}=1", "model.lm_head=trl", "dataset.packing=bfd"]),
        "ranks": (2, [f"{micro}=1", "model.lm_head=plain", "zero=stage2"]),
    }
    for name, (ranks, own) in runs.items():
        run_warm(
            "train", *command, *own, f"output_dir={tmp_path / name}", ranks=ranks, cwd=tmp_path
        )
    arrows = [Dataset.from_file(str(path)) for path in (tmp_path / "cache").rglob("train.arrow")]
    (samples,) = (arrow for arrow in arrows if "seq_lengths" not in arrow.column_names)
    figures, evaluated, weights = plainly(llama, talks, samples)
    for name in runs:
        logged = [record for record in records(tmp_path / name) if "loss" in record]
        found = [(record["loss"], record["grad_norm"]) for record in logged]
        assert found == [pytest.approx(pair, rel=2e-4) for pair in figures], name
        first = next(r for r in records(tmp_path / name) if "eval_loss" in r)
        assert first["eval_loss"] == pytest.approx(evaluated, rel=1e-5), name
        trained = load_file(tmp_path / name / "model" / "model.safetensors")
        for key, tensor in trained.items():
            # Adam's first steps follow the sign of a gradient, which rounding may turn near 0.
            apart = (tensor - weights[key]).abs() > 0.1 * RATE
            assert apart.float().mean() < 0.005, (name, key)
    # A resumed run is the same, bit for bit.
    straight = prove.outcome(tmp_path / "chunked")
    prove.cut_back(tmp_path / "chunked", 1)
    run_warm(
        "train", *command, *runs["chunked"][1], f"output_dir={tmp_path / 'chunked'}", cwd=tmp_path
    )
    assert prove.differences(straight, prove.outcome(tmp_path / "chunked")) == []


def test_generation_reads_the_columns_and_roles_of_training(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run, of its merged model, and of a run on prepared data."""
    from sft.data import __main__ as data
    from sft.generate import main as generate
    from sft.merge import __main__ as merge

    monkeypatch.chdir(tmp_path)
    own = [
        {"speaker": name, "words": words}
        for name, words in (("customer", "How long?"), ("agent", "ab"), ("customer", "And now?"))
    ]
    known = [
        {"role": role, "content": item["words"]} for role, item in zip(ROLES, own, strict=True)
    ]
    answer = {"speaker": "agent", "words": "cd"}
    Path("rows.jsonl").write_text(json.dumps({"dialog": [*own, answer]}) + "\n")
    Path("own.jsonl").write_text(json.dumps({"dialog": own}) + "\n")
    Path("known.jsonl").write_text(json.dumps({"messages": known}) + "\n")
    model = ["model=hf", f"model.name_or_path={llama}"]
    rows = [
        *("template=chat", "dataset=rows.jsonl", "dataset.eval_fraction=0"),
        "dataset.roles={user: [customer], assistant: [agent]}",
        "dataset.columns={messages: dialog, role: speaker, content: words}",
    ]
    steps = ["train.max_steps=1", "train.save_strategy=no", "train.global_batch_size=4"]
    run_warm("train", *model, *rows, *steps, "output_dir=run", cwd=tmp_path)
    merge.merge(merge.main.compose(["run=run"]))
    data.data(data.main.compose([*model, *rows, "output=prepared"]))
    prepared = ["dataset=pretokenized", "dataset.path=prepared", "output_dir=again"]
    run_warm("train", *model, *steps, *prepared, cwd=tmp_path)
    for which in ("run=run", "model=run/merged", "run=again"):
        said = []
        for file in ("own.jsonl", "known.jsonl"):
            config = generate.compose([which, f"file={file}", "max_new_tokens=9"])
            (found,) = generate.run(config)["answers"]
            said.append(found.pop("generated"))
            assert found == json.loads(Path(file).read_text())
        assert said[0] == said[1]
    # What they say is not read again.
    wrong = "dataset.roles={user: [client]}"
    with pytest.raises(ConfigError, match="has no effect on prepared data"):
        train.compose([*model, *steps, *prepared, wrong])
