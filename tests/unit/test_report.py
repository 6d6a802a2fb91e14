"""The page keeps every extreme, shows what is there, escapes what runs hold; the table of runs."""

import fcntl
import json
import math
import re
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_runs import made_run, write_lines

from sft import runs as table
from sft.errors import RunError
from sft.report import axes, folder, page, places
from sft.report.__main__ import main as report
from sft.report.curves import Curve, _spread, chart
from sft.run import ends, record

LARGEST = 300_000  # bytes of the page of 10,000 steps


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder of a run that has everything."""
    return made_run(tmp_path_factory.mktemp("runs") / "full", steps=400, every=2)


class Checked(HTMLParser):
    """Collects the elements of a page, and requires that they are closed in order."""

    VOID = ("meta", "br", "input", "html")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def page_of(*paths: Path) -> str:
    return page.page([folder.read(path) for path in paths])


def written(path: Path, run: dict[str, Any], metrics: list[Any]) -> Path:
    """Write a run's folder with no more than this."""
    path.mkdir()
    (path / "run.json").write_text(json.dumps(run))
    write_lines(path / "metrics.jsonl", metrics)
    return path


# Thinning


def test_thinning_keeps_every_extreme() -> None:
    values = [1.0 + 0.001 * step for step in range(10_000)]
    values[4321], values[8765] = 50.0, -7.0
    (part,) = axes.thinned(list(enumerate(values)))
    assert len(part) <= axes.BUCKETS
    assert max(bucket.high for bucket in part) == 50.0
    assert min(bucket.low for bucket in part) == -7.0
    assert [bucket.x for bucket in part] == sorted(bucket.x for bucket in part)
    (few,) = axes.thinned([(1.0, 2.0), (5.0, 3.0)])
    assert few == [axes.Bucket(1.0, 2.0, 2.0, 2.0), axes.Bucket(5.0, 3.0, 3.0, 3.0)]


def test_what_is_not_finite_is_a_gap_and_is_counted() -> None:
    points = [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)]
    assert [len(part) for part in axes.thinned(points)] == [1, 1]
    drawn = chart("Loss", [Curve("training", points)])
    assert "2 values are not finite numbers" in drawn
    assert "not a number" in drawn and "inf" not in drawn.replace("finite", "")
    assert chart("Loss", [Curve("training", [(1, math.nan)])]) == ""
    assert chart("Loss", []) == ""


def test_the_table_of_a_chart_names_the_extremes_and_their_steps() -> None:
    points = [(step, 9.25 if step == 777 else 1.5) for step in range(1000)]
    drawn = chart("Loss", [Curve("training", points)])
    assert "9.25 <small>at 777</small>" in drawn
    assert "largest 9.25 at step 777" in drawn


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 10, [0, 2.5, 5, 7.5, 10]), (0.93, 1.07, [0.95, 1.0, 1.05]), (5, 5, [5])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert axes.ticks(low, high) == pytest.approx(expected)


def test_the_labels_of_curves_do_not_cover_one_another() -> None:
    assert _spread([(100, 40.0), (100, 41.0), (50, 41.0)]) == [40.0, 48.0, 41.0]
    assert _spread([(100, 5.0), (100, 98.0), (100, 99.0)]) == [5.0, 92.0, 100.0]
    many = _spread([(100, 90.0)] * 12)
    assert many == [12 + 8 * n for n in range(12)]


def test_numbers_of_an_axis_are_short() -> None:
    found = [axes.short(value) for value in (0, 1500, 12_000, 2.5e6, 0.25, 5e-5)]
    assert found == ["0", "1,500", "12k", "2.5M", "0.25", "5.0e-5"]


# One run


