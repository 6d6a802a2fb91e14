"""One program: its commands, settings files, quoting, datasets by file, JSON, help, completion."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sft import __main__ as program
from sft.cli import completion, helptext
from sft.config import compose
from sft.config import groups as options
from sft.config.paths import CONF_DIR
from sft.config.settings import Config
from sft.data.__main__ import main as data
from sft.errors import ConfigError, Problem
from sft.generate import main as generate
from sft.merge.__main__ import main as merge
from sft.prove import main as prove
from sft.train import main as train

HEAVY = {"torch", "transformers", "trl", "peft", "deepspeed", "datasets", "hydra"}


def refused(*words: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        train.compose(list(words))
    return caught.value.problems


def one_refused(*words: str) -> tuple[str, str, str]:
    (problem,) = refused(*words)
    return problem.setting, problem.rule, problem.fix


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The program


def sft(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sft", *words])
    program.main()


def test_alone_it_lists_every_command_and_imports_no_library() -> None:
    code = "import sys; sys.argv[1:] = []; from sft.__main__ import main; main()"
    code += "; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    listed = re.findall(r"^    (\w+) +\w", done.stdout, re.MULTILINE)
    assert (
        listed
        == list(program.COMMANDS)
        == [*("train", "data", "import", "generate", "merge", "report", "runs", "prove")]
    )
    assert "    merge      merge an adapter into full weights, and verify them\n" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert set(done.stderr.split()) & HEAVY == set()


@pytest.mark.parametrize("module", ["sft", "sft.train"])
def test_it_runs_as_a_module(module: str) -> None:
    words = ["train"] if module == "sft" else []
    command = [sys.executable, "-m", module, *words, "lora.r=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: 1 setting is refused\n\nlora.r=0\n")


def test_every_command_is_called_as_it_is_listed() -> None:
    for name in program.COMMANDS:
        assert program.command(name).name == name


@pytest.mark.parametrize("words", [["--version"], ["train", "--version"]])
def test_the_version_is_ours(words, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    sft(monkeypatch, *words)
    assert capsys.readouterr().out == "sft 0.1.0\n"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "trian",
            "there is no command trian; the commands are train, data, import, generate, merge, "
            "report, runs, prove",
        ),
        ("trian", "fix: did you mean train?"),
        ("lora.r=4", "fix: sft train lora.r=4"),
        ("my.yaml", "fix: sft train my.yaml"),
        ("--foo", "there is no option --foo"),
        ("zzz", "fix: sft, which lists the commands"),
        ("--completion", "fix: sft --completion bash, zsh or fish"),
    ],
)
def test_an_unknown_command_exits_2(
    word: str, message: str, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="2"):
        sft(monkeypatch, word)
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: there is no" if word != "--completion" else "error: ")
    assert message in said.err


def test_help_of_a_command_may_be_asked_for_first(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    sft(monkeypatch, "train", "--help", "zero")
    expected = capsys.readouterr().out
    for word in ("help", "--help"):
        sft(monkeypatch, word, "train", "zero")
        assert capsys.readouterr().out == expected
    with pytest.raises(SystemExit, match="2"):
        sft(monkeypatch, "--json", "train", "lora.r=3")
    said = capsys.readouterr()
    assert said.err.endswith("fix: write the command first: sft train --json lora.r=3\n")
    assert said.err == f"error: {json.loads(said.out)['error']}\n"


@pytest.mark.parametrize(
    ("words", "setting", "rule"),
    [
        (["--json", "--info"], "--json", "Hydra prints this as text"),
        (["--json", "--cfg", "hydra"], "--json", "Hydra prints this as text"),
        (
            ["hydra.launcher.nproc_per_node=2"],
            "hydra.launcher.nproc_per_node=2",
            "Hydra's own settings have an effect on a sweep only",
        ),
        (
            ["-m", "hydra/launcher=joblib", "seed=1,2"],
            "hydra/launcher=joblib",
            "only sft's own launcher trains the trials of a sweep; this one would train nothing",
        ),
    ],
)
def test_what_hydra_would_ignore_or_fail_at_is_refused(
    words: list[str], setting: str, rule: str, capsys
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(words)
    assert f"error: 1 setting is refused\n\n{setting}\n    {rule}\n" in capsys.readouterr().err


@pytest.mark.parametrize("other", [data, prove])
def test_only_train_runs_a_sweep(other, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        other(["-m", "seed=1,2"])
    assert "only sft train can run a sweep" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        other(["--json", "-m"])
    assert "    -m " not in helptext.help_text(other, [])


def test_an_unknown_option_is_refused_as_other_bad_input(capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(["--cgf", "job"])
    assert capsys.readouterr().err == (
        "error: 1 setting is refused\n\n--cgf\n    there is no such option\n"
        "    fix: did you mean --cfg?\n"
    )


@pytest.mark.parametrize("words", [["--cfg", "x"], ["--config-dir"]])
def test_an_option_without_its_value_is_refused(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(words)
    assert capsys.readouterr().err.startswith(f"error: 1 setting is refused\n\n{words[0]}\n")


# A file of settings

MINE = """\
model: opt-125m
dataset: alpaca
seed: 7
run_name: null
lora:
  r: 4
  rank_pattern: {"^model.layers.0": 2, größe: 3}
