"""The README's commands, run verbatim and in order, in an empty folder, offline.

A block that opens with ```console is run; its `$` lines are the commands. `make test` is what runs
this; of `make train` the Makefile's own line is run, in the environment that is there already.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support import ROOT
from warm import run_warm

README = (ROOT / "README.md").read_text(encoding="utf-8")
RUN = Path("outputs") / "tiny_demo_r8_seed42"
Ran = Callable[[str], subprocess.CompletedProcess[str]]


def commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", "")
    return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


COMMANDS = [item for item in commands() if item != "make test"]


@pytest.fixture(scope="module")
def ran(folder: Path) -> Ran:
    """Give what runs a command, after those before it that have not run yet."""
    results: dict[str, subprocess.CompletedProcess[str]] = {}

    def until(command: str) -> subprocess.CompletedProcess[str]:
        for item in COMMANDS[: COMMANDS.index(command) + 1]:
            if item not in results:
                results[item] = shell(recipe_of("train") if item == "make train" else item, folder)
        return results[command]

    return until


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a line as the README's reader does, with the environment's commands at hand."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, shell=True, cwd=folder, env=environ, capture_output=True, text=True, timeout=580
    )


def recipe_of(target: str) -> str:
    """Give the Makefile's line of a target, with what make would fill in."""
    found = re.search(rf"^{target}:.*\n\t(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1].replace("$(BIN)/", "").replace("$(ARGS)", "")


def test_make_targets_stand_in_the_makefile() -> None:
    made = [command.split()[1] for command in commands() if command.startswith("make ")]
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"train", "test"} <= set(made) <= set(targets)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs_as_written(command: str, ran: Ran) -> None:
    result = ran(command)
    refused = "refused" in README.split(command)[1].split("```")[0]
    assert (result.returncode != 0) == refused, result.stdout + result.stderr
    if refused:
        assert "Traceback (most recent" not in result.stderr.partition("torch/distributed")[0]
    else:
        assert result.stderr == ""  # nothing of the libraries either


def test_the_demo_was_learnt(folder: Path, ran: Ran) -> None:
    """The claim of the first page: near zero before, above 95 % after."""
    ran("make train")
    lines = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    shares = [line["exact_match"] for line in lines if "exact_match" in line]
    assert len(shares) == 2
    assert shares[0] < 0.05
    assert shares[1] > 0.95
    rows = [
        {json.loads(line)["prompt"] for line in (ROOT / "assets/demo" / name).open()}
        for name in ("train.jsonl", "eval.jsonl")
    ]
    assert len(rows[1]) >= 200
    assert not rows[0] & rows[1]


def test_the_merged_model_alone_gives_the_same_answers(folder: Path, ran: Ran) -> None:
    ran(f"python -m sft.merge run={RUN}")
    eval_rows = ROOT / "assets" / "demo" / "eval.jsonl"
    answers = {}
    for source in (f"run={RUN}", f"model={RUN / 'merged'}"):
        output = folder / f"{source.partition('=')[0]}.jsonl"
        run_warm("generate", source, f"file={eval_rows}", f"output={output}", cwd=folder)
        answers[source] = [json.loads(line)["generated"] for line in output.open()]
    adapter, merged = answers.values()
    assert adapter == merged
    wanted = [json.loads(line)["completion"] for line in eval_rows.open()]
    right = sum(a.strip() == b for a, b in zip(merged, wanted, strict=True))
    assert right / len(wanted) > 0.95


# What a run's first lines say, in order; which way was chosen, and why, differs by processor.
FIRST_LINES = (
    r"precision +(fp32|bf16) +(the [CG]PU has (bf16|no bf16)|layers of width 128 are too small)",
    r"dataset\.packing +none +each row is a sample; ",
    r"model\.attn_implementation +packed +rows are joined",
    r"train\.padding_free +true +attention keeps",
    r"model\.frozen_linear +(plain|packed) +\w",
    r"lora\.enabled +true +as set; ",
    r"model\.lm_head +(chunked|trl) +\w",
    r"train\.gradient_checkpointing +false +[89] MiB of activations",
)


def test_the_first_lines_have_the_form_of_the_transcript(tmp_path: Path) -> None:
    transcript = README.partition("```text\n")[2].splitlines()
    short = ("train.max_steps=1", "dataset.max_rows=16", "dataset.max_eval_rows=4")
    result = run_warm("train", *short, "dataset.exact_match=0", cwd=tmp_path)
    for text in (transcript, result.stdout.splitlines()):
        lines = [line for line in text if not line.startswith(" ")]  # a reason that goes on
        assert len(lines) > len(FIRST_LINES)
        for form, line in zip(FIRST_LINES, lines, strict=False):
            assert re.match(form, line), lines[:6]