def test_the_page_shows_everything(made: Path) -> None:
    run = folder.read(made)
    text = page.page([run])
    assert run.damaged == {}
    titles = re.findall(r"<h2>(.*?)(?: <small>.*)?</h2>", text)
    assert titles == [
        *("Curves", "Samples while training", "Stops, resumes and alerts", "Weights", "Merge"),
        *("Forgetting", "Operations and memory", "Use of the machine", "Slowest operations"),
        *("Data", "What auto chose", "Settings that differ from their defaults"),
        *("Software and machine", "The command"),
    ]
    charts = re.findall(r"<h3>([^<]+?)(?: <small>.*)?</h3>", text)
    for title in ("Loss", "Perplexity", "Learning rate", "Gradient norm", "Time of a step"):
        assert title in charts
    for said in ("held-out", "code", "aten::mm", "alert: loss jump", "SIGTERM", "killed", "+7.2%"):
        assert said in text
    assert "right answer</dt><dd><pre>tobor" in text
    assert "train.learning_rate</th><td>0.0001</td><td>0.0002" in text
    assert "Histogram of the lengths" in text


def test_the_page_is_sound_and_asks_for_nothing(made: Path) -> None:
    text = page_of(made)
    elements = Checked(text).found
    policy = next(a["content"] for tag, a in elements if "http-equiv" in a)
    assert policy is not None and policy.startswith("default-src 'none'; style-src")
    for tag, attributes in elements:
        assert tag not in ("link", "img", "iframe", "object", "base")
        assert not {"src", "href", "srcset", "onload", "onclick"} & attributes.keys()
    assert [tag for tag, _ in elements].count("script") == 1
    script = text.partition("<script>")[2].partition("</script>")[0]
    assert len(script) < 2048 and "fetch" not in script
    assert "url(" not in text and "@import" not in text
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))


def test_what_a_run_holds_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'&\u202e\x1b[31m"
    path = written(
        tmp_path / "run",
        {
            **{"status": "failed", "reason": evil, "command": evil, "versions": {evil: evil}},
            "choices": {evil: {"value": evil, "reason": evil}},
            "resumed": [{"from": evil, "ranks": evil, "allowed": [evil]}],
            "stops": [{"step": 1, "status": evil, "reason": evil}],
            "best": {"metric": evil, "step": evil, "written": True},
        },
        [{"step": 1, "loss": 1.0, f"eval_{evil}_loss": 2.0, f"eval_{evil}_perplexity": 3.0}],
    )
    write_lines(
        path / "samples.jsonl",
        [{"step": evil, "index": 0, "prompt": evil, "answer": evil, "reference": evil}],
    )
    write_lines(path / "alerts.jsonl", [{"step": 1, "kind": evil, "message": evil}])
    (path / "profile").mkdir()
    told = {
        "steps": [evil],
        "phases": [{"name": evil}],
        "operations": [{"name": evil, "calls": evil}],
    }
    (path / "profile" / "operations_rank0.json").write_text(json.dumps(told))
    (path / "checkpoint-1").mkdir()
    for text, times in ((page_of(path), 20), (page_of(path, path), 3)):
        elements = Checked(text).found
        assert [tag for tag, _ in elements].count("script") == 1
        assert text.count("alert(1)") >= times and "<script>alert" not in text
        assert "\u202e" not in text and "\x1b" not in text


def test_secrets_are_not_shown(made: Path, tmp_path: Path) -> None:
    text = page_of(made)
    assert "https://host/alpaca.jsonl" in text and "secret" not in text
    told = "sft train 'on_alert=curl -H secret' '+model.extra={a: 1, api_key: secret}' lora.r=4"
    settings = {"on_alert": "curl -H secret", "model": {"extra": {"hub_token": "secret"}}}
    path = written(tmp_path / "run", {"command": f"{told} dataset.path=s3://a:secret@b/c"}, [])
    (path / "config.yaml").write_text(json.dumps(settings))
    text = page_of(path)
    assert "secret" not in text and text.count("(not shown)") == 4
    assert "dataset.path=s3://b/c" in text and "lora.r=4" in text
    rows = table.runs(table.RunsConfig(dirs=[str(tmp_path), str(made)]))["runs"]
    assert "secret" not in json.dumps([row["differs"] for row in rows])
    (path / "run.json").write_text(
        json.dumps({"command": "sft train on_alert='curl sk-abcdefghijklmn"})
    )
    assert "sk-abc" not in page_of(path)