template.system: null
train:
  learning_rate: 1e-4
  extra: {adam_beta2: 0.95, optim_args: "it's, \\"so\\"?"}
dataset.eval_fraction: 0.5
lora.modules_to_save: [lm_head, "a, b"]
"""


def test_a_file_is_read_as_the_line_is(folder: Path) -> None:
    Path("my.yaml").write_text(MINE, encoding="utf-8")
    config = train.compose(["my.yaml"])
    assert config.model.name_or_path == "facebook/opt-125m"
    assert (config.dataset.path, config.dataset.eval_fraction) == ("tatsu-lab/alpaca", 0.5)
    assert config.template.name == "alpaca"
    assert (config.seed, config.run_name, config.train.learning_rate) == (7, None, 1e-4)
    assert config.lora.rank_pattern == {"^model.layers.0": 2, "größe": 3}
    assert config.lora.modules_to_save == ["lm_head", "a, b"]
    assert config.train.extra == {"adam_beta2": 0.95, "optim_args": 'it\'s, "so"?'}

    words = train.expanded(["my.yaml", "lora.r=3"])
    assert train.compose(words) == train.compose(["my.yaml", "lora.r=3"])
    assert "my.yaml" not in words


def test_the_line_wins_over_the_file(folder: Path) -> None:
    Path("my.yaml").write_text(
        "model: opt-125m\nmodel.revision: main\nlora: {r: 4, lora_alpha: 4}\n"
        "dataset: {path: mine.jsonl, max_length: 64, columns: {prompt: a}}\n"
    )
    config = train.compose(["my.yaml", "model=tiny", "lora.r=16", "dataset=gsm8k"])
    assert (config.model.name, config.model.revision) == ("tiny", "main")
    assert (config.lora.r, config.lora.lora_alpha) == (16, 4)
    # gsm8k itself says where its rows are and what their columns are.
    assert config.dataset.path == "openai/gsm8k"
    assert config.dataset.columns == {"prompt": "question", "completion": "answer"}
    assert config.dataset.max_length == 512


def test_a_runs_own_config_is_a_settings_file(folder: Path, capsys) -> None:
    train(["--cfg", "job", "model=gpt2", "lora.r=3"])
    path = Path("lora.r=3/config.yaml")  # a trial's folder is called so
    path.parent.mkdir()
    path.write_text(capsys.readouterr().out)
    assert train.compose([str(path)]) == train.compose(["model=gpt2", "lora.r=3"])


def test_what_is_wrong_in_a_file_is_named_with_its_line(folder: Path) -> None:
    Path("bad.yaml").write_text(
        "model: opt-125\nlora:\n  rr: 4\n  r: 0\ndefaults: [a]\nseed: x\ntrain.lr: 3\n"
        "lora.r: 5\ndataset: {max_length: 4}\nhydra: {x: 1}\nrun_name: a/b\ntrian: {a: 1}\n"
    )
    found = {item.setting: (item.rule, item.fix) for item in refused("bad.yaml")}
    assert {setting: fix for setting, (_, fix) in found.items()} == {
        "bad.yaml:1: model=opt-125": "did you mean opt-125m?",
        "bad.yaml:3: lora.rr=4": "did you mean lora.r?",
        "bad.yaml:4: lora.r=0": "lora.r=8",
        "bad.yaml:5: defaults": "model: tiny",
        "bad.yaml:6: seed=x": "seed=42",
        "bad.yaml:7: train.lr=3": "train.learning_rate=3",
        "bad.yaml:8: lora.r": "keep one of them",
        "bad.yaml:9: dataset.max_length=4": "dataset.max_length=1024",
        "bad.yaml:10: hydra": "write it on the command line",
        "bad.yaml:11: run_name=a/b": "output_dir=DIR",
        "bad.yaml:12: trian={'a': 1}": "did you mean train?",
    }
    # What the line decides is no longer the file's fault.
    assert "lora.r=-1" in {item.setting for item in refused("bad.yaml", "lora.r=-1")}


@pytest.mark.parametrize(
    ("content", "setting", "rule"),
    [
        (b"- a\n", "x.yaml", "has no settings: it must be a mapping"),
        (b"text\n", "x.yaml", "has no settings: it must be a mapping"),
        (b"", "x.yaml", "has no settings: it must be a mapping"),
        (b"a: [\n", "x.yaml:2", "is not valid YAML: expected the node content"),
        (b"seed: 1\nseed: 2\n", "x.yaml:2", "is not valid YAML: found duplicate key seed"),
        (b"\xff\xfe", "x.yaml", "cannot be read: 'utf-8' codec can't decode"),
        (b"seed: ${nope}\n", "x.yaml:1: seed", "Interpolation key 'nope' not found"),
        (b"lora: 8\n", "x.yaml:1: lora=8", "lora has no option 8"),
        (b"lora: null\n", "x.yaml:1: lora=null", "lora has no option null"),
        (None, "x.yaml", "there is no such settings file"),
    ],
)
def test_a_file_that_cannot_be_used(
    folder: Path, content: bytes | None, setting: str, rule: str
) -> None:
    if content is not None:
        Path("x.yaml").write_bytes(content)
    found = one_refused("x.yaml")
    assert found[0] == setting
    assert found[1].startswith(rule)


def test_text_in_a_file_is_taken_as_it_is_written(folder: Path) -> None:
    Path("my.yaml").write_text("run_name: 010\nmodel: {revision: 1e10}\ntemplate.system: yes\n")
    config = train.compose(["my.yaml"])
    assert (config.run_name, config.model.revision, config.template.system) == (
        "010",
        "1e10",
        "yes",
    )
    Path("my.yaml").write_text("run_name: null\nmodel: {revision: '${seed}'}\n")
    config = train.compose(["my.yaml"])
    assert (config.run_name, config.model.revision) == (None, "42")


def test_an_options_yaml_and_a_second_file_are_refused(folder: Path) -> None:
    option = str(CONF_DIR / "model" / "opt-125m.yaml")
    assert one_refused(option) == (
        option,
        "is an option of the group model, not a settings file",
        "model=opt-125m",
    )
    for name in "ab":
        Path(f"{name}.yaml").write_text("seed: 1\n")
    assert one_refused("a.yaml", "b.yaml") == (
        "b.yaml",
        "a command takes one settings file, and a.yaml is given already",
        "put all settings into one file",
    )


def test_a_plain_command_takes_a_file_too(folder: Path) -> None:
    Path("my.yaml").write_text("model: m\nprompt: What's ${x}, ü?\ntemperature: 0.5\n")
    config = generate.compose(["my.yaml", "seed=3"])
    assert (config.prompt, config.temperature, config.seed) == ("What's ${x}, ü?", 0.5, 3)


def test_a_proof_hands_a_files_settings_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.prove import _given

    Path("my.yaml").write_text("steps: 4\nlora.r: 2\ntrain: {max_steps: 9, weight_decay: 0.1}\n")
    words = ["my.yaml", "--config-dir", ".", "ranks=1", "run_name=a b", "--json"]
    assert prove.compose(["my.yaml"]).steps == 4
    monkeypatch.setattr(sys, "argv", ["prove", *words])
    given = _given()
    assert given == ["--config-dir", ".", "lora.r=2", "train.weight_decay=0.1", "run_name='a b'"]


# Quoting

# A text may be longer than the name of a file can be.
TEXTS = [
    "long " * 100,
    "You are kind, and: brief?",
    "ü",
    "a b",
    "x=[1](2){3}",
    "it's",
    'say "hi"',
    "1e3",
    "#a\n",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_needs_no_quotes_beyond_the_shells(text: str) -> None:
    words = [f"template.system={text}", f"dataset.path={text}", f"dataset.columns.input={text}"]
    config = train.compose(words)
    assert config.template.system == config.dataset.path == text
    assert config.dataset.columns == {"input": text}
    assert generate.compose(["model=m", f"prompt={text}"]).prompt == text
    assert merge.compose([f"run={text}"]).run == text


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_around_a_whole_value_are_removed_by_every_command(quote: str) -> None:
    quoted = f"{quote}null, ü{quote}"
    assert train.compose([f"template.system={quoted}"]).template.system == "null, ü"
    assert generate.compose(["model=m", f"prompt={quoted}"]).prompt == "null, ü"
    assert train.compose(["template.system=null"]).template.system is None
    assert generate.compose(["model=m", "prompt='a' or 'b'"]).prompt == "'a' or 'b'"


def test_lists_and_mappings_hold_any_text() -> None:
    config = train.compose(
        [
            "dataset.columns={prompt:Größe, completion: b}",
            "lora.target_modules=[größe, b]",
            "lora.rank_pattern={^x.y$: 3}",
            "output_dir=${model.name}_${seed}",
        ]
    )
    assert config.dataset.columns == {"prompt": "Größe", "completion": "b"}
    assert config.lora.target_modules == ["größe", "b"]
    assert config.lora.rank_pattern == {"^x.y$": 3}
    assert config.output_dir == "tiny_42"
    assert merge.compose(["adapter=[ä, b c]", "output=o"]).adapter == ["ä", "b c"]
    with pytest.raises(
        ConfigError, match=r"adapter=a,b\n    takes one value, but several are given\n"
    ):
        merge.compose(["adapter=a,b", "output=o"])
    assert train.compose([r"template.system=Pay \${x}"]).template.system == "Pay ${x}"
    assert one_refused("template.system=Pay ${x}")[2] == compose.LITERAL
    assert one_refused("template.system=Pay ${")[2] == compose.LITERAL
    assert merge.compose(["adapter=[a${x}]", "output=o"]).adapter == ["a${x}"]
    assert one_refused("dataset.columns={a: [")[1].startswith("cannot be parsed: its brackets")
    assert one_refused("precision=bf16,fp32")[1] == "several values need a sweep (-m)"


def test_a_home_folder_is_found_and_no_output_is_an_address(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(folder))
    config = train.compose(["output_dir=~/o", "model.name_or_path=~/m", "template.system=~/x"])
    assert (config.output_dir, config.model.name_or_path) == (f"{folder}/o", f"{folder}/m")
    assert config.template.system == "~/x"
    config = generate.compose(["run=~/r", "prompt=~/p", "output=~/a"])
    assert (config.run, config.prompt, config.output) == (f"{folder}/r", "~/p", f"{folder}/a")
    assert merge.compose(["run=~/r"]).run == f"{folder}/r"
    for command, words in (
        (train, ["output_dir=s3://b/o"]),
        (merge, ["run=r", "output=s3://b/o"]),
        (generate, ["run=r", "prompt=p", "output=s3://b/o"]),
    ):
        with pytest.raises(ConfigError, match=r"=s3://b/o\n    must be a local path"):
            command.compose(words)


@pytest.mark.parametrize("name", ["..", ".", "", "a/b"])
def test_a_run_is_written_inside_of_outputs(name: str) -> None:
    for key in ("run_name", "model.name", "dataset.name"):
        assert one_refused(f"{key}={name}")[1] == "must be a name without a folder"


def test_text_that_no_file_can_hold_is_refused(folder: Path) -> None:
    assert one_refused("run_name=a\udc80b")[1] == "contains bytes that are not text"
    Path("my.yaml").write_text('template.system: "a\\0b"\n')
    assert one_refused("my.yaml")[0].startswith("my.yaml:1: template.system=")


# Sweeps


def trial_words(*words: str) -> list[list[str]]:
    """Expand a sweep as Hydra's sweeper does."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given, problems = train.read(list(words), sweep=True)
    assert problems == []
    forced = compose.sweep_overrides(Config, "train", given, None)
    parsed = OverridesParser.create().parse_overrides(forced)
    (jobs,) = BasicSweeper.split_arguments(parsed, None)
    return jobs


