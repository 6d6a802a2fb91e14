"""Bad files of data and chat templates: damaged or odd ones of each kind."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

from hostile.case import MARKER, Case

GOOD = b'{"prompt": "a", "completion": "b"}\n'
BYTES: tuple[tuple[str, bytes, str], ...] = (
    ("empty.jsonl", b"", ""),
    ("blank.jsonl", b"\n \n\n", ""),
    ("no-json.jsonl", b"hello\n", ""),
    ("cut.jsonl", GOOD + b'{"prompt": "a", "compl', ""),
    ("numbers.jsonl", b"1\n2\n", ""),
    ("text.jsonl", b'"a"\n', ""),
    ("null.jsonl", b"null\n", ""),
    ("list.jsonl", b"[1, 2]\n", ""),
    ("empty-object.jsonl", b"{}\n", ""),
    ("unknown-columns.jsonl", b'{"x": "a", "y": "b"}\n', ""),
    ("nan.jsonl", b'{"prompt": "a", "completion": NaN}\n', ""),
    ("infinity.jsonl", b'{"prompt": "a", "completion": Infinity}\n', ""),
    ("boolean.jsonl", b'{"prompt": "a", "completion": true}\n', ""),
    ("mapping.jsonl", b'{"prompt": "a", "completion": {"a": 1}}\n', ""),
    ("nested.jsonl", b'{"prompt": "a", "completion": ' + b"[" * 100_000 + b"}\n", ""),
    ("deep.jsonl", b"[" * 100_000 + b"]" * 100_000 + b"\n", ""),
    ("huge-number.jsonl", b'{"prompt": ' + b"9" * 10_000 + b', "completion": "b"}\n', ""),
    ("latin1.jsonl", '{"prompt": "ü", "completion": "é"}\n'.encode("latin-1"), ""),
    ("utf16.jsonl", GOOD.decode().encode("utf-16"), ""),
    ("binary.jsonl", bytes(range(256)) * 20, ""),
    ("nul.jsonl", b"\0" * 1000, ""),
    ("null-messages.jsonl", b'{"messages": null}\n', ""),
    ("text-messages.jsonl", b'{"messages": "hello"}\n', ""),
    ("empty-messages.jsonl", b'{"messages": []}\n', ""),
    ("number-messages.jsonl", b'{"messages": [1, 2]}\n', ""),
    ("no-role.jsonl", b'{"messages": [{"content": "a"}]}\n', ""),
    ("odd-role.jsonl", b'{"messages": [{"role": "wizard", "content": "a"}]}\n', ""),
    ("only-user.jsonl", b'{"messages": [{"role": "user", "content": "a"}]}\n', ""),
    ("only-answer.jsonl", b'{"messages": [{"role": "assistant", "content": 5.5e400}]}\n', ""),
    ("image.jsonl", b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n', ""),
    ("bad-tools.jsonl", b'{"messages": [{"role":"user","content":"a"}], "tools": 5}\n', ""),
    ("id-negative.jsonl", b'{"input_ids": [-1, 2], "labels": [-1, 2]}\n', ""),
    ("id-huge.jsonl", b'{"input_ids": [99999999], "labels": [99999999]}\n', ""),
    ("id-fraction.jsonl", b'{"input_ids": [2.5, 1], "labels": [1, 1]}\n', ""),
    ("id-lengths.jsonl", b'{"input_ids": [1, 2, 3], "labels": [1]}\n', ""),
    ("id-text.jsonl", b'{"input_ids": "abc", "labels": "abc"}\n', ""),
    ("id-masked.jsonl", b'{"input_ids": [1, 2], "labels": [-100, -100]}\n', ""),
    ("sharegpt.jsonl", b'{"conversations": [{"from": "x", "value": 1}]}\n', ""),
    ("long.jsonl", b'{"prompt": "a", "completion": "' + b"word " * 5000 + b'"}\n', "max_length"),
    ("empty.json", b"", ""),
    ("cut.json", b'[{"prompt": "a"', ""),
    ("scalar.json", b"5", ""),
    ("empty-list.json", b"[]", ""),
    ("nested.json", b"[" * 100_000, ""),
    ("empty.csv", b"", ""),
    ("header.csv", b"prompt,completion\n", ""),
    ("ragged.csv", b"prompt,completion\na,b,c,d\ne\n", ""),
    ("quote.csv", b'prompt,completion\n"a,b\n', ""),
    ("same-columns.csv", b"prompt,prompt\na,b\n", ""),
    ("empty.parquet", b"", ""),
    ("text.parquet", b"PAR1 this is no table PAR1", ""),
    ("text.arrow", b"ARROW1 this is no table", ""),
    ("text.jsonl.gz", GOOD, ""),
    ("cut.jsonl.gz", gzip.compress(GOOD * 1000)[:60], ""),
    ("text.jsonl.zst", GOOD, ""),
    ("text.jsonl.bz2", GOOD, ""),
    ("text.jsonl.xz", GOOD, ""),
    ("text.zip", b"PK\3\4 no archive", ""),
    ("pickle.pkl", b"cposix\nsystem\n(S'touch " + MARKER.encode() + b"'\ntR.", ""),
    ("model.pt", b"cposix\nsystem\n(S'touch " + MARKER.encode() + b"'\ntR.", ""),
    ("script.py", f"open({MARKER!r}, 'w')\n".encode(), ""),
    ("letter.docx", b"no letter", ""),
    ("no-ending", GOOD, ""),
)


def _file(name: str, content: bytes) -> Callable[[Path, Path], None]:
    def make(here: Path, kit: Path) -> None:
        (here / name).write_bytes(content)

    return make


def _folder(*files: tuple[str, bytes]) -> Callable[[Path, Path], None]:
    def make(here: Path, kit: Path) -> None:
        for name, content in files:
            (here / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
            (here / "rows" / name).write_bytes(content)

    return make


def _fifo(here: Path, kit: Path) -> None:
    (here / "rows").mkdir()
    os.mkfifo(here / "rows" / "a.jsonl")


def _fifo_alone(here: Path, kit: Path) -> None:
    os.mkfifo(here / "rows.jsonl")


def _link(target: str) -> Callable[[Path, Path], None]:
    def make(here: Path, kit: Path) -> None:
        (here / "rows.jsonl").symlink_to(target)

    return make


def _named_folder(here: Path, kit: Path) -> None:
    (here / "rows.jsonl").mkdir()


def _unreadable(here: Path, kit: Path) -> None:
    (here / "rows.jsonl").write_bytes(GOOD)
    (here / "rows.jsonl").chmod(0)


def _bomb(here: Path, kit: Path) -> None:
    with gzip.open(here / "rows.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(600):
            file.write(b"x" * (1 << 20))


def _saved(name: str, content: bytes) -> Callable[[Path, Path], None]:
    """Write a folder as datasets.save_to_disk does, with one damaged file."""
    good = {
        "dataset_info.json": b"{}",
        "state.json": json.dumps({"_data_files": [{"filename": "a.arrow"}]}).encode(),
        "a.arrow": b"no table",
    }
    return _folder(*(good | {name: content}).items())


PLACES: tuple[tuple[str, str, Callable[[Path, Path], None], str], ...] = (
    ("no file", "{here}/none.jsonl", lambda here, kit: None, ""),
    ("no pattern matches", "{here}/*.jsonl", lambda here, kit: None, ""),
    ("an empty folder", "{here}/rows", lambda here, kit: (here / "rows").mkdir(), ""),
    ("a folder of other files", "{here}/rows", _folder(("a.docx", b"x"), ("b.png", b"x")), ""),
    # Accepted: a warning names the file, and the audit counts it.
    ("files of two kinds", "{here}/rows", _folder(("a.jsonl", GOOD), ("b.docx", b"x")), ""),
    ("a folder named as a file", "{here}/rows.jsonl", _named_folder, ""),
    ("a pipe in a folder", "{here}/rows", _fifo, ""),
    ("a pipe", "{here}/rows.jsonl", _fifo_alone, ""),
    ("a link to nothing", "{here}/rows.jsonl", _link("nothing"), ""),
    ("a link to itself", "{here}/rows.jsonl", _link("rows.jsonl"), ""),
    ("a device", "/dev/zero", lambda here, kit: None, ""),
    ("a link to a device", "{here}/rows.jsonl", _link("/dev/zero"), ""),
    ("a file without permission", "{here}/rows.jsonl", _unreadable, ""),
    ("600 MB in one line", "{here}/rows.jsonl.gz", _bomb, "max_row_bytes"),
    ("a saved dataset, damaged table", "{here}/rows", _saved("a.arrow", b"x"), ""),
    (
        "a saved dataset, with files from elsewhere",
        "{here}/rows",
        _saved("state.json", b'{"_data_files": [{"filename": "../../run.json"}]}'),
        "is no file of the dataset",
    ),
    ("a saved dataset, damaged state", "{here}/rows", _saved("state.json", b"{"), ""),
    ("a prepared folder, damaged", "{here}/rows", _folder(("sft_data.json", b"{")), ""),
    ("an unknown protocol", "nope://bucket/x.jsonl", lambda here, kit: None, ""),
    ("a hub id, offline", "some/dataset", lambda here, kit: None, ""),
    ("a long name", "{here}/" + "x" * 300 + ".jsonl", lambda here, kit: None, ""),
)
SETTINGS: tuple[tuple[str, str], ...] = (
    ("dataset.columns={prompt: nothing}", ""),
    ("dataset.format=messages", ""),
    ("dataset.format=alpaca", ""),
    ("template=completion template.prompts=['{prompt.__class__}']", ""),
    ("template=completion template.prompts=['{missing}']", ""),
    ("dataset.eval_path={here}/none.jsonl", ""),
    ("dataset.eval_fraction=0.0001", ""),
    ("dataset.split=nothing", ""),
    ("dataset.subset=nothing", "has no effect on the files"),
    ("dataset.ignore_columns=[completion]", ""),
    ("dataset.max_length=8", ""),
    ("dataset.packing=boundary dataset.boundary=zzz", ""),
    ("dataset.max_row_bytes=4", ""),
)
# Chat templates, each with the message's reason.
TEMPLATES: dict[str, tuple[str, str]] = {
    "unclosed": ("{% for m in messages %}", ""),
    "unclosed braces": ("{{ messages", ""),
    "unknown filter": ("{{ messages | nothing }}", ""),
    "unknown name": ("{{ nothing.at.all }}", ""),
    "division": ("{{ 1 // 0 }}", ""),
    "empty": ("   ", ""),
    "constant": ("hello", ""),
    "no content": ("{% for m in messages %}{{ m.role }}{% endfor %}", ""),
    "raises": ("{{ raise_exception('no') }}", ""),
    "endless": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
        "{% endfor %}{% endfor %}{% endfor %}x",
        "more than 20 s",
    ),
    "range": ("{% for a in range(10**9) %}{% endfor %}x", ""),
    "memory": ("{% set x = 'a' * 10**11 %}{{ x }}", "more memory than"),
    "doubling": (
        "{% set n = namespace(x='aaaaaaaaaaaaaaaa') %}{% for i in range(60) %}"
        "{% set n.x = n.x + n.x %}{% endfor %}{{ n.x }}",
        "more memory than",
    ),
    "power": ("{{ 9**9**9 }}", ""),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "deep"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", ""),
    "builtins": (
        "{{ cycler.__init__.__globals__.os.popen('touch " + MARKER + "').read() }}",
        "",
    ),
    "globals": (
        "{{ raise_exception.__globals__['__builtins__']['open']('" + MARKER + "','w') }}",
        "",
    ),
    "attribute": ("{{ messages.append({'role': 'user', 'content': 'x'}) }}", ""),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", ""),
    "include": ("{% include '/etc/passwd' %}", ""),
    "import": ("{% import 'os' as os %}{{ os.system('touch " + MARKER + "') }}", ""),
}


def _template(text: str) -> Callable[[Path, Path], None]:
    def make(here: Path, kit: Path) -> None:
        (here / "rows.jsonl").write_bytes(GOOD)
        (here / "bad.jinja").write_text(text)

    return make


def cases() -> list[Case]:
    """List the inputs of these tables; every second one is given to training."""
    found = [
        Case("data", f"{name}", "data", (f"dataset.path={{here}}/{name}",), says, _file(name, text))
        for name, text, says in BYTES
    ]
    found += [
        Case(
            "data",
            name,
            "train",
            (f"dataset.path={path}", "train.max_steps=1"),
            says,
            make,
            accepted=name == "files of two kinds",
        )
        for name, path, make, says in PLACES
    ]
    found += [
        Case("generate rows", name, "generate", ("run={kit}/run", f"file={{here}}/{name}"), says,
             _file(name, text))
        for name, text, says in BYTES[:7]
    ]  # fmt: skip
    words = ("run={kit}/run", "raw=true", "file={here}/rows.jsonl")
    rows = _file("rows.jsonl", b'{"prompt": "a"}\n{"prompt": 5}\n')
    found.append(Case("generate rows", "a raw number", "generate", words, "no text in", rows))
    found += [
        Case(
            "data settings",
            text,
            "data",
            ("dataset.path={here}/rows.jsonl", *text.split(" ", text.startswith("template"))),
            says,
            _file("rows.jsonl", GOOD),
        )
        for text, says in SETTINGS
    ]
    found += [
        Case(
            "chat templates",
            name,
            "data" if index % 2 else "train",
            ("dataset.path={here}/rows.jsonl", "template.chat_template={here}/bad.jinja"),
            says,
            _template(text),
        )
        for index, (name, (text, says)) in enumerate(TEMPLATES.items())
    ]
    return found