@pytest.mark.parametrize(
    "metrics",
    [
        [],
        [{"step": 0, "eval_loss": 4.7, "eval_perplexity": 110.0}],
        [{"step": 5, "loss": None, "grad_norm": None}],
        [{"step": 1, "loss": 10**400, "seconds_compute": "fast", "learning_rate": True}],
        [{"step": s, "loss": v, "eval_loss": v} for s, v in enumerate((1e308, -1e308, 5e-320))],
        [{"step": 10**s, "loss": 2.0, "memory_resident": 10**s} for s in (1, 90, 200)],
        [{"step": "x", "loss": 1.0}, {"loss": 1.0}, {"step": None}, [1], "text", 7],
    ],
)
def test_few_or_odd_records_make_a_page(tmp_path: Path, metrics: list[Any]) -> None:
    path = written(tmp_path / "run", {}, metrics)
    for text in (page_of(path), page_of(path, path)):
        Checked(text)
        assert not re.search(r"[\d,]{40}|[ ,\"]nan[,\"]|Error", text)


def test_damaged_files_are_named_and_counted(made: Path, tmp_path: Path) -> None:
    path = made_run(tmp_path / "broken", steps=20)
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    whole = "".join([*lines[:5], "{half\n", *lines[5:], '{"step": 2'])
    (path / "metrics.jsonl").write_bytes(b'{"step": \xff}\n' + whole.encode())
    (path / "data.json").write_text("[1, 2")
    (path / "merged" / "merge_report.json").write_text('{"passed": true, "eval_loss": [')
    (path / "config.yaml").write_text("a: [")
    (path / "samples.jsonl").write_bytes(b"\xff\xfe\n")
    assert len(folder.read(path).metrics) == len(lines)
    text = page_of(path)
    assert "metrics.jsonl: 3 damaged lines, which are left out" in text
    for name in ("data.json", "merged/merge_report.json", "config.yaml", "samples.jsonl"):
        assert f"<p>{name}: " in text
    (path / "run.json").write_text('{"status": 5}')
    assert "run.json: it is damaged" in page_of(path)


@pytest.mark.parametrize("value", [None, 7, "text", [1, [2]], {"a": {"b": [None]}}, [{"x": []}]])
def test_entries_of_any_type_make_a_page(tmp_path: Path, value: Any) -> None:
    keys = ("forgetting", "operations", "best", "stops", "ranks_memory", "versions", "hardware")
    run = {**{key: value for key in keys}, "seconds": value, "reason": value, "command": value}
    path = written(tmp_path / "run", run, [{"step": 1, "loss": 1.0, "eval_loss": 1.0}])
    (path / "merged").mkdir()
    for name in ("data.json", "merged/merge_report.json"):
        (path / name).write_text(json.dumps({"parts": value, "passed": value}))
    record_of = {"step": value, "index": None, "time": value, "gpus": value, "answer": value}
    for name in ("samples.jsonl", "alerts.jsonl", "system.jsonl"):
        write_lines(path / name, [record_of, record_of])
    Checked(page_of(path))


def test_ten_thousand_steps_fit_into_the_limits(tmp_path: Path) -> None:
    path = made_run(tmp_path / "long", steps=10_000)
    code = "import sys; sys.argv[1:] = ['report', *sys.argv[1:]]; from sft.__main__ import main; "
    code += "main(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "numpy", "datasets"} & set(done.stderr.split())
    text = (path / "report.html").read_text()
    assert len(text.encode()) < LARGEST
    loss = max((r["loss"], r["step"]) for r in folder.read(path).metrics if "loss" in r)
    assert f"{loss[0]:.4g} <small>at {loss[1]:,}</small>" in text


# Several runs


def test_several_runs_are_compared(made: Path, tmp_path: Path) -> None:
    other = made_run(tmp_path / "other", steps=200, every=2, seed=2, rate=3e-4, r=16)
    text = page_of(made, other)
    Checked(text)
    assert "<h1>2 runs</h1>" in text and "A full · B other" in text
    rows = re.findall(r"<th scope=\"row\">([\w.]+)</th><td>([^<]+)</td><td>([^<]+)</td></tr>", text)
    settings = {key: values for key, *values in rows if "." in key or key == "seed"}
    assert settings == {
        "seed": ["1", "2"],
        "lora.r": ["8", "16"],
        "train.learning_rate": ["0.0001", "0.0003"],
    }
    loss = text.partition("Training loss")[2].partition("</figure>")[0]
    assert 'class="c0 d0" data-name="A"' in loss and 'class="c1 d1" data-name="B"' in loss
    assert len(re.findall('<span class="end', loss)) == 2