def test_the_trials_of_a_sweep_get_text_and_files_unchanged(folder: Path) -> None:
    Path("my.yaml").write_text(
        "model: gpt2\nlora: {r: 4, rank_pattern: {a: 2}}\ntemplate.system: 'Kind, yes?'\n"
    )
    Path("ü r.jsonl").write_text(MESSAGES)
    fixed = ["my.yaml", "dataset=ü r.jsonl", "run_name=1e3"]
    jobs = trial_words(*fixed, "seed=1,2", "model.revision=ü, b c,007")
    swept = [(seed, revision) for seed in "12" for revision in ("ü", "b c", "007")]
    assert len(jobs) == len(swept)
    for job, (seed, revision) in zip(jobs, swept, strict=True):
        alone = train.compose([*fixed, f"seed={seed}", f"model.revision={revision}"])
        assert train.compose(job) == alone
    assert alone.template.system == "Kind, yes?"
    assert (alone.dataset.path, alone.run_name, alone.lora.r) == ("ü r.jsonl", "1e3", 4)


def test_a_sweep_refuses_what_no_trial_can_be_given(folder: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        Path(name).write_text('{"prompt": "a", "completion": "b"}\n')
    for word, rule in (
        ("lora.r=interval(1,2)", "interval() does not list the values to try"),
        ("lora.rank_pattern={^a: 2}", "cannot be passed to a sweep's trials"),
        ("dataset=a.jsonl,b.jsonl", "a sweep over files needs dataset=OPTION"),
    ):
        problems = train.read([word], sweep=True)[1]
        assert problems[0].rule.startswith(rule)
    assert problems[0].fix == "dataset=jsonl dataset.path=a.jsonl,b.jsonl"


# dataset=FILE

MESSAGES = '{"messages": [{"role": "user", "content": "a"}]}\n'


@pytest.mark.parametrize(
    ("name", "content", "option"),
    [
        ("r.jsonl", '{"prompt": "a", "completion": "b"}\n', "jsonl"),
        ("my ü, r.json", '[{"instruction": "a", "output": "b"}]', "jsonl"),
        ("r.csv", "prompt,completion\na,b\n", "csv"),
        ("r.tsv", "question\tanswer\na\tb\n", "csv"),
        ("chat.jsonl", MESSAGES, "chat"),
        ("share.jsonl", '{"conversations": [{"from": "human", "value": "a"}]}', "chat"),
        ("list.jsonl", '{"prompt": [{}], "completion": [{}]}\n', "chat"),
        ("t.jsonl", '{"text": "a", "id": 1}\n', "text"),
        ("t.txt", "hello", "text"),
        ("broken.jsonl", "{", "jsonl"),
        ("folder/part.csv", "prompt,completion\na,b\n", "csv"),
    ],
)
def test_a_file_is_a_dataset(folder: Path, name: str, content: str, option: str) -> None:
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_text(content, encoding="utf-8")
    path = "folder" if name.startswith("folder") else name
    Path("my.yaml").write_text(json.dumps({"dataset": path}))
    for word in (f"dataset={path}", "my.yaml"):
        (chosen, rows), _ = train.read([word])
        assert (chosen.key, chosen.value) == ("dataset", option)
        assert (rows.key, rows.value) == ("dataset.path", path)


def test_a_file_brings_its_options_template(folder: Path) -> None:
    Path("chat.jsonl").write_text(MESSAGES)
    config = train.compose(["dataset=chat.jsonl", "dataset.eval_fraction=0.5"])
    assert (config.template.name, config.dataset.eval_fraction) == ("chat", 0.5)
    assert config == train.compose(
        ["dataset=chat", "dataset.path=chat.jsonl", "dataset.eval_fraction=0.5"]
    )


def test_parquet_patterns_and_prepared_folders_are_datasets(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}), "r.parquet")
    config = train.compose(["dataset=r.parquet"])
    assert config == train.compose(["dataset=parquet", "dataset.path=r.parquet"])
    assert train.compose(["dataset=*.parquet"]).dataset.path == "*.parquet"
    Path("prepared").mkdir()
    for name in ("meta.json", "dataset_dict.json"):
        Path("prepared", name).write_text("{}")
    assert train.compose(["dataset=prepared"]).dataset.format == "tokenized"


