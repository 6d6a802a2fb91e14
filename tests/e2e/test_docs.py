"""The commands of README.md and docs/, run or composed, and what they print beside what is shown.

A ```console block is run verbatim and in order, in an empty folder, offline; its `$` lines are the
commands, and what they print must be what the block shows: numbers are masked, spaces are folded, a
line `[...]` stands for any lines, and `[...]` within a line for anything. `make test` is what runs
this; of `make train` the Makefile's own line is run. Commands in ```sh blocks and in tables need
models or GPUs that are not here: their settings are composed and checked, and nothing is run.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import warm_python
from support import ROOT
from warm import run_warm

from sft.cli.commands import command
from sft.config import compose

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = Path("outputs") / "tiny_demo_r8_seed42"
GAP = "[...]"
# Started as a user does; the others in processes that need not import the libraries.
COLD = {
    "sft generate run=outputs/tiny_demo_r8_seed42 prompt='Write this word backwards: robot'",
    "python -m sft.train model=opt-125 lora.rank=8 train.warmup_ratio=0.1",
    "sft import axolotl.yaml gpus=2",
}
Ran = Callable[[str], subprocess.CompletedProcess[str]]


def blocks(kind: str) -> Iterator[str]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        yield from re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL)


def shown() -> dict[str, str]:
    """Map each command of the console blocks to the lines that are shown below it."""
    found: dict[str, str] = {}
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block.replace("\\\n", ""), flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            assert not output or not found.get(command), f"{command} is shown twice"
            found[command] = output or found.get(command, "")
    return found


SHOWN = shown()
COMMANDS = [command for command in SHOWN if command != "make test"]


def described() -> list[str]:
    """List the commands that are shown without their output: in sh blocks and in tables."""
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", "").splitlines()]
    for page in PAGES:
        rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
        lines += [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
    return [line for line in lines if re.match(r"(torchrun .*-m sft|sft|python -m sft)\b", line)]


def masked(text: str) -> list[str]:
    """Fold spaces, and mask what differs between machines and runs."""
    lines = []
    for line in text.strip("\n").splitlines():
        if re.match(r"( {20,}\S|(precision|(model|train|dataset|lora)\.\w+) {2,})", line):
            # A choice of sft, which depends on the machine: its reason may be wrapped.
            line = line.split()[0] if line[0] != " " else ""
            if not line:
                continue
        line = re.sub(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?", "#", line)
        lines.append(" ".join(line.split()))
    return lines


def pattern(output: str) -> str:
    """Make the expression that the masked output of a command must match."""
    lines = []
    for line in masked(output):
        escaped = re.escape(line).replace(re.escape(GAP), ".*")
        lines.append(r"(?:.*\n)*?" if line == GAP else f"{escaped}\n")
    return "".join(lines)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("docs")


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
    start: str | list[str] = command
    if command not in COLD and (door := re.match(r"(?:python -m sft\.|sft )(\w+)", command)):
        environ["PYTHON_EXEC"] = warm_python.executable()
        start = [environ["PYTHON_EXEC"], "-m", f"sft.{door[1]}"]
        start += shlex.split(command[door.end() :])
    return subprocess.run(
        start,
        shell=isinstance(start, str),
        cwd=folder,
        env=environ,
        capture_output=True,
        text=True,
        timeout=580,
    )


def recipe_of(target: str) -> str:
    """Give the Makefile's line of a target, with what make would fill in."""
    found = re.search(rf"^{target}:.*\n\t(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    return found[1].replace("$(BIN)/", "").replace("$(ARGS)", "")


def test_make_targets_stand_in_the_makefile() -> None:
    made = [command.split()[1] for command in SHOWN if command.startswith("make ")]
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"train", "test"} <= set(made) <= set(targets)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_prints_what_is_shown(command: str, ran: Ran) -> None:
    result = ran(command)
    fails = bool(re.search(r"^error:|  failed after ", SHOWN[command], re.MULTILINE))
    assert (result.returncode != 0) == fails, result.stdout + result.stderr
    if not SHOWN[command].startswith("error:"):
        assert result.stderr == ""  # nothing of the libraries either
    if SHOWN[command]:
        printed = "".join(f"{line}\n" for line in masked(result.stdout + result.stderr))
        assert re.fullmatch(pattern(SHOWN[command]), printed), printed


def test_a_line_that_is_not_printed_is_noticed() -> None:
    printed = "".join(f"{line}\n" for line in masked("loss 1.5\nstep 3 of 4\nwritten to a/b\n"))
    for output, matches in (
        ("loss 2.25\nstep 1 of 9\nwritten to a/b", True),
        ("loss 2.25\n[...]\nwritten to [...]", True),
        ("loss 2.25\nwritten to a/b", False),
        ("loss 2.25\nstep 1 of 9", False),
        ("[...]\nsaved to a/b", False),
    ):
        assert bool(re.fullmatch(pattern(output), printed)) == matches


FILES = ("rows.jsonl", "chat.jsonl", "code/a.jsonl", "FOLDER/a.txt")


@pytest.mark.parametrize("line", sorted(set(described())))
def test_a_described_command_has_settings_that_exist(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in re.findall(r"\S+\.sft\.yaml", line):  # written by sft import, the line above
        (tmp_path / name).write_text("lora.r: 4\n")
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"prompt": "a", "completion": "b"}\n')
    words = shlex.split(line.partition("  #")[0])
    door = next(i for i, word in enumerate(words) if word == "sft" or word.startswith("sft."))
    name = words[door].partition(".")[2] or words[door + 1]
    given = words[door + (1 if "." in words[door] else 2) :]
    main = command(name)
    overrides = [word for word in given if not word.startswith("-") and word != "job"]
    assert given == [] or overrides or "--help" in given
    read, problems = main.read(overrides, None, "-m" in given)
    assert problems == []
    if main.config_name is None:
        assert compose.plain_config(main.schema, read)[1] == []
    elif "-m" in given:
        assert compose.sweep_overrides(main.schema, main.config_name, read, None)
    else:
        main.compose(overrides)


def test_the_page_of_settings_is_that_of_the_schema() -> None:
    script = ROOT / "scripts" / "settings_page.py"
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import runpy; print(runpy.run_path({str(script)!r})['page'](), end='')",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert made == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")


def test_every_page_is_in_the_site_and_every_link_leads_somewhere() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = {page.name for page in PAGES[1:]}
    assert set(re.findall(r"^  - ([\w-]+\.md)$", nav, re.MULTILINE)) == pages
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert {"index.md", *re.findall(r"^\| \[.*?\]\(([\w-]+\.md)\)", index, re.MULTILINE)} == pages
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (page.parent / target).exists(), target


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
    ran(f"sft merge run={RUN}")
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