# The command


def test_the_command_writes_the_page(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    report([str(made)])
    assert (made / "report.html").read_text().startswith("<!doctype html>")
    report([str(made), str(made), "--json"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == {"page": "report.html", "runs": [str(made), str(made)], "trackers": []}
    assert "<h1>2 runs</h1>" in Path("report.html").read_text()
    Path("mine.html").write_text("<p>mine</p>")
    with pytest.raises(SystemExit):
        report([str(made), "output=mine.html"])
    assert "mine.html is not a page of sft\n    fix: overwrite=true" in capsys.readouterr().err
    report([str(made), "output=mine.html", "overwrite=true"])
    assert "sft" in Path("mine.html").read_text()
    with pytest.raises(SystemExit):
        report([str(made), "output=no/such/x.html"])
    assert "no/such/x.html cannot be written: No such file" in capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused_with_a_fix(made: Path) -> None:
    for path, says in (
        (made.parent, rf"it holds full\n    fix: sft report {made}"),
        (made.with_name("ful"), rf"there is no folder .*ful\n    fix: did you mean {made}"),
        (made / "adapter", rf"a folder within a run\n    fix: sft report {made}"),
        (made / "run.json", rf"is a file\n    fix: sft report {made}"),
        (made.parent.parent / "x", "there is no folder .*\n    fix: sft runs lists the runs"),
        (made.with_name("zzz"), "there is no folder .*\n    fix: sft runs lists the runs"),
    ):
        with pytest.raises(RunError, match=says):
            places.require(path)


# The status and the ends of a run


def test_the_lock_tells_a_running_run_from_a_killed_one(tmp_path: Path) -> None:
    path = written(tmp_path / "run", {"status": "running"}, [])
    assert folder.read(path).status == "killed"
    (path / "lock").touch()
    assert folder.read(path).status == "killed"
    with (path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert folder.read(path).status == "running"
    assert "killed" in page_of(path)


def test_every_end_of_a_run_is_recorded_once(tmp_path: Path) -> None:
    path = written(tmp_path / "run", {}, [{"step": 7, "loss": 1.0}])
    assert ends.earlier(path, {}) == []
    first = {"status": "stopped", "reason": "SIGTERM", "ended": 100.0}
    stopped = ends.earlier(path, first)
    assert stopped == [{"step": 7, "time": 100.0, "status": "stopped", "reason": "SIGTERM"}]
    (path / "checkpoint-9").mkdir()
    killed = ends.earlier(path, {"status": "running", "stops": stopped})
    assert killed[0] == stopped[0] and len(killed) == 2
    assert (killed[1]["step"], killed[1]["status"]) == (9, "killed")
    assert abs(killed[1]["time"] - time.time()) < 60


# The table of runs


@pytest.fixture
def several(tmp_path: Path) -> Path:
    """Give four runs, one of them in a sweep and one without figures."""
    outputs = tmp_path / "outputs"
    made_run(outputs / "one", steps=20, seed=1)
    made_run(outputs / "two", steps=40, seed=1, r=16)
    made_run(outputs / "sweeps" / "s" / "lora.r=4", steps=20, seed=1, r=4)
    (outputs / "three").mkdir()
    (outputs / "three" / "run.json").write_text('{"status": "failed"}')
    (outputs / "notes").mkdir()
    return outputs


def listed(capsys: Any, *words: str) -> list[str]:
    table.main([*words, "--json"])
    return [run["name"] for run in json.loads(capsys.readouterr().out)["runs"]]


def test_runs_are_listed_sorted_and_filtered(several: Path, capsys: Any) -> None:
    where = str(several)
    assert set(listed(capsys, where)) == {"one", "two", "three", "sweeps/s/lora.r=4"}
    assert listed(capsys, where, "sort=lora.r") == ["sweeps/s/lora.r=4", "one", "two", "three"]
    assert listed(capsys, where, "sort=-step")[0] == "two"
    assert listed(capsys, where, "sort=-name")[0] == "two"
    assert listed(capsys, where, "sort=grad_norm")[-1] == "three"
    assert listed(capsys, where, "status=failed") == ["three"]
    assert listed(capsys, where, "match=lora.r=16") == ["two"]
    assert listed(capsys, where, "model=QWEN", "data=alp", "match=one") == ["one"]
    assert listed(capsys, where, "status=running") == []
    assert listed(capsys, str(several / "one")) == ["one"]


def test_the_table_has_what_json_has(several: Path, capsys: Any) -> None:
    table.main([str(several), "sort=lora.r"])
    text = capsys.readouterr().out
    head, first, *_ = text.splitlines()
    assert head.split() == [
        *("run", "status", "model", "data", "step", "differs", "eval", "best", "tokens/s", "age")
    ]
    run = folder.read(several / "sweeps" / "s" / "lora.r=4", brief=True)
    best = run.best("eval_loss")
    assert best is not None
    assert f"{best[1]:.4f} at {best[0]:.0f}" in first and "lora.r=4" in first
    assert f"{run.last('eval_loss'):.4f}" in first


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_table_fits_the_terminal(
    several: Path, columns: int, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    table.main([str(several)])
    text = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    lines = text.splitlines()
    assert len(lines) == 5 and max(map(len, lines)) <= columns
    assert "differs" in lines[0] and "status" in lines[0]
    assert ("eval" in lines[0]) == (columns >= 60)
    assert ("model" in lines[0]) == (columns >= 120)


def test_a_brief_look_has_the_same_figures(made: Path) -> None:
    brief, whole = folder.read(made, brief=True), folder.read(made)
    assert len(brief.metrics) < len(whole.metrics) / 4
    for key in ("loss", "eval_loss", "tokens_per_second"):
        assert brief.last(key) == whole.last(key)
    for key in ("eval_loss", "eval_code_loss"):
        assert brief.points(key) == whole.points(key)
    assert brief.settings == whole.settings == record.settings(made)


def test_a_place_without_runs_is_answered(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table.main([])
    assert "there are no runs in outputs; sft train makes one" in capsys.readouterr().out
    for words, says in (
        (["gone"], "there is no folder gone\n    fix: sft runs FOLDER"),
        (["status=done"], "status=done\n    must be one of finished"),
        (["sort="], "must name a column"),
    ):
        with pytest.raises(SystemExit):
            table.main(words)
        assert says in capsys.readouterr().err


def test_each_trial_of_a_sweep_shows_its_setting(tmp_path: Path) -> None:
    for r in (2, 4, 16):
        (written(tmp_path / f"r{r}", {}, []) / "config.yaml").write_text(f"lora: {{r: {r}}}")
    rows = table.runs(table.RunsConfig(dirs=[str(tmp_path)], sort="lora.r"))["runs"]
    assert [row["differs"] for row in rows] == [{"lora.r": r} for r in ("2", "4", "16")]


def test_what_runs_are_sorted_by_is_suggested(made: Path) -> None:
    for sort, near in (("eval_los", "eval_loss"), ("-lora.rr", "lora.r"), ("agee", "age")):
        with pytest.raises(RunError, match=f"did you mean sort={near}"):
            table.runs(table.RunsConfig(dirs=[str(made)], sort=sort))


def test_a_setting_that_an_earlier_version_lacked_does_not_differ(tmp_path: Path) -> None:
    for name, text in (("old", "seed: 42"), ("also", "seed: 42"), ("new", "precision: auto")):
        (written(tmp_path / name, {}, []) / "config.yaml").write_text(f"run_name: {name}\n{text}")
    rows = table.runs(table.RunsConfig(dirs=[str(tmp_path)]))["runs"]
    assert [row["differs"] for row in rows] == [{}] * 3
    assert "All settings are equal" in page_of(tmp_path / "old", tmp_path / "new")