def test_what_is_neither_file_nor_option_is_refused(folder: Path) -> None:
    Path("notes.doc").write_text("a")
    Path("demo").mkdir()
    assert train.compose(["dataset=demo"]).dataset.name == "demo"  # an option comes first
    assert one_refused("dataset=demmo")[2] == "did you mean demo?"
    setting, rule, fix = one_refused("dataset=rows.jsonl")
    assert setting == "dataset=rows.jsonl"
    assert rule.startswith("there is no file or folder rows.jsonl; dataset has no option")
    assert fix == f"dataset=FILE, from {folder}"
    assert one_refused("dataset=notes.doc")[1].startswith("notes.doc is of no known kind: .jsonl,")
    Path("mixed").mkdir()
    for name in ("a.txt", "b.jsonl"):
        Path("mixed", name).write_text("")
    assert "plain text (a.txt) and tables (b.jsonl)" in one_refused("dataset=mixed")[1]
    twice = refused("dataset=notes.doc", "dataset.path=x")
    assert [item.rule for item in twice][1:] == ["dataset.path is given twice"]


# --json


def test_json_is_alone_on_stdout(capfd) -> None:
    def talks(config: Config) -> dict[str, object]:
        print("printed")
        os.system("echo of a child")
        return {"loss": float("nan"), "r": config.lora.r}

    dataclasses.replace(train, run=talks)(["--json", "lora.r=3"])
    said = capfd.readouterr()
    assert json.loads(said.out) == {"loss": None, "r": 3}
    assert said.out.count("\n") == 1
    assert "printed" in said.err
    assert "of a child" in said.err


