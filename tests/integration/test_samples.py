"""Samples and forgetting: neither changes what is trained, and a resumed run has each once."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, TINY, build_adapter, records
from transformers import AutoModelForCausalLM, AutoTokenizer
from warm import run_warm

from sft.config.settings import Config, SampleConfig
from sft.data.template import Template
from sft.errors import DataError
from sft.files import read_records
from sft.inference.prompts import Prompts, spoken
from sft.run.outcome import cut_back, differences, outcome
from sft.train import main, train
from sft.watch import samples
from sft.watch.samples import describe, shortened

INJECT = str(ROOT / "benchmarks" / "inject.py")
GENERAL = "train.max_forgetting=0.05"


def go(run: Path, *overrides: str) -> Path:
    """Train in this process; of a setting that is given twice, the last value holds."""
    last = {word.partition("=")[0]: word for word in (*overrides, f"output_dir={run}")}
    train(main.compose(list(last.values())))
    return run


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def taken(run: Path) -> list[dict[str, Any]]:
    return read_records(run / "samples.jsonl")


def forgetting(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["forgetting"]
    return found


def test_samples_change_nothing_and_a_resumed_run_has_each_once(
    tmp_path: Path, saving: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("Repeat abc.\n\nRepeat abcabc.\nRepeat\n")
    dropout = [*saving, "lora.lora_dropout=0.2", "train.gradient_checkpointing=true"]
    watched = ["sample.every=2", f"sample.prompts={file}", "sample.temperature=1"]
    watched += ["sample.max_new_tokens=8", "train.save_total_limit=null", GENERAL]
    plain = go(tmp_path / "plain", *dropout)
    caplog.set_level(logging.INFO, "sft")
    run = go(tmp_path / "run", *dropout, *watched)
    assert "step 2/6  sample 2: " in caplog.text
    assert "general text: " in caplog.text and "nats per byte before training" in caplog.text
    assert weights(run) == weights(plain)
    assert differences(outcome(plain), outcome(run)) == []
    straight, measured = taken(run), forgetting(run)
    assert [(s["step"], s["index"]) for s in straight] == [
        (step, index) for step in (0, 2, 4, 6) for index in range(3)
    ]
    assert "Repeat abcabc." in straight[1]["prompt"] and straight[1]["reference"] is None

    # What a kill after step 2 may leave: later samples, and half of a line.
    cut_back(run, 2)
    damaged = {**json.loads((run / "run.json").read_text()), "forgetting": {"before": 2.0}}
    (run / "run.json").write_text(json.dumps(damaged))
    with (run / "samples.jsonl").open("a") as opened:
        opened.write('{"step": 8, "ind')
    go(run, *dropout, *watched)
    assert taken(run) == straight
    assert weights(run) == weights(plain)
    # The base is not measured again; compared with a much better one, the model has forgotten.
    change = measured["after"] / 2 - 1
    assert change > 1 and forgetting(run) == {
        **{"before": 2.0, "after": measured["after"], "change": change, "flagged": True},
    }
    assert "has risen by over train.max_forgetting=0.05" in caplog.text


@pytest.mark.parametrize(("sample", "step"), [(1, 0), (2, 2), (4, 6)])
def test_a_signal_while_samples_are_taken_stops_the_run_which_takes_them_later(
    tmp_path: Path, saving: list[str], sample: int, step: int
) -> None:
    command = [*saving, "sample=held-out", "sample.every=2", "sample.num=3"]
    command += ["sample.max_new_tokens=8"]
    straight = go(tmp_path / "straight", *command)
    fault = f"SIGTERM:sft.watch.samples.Samples._answers:before:{sample}:0"
    run = tmp_path / "run"
    given = [*command, f"output_dir={run}"]
    stopped = run_warm(INJECT, fault, "sft.train", *given, cwd=tmp_path, check=False)
    assert stopped.returncode == 75, stopped.stderr
    where = f"after step {step}, which is saved" if step else "before the first step"
    assert where in stopped.stderr
    assert (
        [s["step"] for s in taken(run)] == [n for n in range(0, step, 2) for _ in range(3)]
        if (step)
        else not (run / "samples.jsonl").exists()
    )
    go(run, *command)
    assert taken(run) == taken(straight)
    assert differences(outcome(straight), outcome(run)) == []
    assert [r["step"] for r in records(run) if "train_runtime" in r] == [6]


def test_a_full_disk_is_said_once_and_the_run_goes_on(
    tmp_path: Path, saving: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    (run / "samples.jsonl").mkdir(parents=True)  # nothing can be appended to a folder
    (run / ".lock").touch()
    caplog.set_level(logging.INFO, "sft")
    command = [*saving, "sample=held-out", "sample.every=2", "sample.max_new_tokens=2"]
    made = main.compose([*command, f"output_dir={run}", "overwrite=true"])
    empty = samples.Samples._write
    with pytest.MonkeyPatch.context() as patch:

        def write(self: Any, text: str, again: bool = False) -> None:
            self.file = tmp_path / "missing" / "samples.jsonl"
            empty(self, text, again)

        patch.setattr(samples.Samples, "_write", write)
        (run / "samples.jsonl").rmdir()
        (run / ".lock").unlink()
        train(made)
    assert caplog.text.count("cannot be written") == 1
    assert caplog.text.count("  sample 1: ") == 4


@pytest.fixture(scope="module")
def template() -> Template:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return Template(main.compose([]).template, tokenizer)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY)


def make(template: Template, model: Any, given: Any, **settings: Any) -> Prompts:
    config = Config(sample=SampleConfig(every=1, prompts=given, **settings))
    nothing: Any = None
    return Prompts(config, template, nothing, model)


def test_a_changed_file_is_used_and_a_broken_one_is_not(
    tmp_path: Path, template: Template, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sft")
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    prompts = make(template, model, str(file), num=3)
    assert [p.text for p in prompts.again()] == [
        f"<|user|>{word}<|end|><|assistant|>" for word in ("one", "two")
    ]
    rows = [{"messages": [{"role": "user", "content": word}]} for word in "abcd"]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    good = prompts.again()
    assert [p.text[8] for p in good] == ["a", "b", "c"] and prompts.room == 64
    long = json.dumps({"prompt": "x" * model.config.max_position_embeddings})
    half, deep = '{"prompt": "\\ud800"}\n', json.dumps({"prompt": "[" * 5000})
    broken = ['{"prompt": ', '{"wrong": 1}\n', "", f"{long}\n", half, f"{deep}\n"]
    for number, text in enumerate(broken, 1):
        file.write_text(text)
        assert prompts.again() == prompts.again() == good
        assert caplog.text.count("the previous prompts are used") == number
    file.unlink()
    assert prompts.again() == good
    assert prompts.room == 64 and caplog.text.count("the previous prompts are used") == 7
    file.write_text('{"prompt": "new"}\n')
    assert [p.text[8:11] for p in prompts.again()] == ["new"]


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "is empty"), ("\n \n", "holds no prompts"), ("x" * 9999, "positions")],
)
def test_a_file_that_cannot_be_used_is_refused(
    tmp_path: Path, template: Template, model: Any, text: str, said: str
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(text)
    with pytest.raises(DataError, match=said):
        make(template, model, str(file))


def test_a_line_of_a_text_ends_where_a_file_has_a_line(
    tmp_path: Path, template: Template, model: Any
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("one\u2028two\x0c\r\n \rthree\x85\n".encode())
    found = [p.text for p in make(template, model, str(file)).again()]
    assert found == [
        f"<|user|>{text}<|end|><|assistant|>" for text in ("one\u2028two\x0c", "three\x85")
    ]


def test_a_list_is_rendered_with_the_template(template: Template, model: Any) -> None:
    prompts = make(template, model, ["one", "two", "three"], num=2).again()
    assert [p.text for p in prompts] == [
        "<|user|>one<|end|><|assistant|>",
        "<|user|>two<|end|><|assistant|>",
    ]
    assert template.tokenizer.decode(prompts[0].ids) == prompts[0].text


def test_of_plain_text_the_beginning_is_the_prompt() -> None:
    found = list(
        spoken(
            [
                {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
                {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5]},
                {
                    "input_ids": list(range(100)),
                    "labels": [-100, -100, *range(2, 100)],
                    "seq_lengths": [2, 98],
                },
            ]
        )
    )
    assert found[0] == ([1, 2], [3, 4])
    assert found[1] == ([1, 2], [3, 4, 5])
    assert found[2] == (list(range(2, 34)), list(range(34, 100)))


def test_samples_are_short_on_the_terminal() -> None:
    assert shortened("a\nb\tc\x1b[31m") == "a↵b c\ufffd[31m"
    assert len(shortened("x" * 1000)) < 170
    record = {"index": 0, "prompt": "p", "answer": "a", "reference": "b", "tokens": 9}
    assert describe({**record, "stopped": False}).splitlines() == [
        "sample 1: p",
        "    answer: a [cut after 9 tokens]",
        "    in the data: b",
    ]
    assert describe({**record, "answer": "b ", "stopped": True}).splitlines() == [
        "sample 1: p",
        "    answer: b",
    ]


def test_the_base_is_measured_whatever_the_adapter_starts_from(
    tmp_path: Path, saving: list[str], llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "sft")
    short = [*saving, "train.max_steps=2", "train.eval_strategy=no", "dataset.eval_fraction=0"]
    plain = go(tmp_path / "plain", *short, "train.max_forgetting=0.000001", "lora=all-linear")
    base = forgetting(plain)
    start = build_adapter(
        tmp_path / "start", llama, r=8, lora_alpha=16, target_modules="all-linear"
    )
    others = {
        "started": f"lora.init_from={start}",
        "pissa": "+lora.extra.init_lora_weights=pissa",
        "full": "lora=none",
    }
    for name, how in others.items():
        found = forgetting(go(tmp_path / name, *short, GENERAL, how))
        assert found["before"] == pytest.approx(base["before"], rel=2e-5), name
        assert abs(found["after"] - base["after"]) > 1e-4, name
    assert base["flagged"] is (base["change"] > 1e-6)

    # Resumed without the measurement: an adapter can be switched off, full weights cannot.
    caplog.clear()
    for name in ("plain", "full"):
        run = tmp_path / name
        content = json.loads((run / "run.json").read_text())
        content["status"] = "running"
        del content["forgetting"]
        (run / "run.json").write_text(json.dumps(content))
        more = ["lora=none"] if name == "full" else ["lora=all-linear"]
        if name == "plain":
            go(run, *short, "train.max_forgetting=0.000001", *more)
            assert forgetting(run) == base
        else:
            go(run, *short, GENERAL, *more)
            assert "forgetting" not in json.loads((run / "run.json").read_text())
    assert caplog.text.count("forgetting is not measured: ") == 1
