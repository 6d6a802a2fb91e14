"""The pages in a real Chromium: nothing is requested or reported, and axe-core finds nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, axe_core, chromium
from made_runs import made_run
from support import TINY
from transformers import AutoTokenizer

from sft.data import page as data_page
from sft.report import folder, page

pytestmark = pytest.mark.skipif(chromium() is None, reason="Chromium is not installed")
needs_axe = pytest.mark.skipif(axe_core() is None, reason="AXE_CORE names no axe.min.js")
AUDIT = {
    "train": {
        "rows": 4000,
        "by_role": {"prompt": {"tokens": 123018}, "completion": {"tokens": 16835, "share": 0.12}},
        "lengths": {"p50": 35.25, "histogram": [[0, 16, 12], [16, 32, 900]], "max_length": 32},
        "checks": {"nothing_trained": {"verdict": "ok"}, "cut": {"verdict": "too many"}},
    }
}
AUDIT["eval"] = AUDIT["train"]
KINDS = ("run", "runs", "data")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start one browser for all pages."""
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write a page of each kind."""
    root = tmp_path_factory.mktemp("pages")
    paths = [made_run(root / name, 400, 2, seed) for seed, name in enumerate(("one", "two"), 1)]
    runs = [folder.read(path) for path in paths]
    texts = {"run": page.page(runs[:1]), "runs": page.page(runs)}
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer("<b>Hello</b>\nthere")["input_ids"]
    sample = {"input_ids": ids, "labels": [*[-100] * 8, *ids[8:]]}
    texts["data"] = data_page.page([sample, sample], tokenizer, "A preview", AUDIT)
    for kind, text in texts.items():
        (root / f"{kind}.html").write_text(text)
    return {kind: root / f"{kind}.html" for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_a_page_is_quiet_and_fits(
    browser: Browser, pages: dict[str, Path], kind: str, width: int, dark: bool
) -> None:
    browser.open(pages[kind], width, dark=dark)
    assert browser.errors == []
    assert browser.requests == [pages[kind].as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    back = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert back == ("rgb(20, 22, 21)" if dark else "rgb(247, 247, 244)")


@needs_axe
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (360, False)])
def test_a_page_is_accessible(
    browser: Browser, pages: dict[str, Path], kind: str, width: int, dark: bool
) -> None:
    browser.open(pages[kind], width, dark=dark)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.violations() == []


def test_what_these_tests_ask_for_is_noticed(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><html><title>x</title><p style='color:#999;width:900px'>pale</p>"
        "<img src='missing.png'><script>throw new Error('planted')</script>"
    )
    browser.open(bad, 360)
    assert any("planted" in error for error in browser.errors)
    assert browser.requests == [bad.as_uri(), bad.with_name("missing.png").as_uri()]
    assert browser.evaluate("document.documentElement.scrollWidth") > 360
    if axe_core() is not None:
        found = {line.partition(":")[0] for line in browser.violations()}
        assert {"image-alt", "html-has-lang", "color-contrast"} <= found


def test_the_pointer_shows_values(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["run"])
    box = browser.evaluate(
        "(b => [b.x, b.y, b.width, b.height])(document.querySelector('.plot svg')"
        ".getBoundingClientRect())"
    )
    x, y = box[0] + box[2] - 1, box[1] + box[3] / 2
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    said = browser.evaluate("document.querySelector('.plot output').textContent").splitlines()
    run = folder.read(pages["run"].with_name("one"))
    assert said[0] == "step 400"
    shown: dict[str, Any] = {
        name: float(value) for name, value in (s.split("  ") for s in said[1:])
    }
    for name, key in (("training", "loss"), ("held-out", "eval_loss"), ("code", "eval_code_loss")):
        assert shown[name] == pytest.approx(run.last(key), rel=0.01)


def test_without_scripts_and_in_print_it_says_the_same(
    browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    text = "document.querySelector('main').innerText"
    browser.open(pages["run"])
    whole = browser.evaluate(text)
    browser.open(pages["run"], script=False)
    browser.call("Emulation.setScriptExecutionDisabled", value=False)
    assert browser.evaluate(text) == whole
    assert "Loss" in whole and "tobor" in whole
    browser.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes()[:5] == b"%PDF-"
    paper = {"width": 720, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.call("Emulation.setDeviceMetricsOverride", **paper)
    browser.call("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("document.documentElement.scrollWidth") <= 720
    assert browser.evaluate("getComputedStyle(document.querySelector('details')).display") == "none"