def test_json_says_what_went_wrong(capfd) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(["--json", "lora.r=0"])
    said = capfd.readouterr()
    assert json.loads(said.out)["error"].startswith("1 setting is refused\n\nlora.r=0\n")
    assert said.err.startswith("error: 1 setting is refused")

    def interrupted(config: Config) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        dataclasses.replace(data, run=interrupted)(["--json"])
    assert json.loads(capfd.readouterr().out) == {"error": "interrupted"}
    for words, key in ((["--help"], "help"), (["--version"], "version")):
        train(["--json", *words])
        out = capfd.readouterr().out
        train(words)
        assert json.loads(out) == {key: capfd.readouterr().out}
    train(["--json", "--cfg", "job", "seed=5"])
    assert json.loads(capfd.readouterr().out)["seed"] == 5


def test_json_is_of_rank_0(capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    dataclasses.replace(train, run=lambda config: {"a": 1})(["--json"])
    assert capfd.readouterr().out == ""


# Help


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", program.COMMANDS)
def test_help_fits_the_terminal(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = helptext.help_text(program.command(name), ["--help"])
    assert max(map(len, text.splitlines())) < columns
    assert text.startswith(f"sft {name}: ")
    first = {"train": "dataset=OPTION", "data": "    preview=0", "prove": "    steps=null"}
    first |= {"generate": "    run=null", "merge": "    run=null", "import": "    file=null"}
    first |= {"report": "    runs=[]", "runs": "    dirs=[]"}
    shown = re.search(r"^(\w+=OPTION|    \w+=(?:\w+|\[\]))$", text, re.MULTILINE)
    assert shown is not None
    assert shown[1] == first[name]


def test_every_option_is_described_in_one_line_of_its_yaml() -> None:
    described = {
        (group, option): helptext.described(group, option)
        for group, names in options.groups(None).items()
        for option in names
    }
    assert len(described) == len(list(CONF_DIR.glob("*/*.yaml")))
    for key, text in described.items():
        assert 20 <= len(text) <= 100, key
        assert not text.endswith((",", " the", " a", ":", " and")), key
        assert text[0].isupper() or text[0].isdigit(), key


def test_help_shows_one_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    text = helptext.help_text(train, ["--help", "lora"])
    assert text.startswith("lora=OPTION\n    all-linear  LoRA on every linear layer except the LM")
    assert "    lora.r=8\n        rank; a higher" in text
    assert "train." not in text
    assert helptext.help_text(train, ["resume", "--help"]).startswith("Settings of resume")
    with pytest.raises(ConfigError, match="fix: did you mean dataset"):
        helptext.help_text(train, ["--help", "datset"])


def test_help_describes_the_users_own_options(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text("# My model.\nname: mine\n")
    argv = ["--help", "model", "--config-dir", str(tmp_path)]
    assert re.search(r"^    mine +My model\.$", helptext.help_text(train, argv), re.MULTILINE)


# Completion


def completed(capsys, *words: str) -> list[str]:
    completion.complete("zsh", *words)
    return capsys.readouterr().out.splitlines()


def test_words_are_completed(capsys, folder: Path) -> None:
    assert completed(capsys, "sft", "tr") == ["train "]
    assert completed(capsys, "sft", "help", "tr") == ["train "]
    assert completed(capsys, "sft", "--help", "train", "ze") == ["zero "]
    assert completed(capsys, "sft", "train", "'run_name=a b'", "'model=ti") == ["model=tiny"]
    assert completed(capsys, "sft", "train", "mod") == ["model=", "model."]
    opts = ["model=opt-1.3b", "model=opt-125m", "model=opt-350m", "model=opt-6.7b"]
    assert completed(capsys, "sft", "train", "model=op") == opts
    assert completed(capsys, "sft", "train", "-m", "model=gpt2,ti") == ["model=gpt2,tiny"]
    assert completed(capsys, "sft", "train", "lora.r") == ["lora.r=", "lora.rank_pattern="]
    assert completed(capsys, "sft", "train", "++lora.use_r") == ["++lora.use_rslora="]
    assert completed(capsys, "sft", "train", "precision=b") == ["precision=bf16 "]
    assert completed(capsys, "sft", "train", "overwrite=") == [
        "overwrite=false ",
        "overwrite=true ",
    ]
    assert completed(capsys, "sft", "merge", "mod") == []
    assert completed(capsys, "sft", "merge", "dt") == ["dtype="]
    assert completed(capsys, "sft", "train", "--help", "da") == ["dataset "]
    assert completed(capsys, "sft", "train", "--js") == ["--json "]
    assert completed(capsys, "sft", "train", "--config-p") == []
    assert completed(capsys, "sft", "nothing", "x") == []
    assert completed(capsys, "sft", "train", "dataset.path=x") == []
    assert completed(capsys, "python", "-m", "sft", "tr") == ["train "]
    assert completed(capsys, "python", "-m", "sft.data", "prev") == ["preview="]
    (folder / "model").mkdir()
    (folder / "model" / "mine.yaml").write_text("name: mine\n")
    words = ["sft", "train", "--config-dir", str(folder), "model=min"]
    assert completed(capsys, *words) == ["model=mine"]


SCRIPTS = {
    "bash": """
eval "$(sft --completion bash)"
for line in 'sft tr' 'sft train mod' 'sft train model=op' 'sft train lora.r' 'sft train x'; do
    COMP_LINE=$line COMP_POINT=${#line} COMP_WORDS=(${line//=/ = })
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    _sft_complete
    printf '%s|' "${COMPREPLY[@]}"; echo
done
complete -p sft >/dev/null && echo registered
""",
    "zsh": """
compadd() { while [[ $1 == -* && $1 != -- ]]; do [[ $1 == -S ]] && shift; shift; done
    shift; printf '%s|' "$@" }
compset() { }; _files() { }
eval "$(sft --completion zsh)"
for line in 'sft tr' 'sft train mod' 'sft train model=op' 'sft train lora.r' 'sft train x'; do
    words=(${=line}) CURRENT=${#words}
    _sft_complete; echo
done
[[ ${_comps[sft]} == _sft_complete ]] && echo registered
""",
    "fish": """
sft --completion fish | source
for line in 'sft tr' 'sft train mod' 'sft train model=op' 'sft train lora.r' 'sft train x'
    complete -C $line | string replace -r '\\t.*' '' | string join '|'
end
complete -c sft | string match -q '*_sft_complete*'; and echo registered
""",
}
OPT = {"opt-1.3b", "opt-125m", "opt-350m", "opt-6.7b"}


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_shell_completes(shell: str, folder: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    bin_dir = folder / "bin"
    bin_dir.mkdir()
    (bin_dir / "sft").write_text(f'#!/bin/sh\nexec {sys.executable} -m sft "$@"\n')
    (bin_dir / "sft").chmod(0o755)
    plain = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *plain, "-c", SCRIPTS[shell]],
        env={**os.environ, "PATH": f"{bin_dir}:{os.environ['PATH']}", "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    *lines, registered = done.stdout.splitlines()
    found = [{word.strip() for word in line.split("|") if word.strip()} for line in lines]
    options = OPT if shell == "bash" else {f"model={name}" for name in OPT}  # it cuts at "="
    assert found[:4] == [
        {"train"},
        {"model=", "model."},
        options,
        {"lora.r=", "lora.rank_pattern="},
    ], done.stderr
    assert not any(found[4:])
    assert registered == "registered"
