"""The embedded model's recipe: the same bytes each time, and no held-out argument in training."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import warm_python
from support import ROOT


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Build twice, with three steps of pre-training, and with two seeds of Python's hashes."""
    folders = [tmp_path_factory.mktemp("build") for _ in range(2)]
    for folder, python in zip(folders, (sys.executable, warm_python.executable()), strict=True):
        script = ROOT / "scripts" / "build_tiny.py"
        command = [python, str(script), "--steps", "3", "--output", str(folder)]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    return folders


def test_two_builds_are_the_same_bytes(builds: list[Path]) -> None:
    trees = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in builds
    ]
    assert len(trees[0]) == 7
    assert trees[0] == trees[1]


def test_shipped_data_and_tokenizer_are_what_the_script_makes(builds: list[Path]) -> None:
    names = [
        *("demo/train.jsonl", "demo/eval.jsonl", "tiny/tokenizer.json"),
        *("tiny/tokenizer_config.json", "tiny/config.json", "tiny/generation_config.json"),
    ]
    for name in names:
        assert (builds[0] / name).read_bytes() == (ROOT / "assets" / name).read_bytes(), name
    assert (ROOT / "assets" / "tiny" / "model.safetensors").stat().st_size < 4_000_000


def test_held_out_prompts_are_new() -> None:
    """No prompt, and no word or number in the same request, is in a training row."""
    asked: dict[str, set[tuple[str, str]]] = {}
    for name in ("train", "eval"):
        lines = (ROOT / "assets" / "demo" / f"{name}.jsonl").read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        assert len(set(prompts)) == len(prompts) == {"train": 4000, "eval": 300}[name]
        asked[name] = {tuple(re.split(r"[:?] ", prompt)) for prompt in prompts}  # type: ignore[misc]
    requests = {request for request, _ in asked["eval"]}
    assert requests <= {request for request, _ in asked["train"]}
    assert len(requests) == 20
    assert not asked["train"] & asked["eval"]
