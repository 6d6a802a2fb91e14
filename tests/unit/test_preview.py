"""A preview shows each token once, as trained or not, and nothing that the data could inject."""

import io
import re
from typing import Any

import pytest
from support import TINY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sft.data import page, preview

AUDIT = {
    "train": {
        **{"rows": 4000, "dropped": 0, "odd_key": "<b>", "seen": None, "files": ["a", "b"]},
        "by_role": {"prompt": {"tokens": 123018}, "completion": {"tokens": 16835, "share": 0.12}},
        "lengths": {"p50": 35.25, "histogram": [[0, 16, 12], [16, 32, 900], [32, 48, 0]]},
        "checks": {"nothing_trained": {"verdict": "ok"}, "cut": {"verdict": "too many"}},
        "max_length": 64,
    },
    "eval": {"lengths": {"histogram": [[0, 16, 3]], "max_length": 1024}},
}


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what rich would believe rather than the file it prints to."""
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Give the embedded one: a token for each byte, so that ids can be counted by hand."""
    return AutoTokenizer.from_pretrained(TINY)


def sample(tokenizer: PreTrainedTokenizerBase, *segments: str) -> dict[str, list[int]]:
    """Encode segments, of which every second one is trained."""
    made: dict[str, list[int]] = {"input_ids": [], "labels": []}
    for index, segment in enumerate(segments):
        ids = tokenizer(segment)["input_ids"]
        made["input_ids"] += ids
        made["labels"] += ids if index % 2 else [-100] * len(ids)
    return made


def packed(*samples: dict[str, list[int]]) -> dict[str, list[int]]:
    made = {key: [id for one in samples for id in one[key]] for key in ("input_ids", "labels")}
    return {**made, "seq_lengths": [len(one["input_ids"]) for one in samples]}


def shown(tokenizer: PreTrainedTokenizerBase, *samples: dict[str, list[int]], **how: Any) -> str:
    file = io.StringIO()
    preview.show(samples, tokenizer, file=file, **how)
    return file.getvalue()


def body(tokenizer: PreTrainedTokenizerBase, *samples: dict[str, list[int]], **how: Any) -> str:
    """Give the part of a page that is made of the samples and the audit."""
    text = page.page(samples, tokenizer, "T", how.get("audit")).split("</p>\n", 1)[1]
    return re.sub(' scope="(row|col)"', "", text)


def test_text_has_brackets_and_visible_line_ends(tokenizer: PreTrainedTokenizerBase) -> None:
    one = sample(tokenizer, "ab\n", "c d\n<|end|>", "\ne ")
    assert preview.marked(one, tokenizer) == "ab\n⟦c d\n<|end|>⟧\ne "
    assert shown(tokenizer, one, one) == (
        "sample 1  11 tokens, 5 trained (45 %)\nab↵\n⟦c d↵\n<|end|>⟧↵\ne \n\n"
        "sample 2  11 tokens, 5 trained (45 %)\nab↵\n⟦c d↵\n<|end|>⟧↵\ne \n"
    )


def test_a_long_line_is_left_to_the_terminal(tokenizer: PreTrainedTokenizerBase) -> None:
    words = "word  " * 50
    assert f"\n⟦{words}⟧\n" in shown(tokenizer, sample(tokenizer, "", words))


def test_packed_documents_are_told_apart(tokenizer: PreTrainedTokenizerBase) -> None:
    # The end of the first and the beginning of the second are trained: one stretch, were it not
    # for the seam.
    pack = packed(sample(tokenizer, "a", "bc"), sample(tokenizer, "", "d", "e"))
    assert shown(tokenizer, pack) == (
        "sample 1  5 tokens, 3 trained (60 %), 2 documents\n"
        "── document 1 of 2: 3 tokens, 2 trained (67 %) ──\na⟦bc⟧\n"
        "── document 2 of 2: 2 tokens, 1 trained (50 %) ──\n⟦d⟧e\n"
    )
    html = body(tokenizer, pack)
    assert "5 tokens, 3 trained (60 %), 2 documents" in html
    assert re.findall(r'<pre class="text">(.*)</pre>', html) == [
        "a<mark>bc</mark>",
        "<mark>d</mark>e",
    ]
    assert re.findall(r'"rule">(.*) <small>(.*)</small>', html) == [
        ("document 1 of 2", "3 tokens, 2 trained (67 %)"),
        ("document 2 of 2", "2 tokens, 1 trained (50 %)"),
    ]
    assert "1 document\n" in shown(tokenizer, packed(sample(tokenizer, "a", "b")))


def test_tokens_stand_over_their_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    one = sample(tokenizer, "a b\n", "é<|end|>", "c")
    assert shown(tokenizer, one, tokens=True).splitlines()[1:] == [
        "·a ·␣  ·b ·↵  ·",
        " 64 220 65 198",
        r"⟦\xc3·\xa9·<|end|>⟧c ·",
        " 127  102  258     66",
    ]
    assert shown(tokenizer, sample(tokenizer, "a", "b"), tokens=True).splitlines()[1:] == [
        "·a ⟦b ⟧",
        " 64 65",
    ]


def test_every_token_comes_once_and_in_order(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    every = list(range(len(tokenizer)))
    one = {"input_ids": every, "labels": [-100] * 100 + every[100:]}
    lines = shown(tokenizer, one, tokens=True).splitlines()[1:]
    assert [int(id) for line in lines[1::2] for id in line.split()] == every
    assert max(map(len, lines)) <= 40
    assert all(line.startswith("⟦") and line.endswith("⟧") for line in lines[-2::-2][:20])
    html = body(tokenizer, one)
    assert list(map(int, re.findall(r"<i>(\d+)</i></span>", html))) == every
    assert html.count('class="token on special"') == 64
    assert html.count('class="token on') == 220


def test_a_character_may_span_tokens_but_not_be_guessed(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = sample(tokenizer, "é", "日🎉")
    assert "\né⟦日🎉⟧\n" in shown(tokenizer, whole)
    assert "é<mark>日🎉</mark>" in body(tokenizer, whole)
    bytes_shown = re.findall(r"\\x..", shown(tokenizer, whole, tokens=True))
    assert "".join(bytes_shown) == "".join(f"\\x{byte:02x}" for byte in "é日🎉".encode())
    # What cuts a sample at max_length may cut a character: what was before it stays readable.
    cut = {key: ids[:-1] for key, ids in whole.items()}
    assert "é⟦日\ufffd" in shown(tokenizer, cut)
    assert "\ufffd" not in shown(tokenizer, cut, tokens=True)
    inside = {"input_ids": cut["input_ids"], "labels": [-100, *cut["input_ids"][1:]]}
    assert "\n\ufffd⟦\ufffd日" in shown(tokenizer, inside)
    labels = [-100] * 6 + cut["input_ids"][6:]
    assert "\né日\ufffd⟦\ufffd\ufffd⟧\n" in shown(tokenizer, {**cut, "labels": labels})


def test_byte_names_are_those_of_byte_level_bpe() -> None:
    assert set(preview.BYTES) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(preview.BYTES.values()) == list(range(256))
    assert bytes(preview.BYTES[char] for char in "ĠÃ©ĊŃ") == b" \xc3\xa9\n\xad"


def test_a_stretch_keeps_the_space_that_sentencepiece_drops() -> None:
    vocab = {"\u2581a": 0, "\u2581b": 1, "\u2581": 2}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="\u2581"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    one = {"input_ids": [0, 1, 1], "labels": [-100, 1, 1]}
    assert preview.marked(one, tokenizer) == "a⟦ b b⟧"
    assert shown(tokenizer, one, tokens=True).splitlines()[1] == "·a⟦␣b·␣b⟧"
    space = {"input_ids": [2, 0, 7], "labels": [-100] * 3}  # 7 is no token of it
    assert shown(tokenizer, space, tokens=True).splitlines()[1:] == ["·\u2581·␣a· ·", " 2 0  7"]


def test_what_a_terminal_would_obey_is_escaped(tokenizer: PreTrainedTokenizerBase) -> None:
    bad = "\x1b[31mred\x1b[0m\r\t\x07\x9b\u202e\u2028\x00 [bold]b[/bold] [/] :smile:"
    seen = r"\x1b[31mred\x1b[0m\r\t\x07\x9b\u202e\u2028\x00 [bold]b[/bold] [/] :smile:"
    assert shown(tokenizer, sample(tokenizer, bad, "c")).endswith(f"\n{seen}⟦c⟧\n")
    for how in ({"tokens": True}, {"tokens": True, "color": False}):
        printed = shown(tokenizer, sample(tokenizer, bad, bad), **how)
        assert not set(printed) & set("\x1b\r\t\x07\x9b\u202e\u2028\x00")
    assert preview.visible("👨\u200d👩 \ud800\U000e0041") == "👨\u200d👩 \\ud800\\U000e0041"


def test_colour_is_asked_for_or_of_the_terminal(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    green, one = "\x1b[38;5;231;48;5;22m", sample(tokenizer, "a", "b")
    assert shown(tokenizer, one, color=True).endswith(f"\na{green}b\x1b[0m\n")
    assert f"{green}b \x1b[0m" in shown(tokenizer, one, color=True, tokens=True)
    assert shown(tokenizer, one).endswith("\na⟦b⟧\n")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for no_color, ending in ((None, f"\na{green}b\x1b[0m\n"), ("1", "\na⟦b⟧\n")):
        monkeypatch.setenv("TERM", "xterm-256color")
        if no_color:
            monkeypatch.setenv("NO_COLOR", no_color)
        file = Terminal()
        preview.show([one], tokenizer, file=file)
        assert file.getvalue().endswith(ending)
        assert (green in file.getvalue()) is (no_color is None)
    assert green in shown(tokenizer, one, color=True)  # what is asked for wins over NO_COLOR
    assert "\x1b" not in shown(tokenizer, one, color=False)


def test_page_escapes_and_needs_nothing_from_outside(tokenizer: PreTrainedTokenizerBase) -> None:
    bad = "<script>alert('1')</script>&amp;\x1b[31m"
    html = page.page([sample(tokenizer, bad, f"x{bad}\n")], tokenizer, "</title>$body", None)
    assert "<title>&lt;/title&gt;$body</title>" in html
    assert not re.search(r"<script|<img|<link|https?:|url\(|@import|\son\w+=|\x1b", html)
    text = "&lt;script&gt;alert(&#x27;1&#x27;)&lt;/script&gt;&amp;amp;"
    text += r'<span class="esc">\x1b</span>[31m'
    end = '<span class="esc">↵</span>\n'
    assert f'<pre class="text">{text}<mark>x{text}{end}</mark></pre>' in html
    assert '<span class="token">&lt;<i>27</i></span>' in html
    assert '<span class="token on">↵<i>198</i></span><br></pre>' in html
    assert '<i style="flex:37"></i><i class=on style="flex:39"></i>' in html


def test_audit_is_shown_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    html = body(tokenizer, audit=AUDIT)
    for row in (
        "<tr><th>rows</th><td>4,000</td></tr>",
        "<tr><th>odd key</th><td>&lt;b&gt;</td></tr>",
        "<tr><th>seen</th><td>-</td></tr>",
        "<tr><th>files</th><td>a, b</td></tr>",
        "<tr><td></td><th>tokens</th><th>share</th></tr>",
        "<tr><th>prompt</th><td>123,018</td><td>-</td></tr>",
        "<tr><th>completion</th><td>16,835</td><td>12 %</td></tr>",
        "<tr><th>p50</th><td>35.25</td></tr>",
        '<tr><th>nothing trained</th><td class="ok">ok</td></tr>',
        '<tr><th>cut</th><td class="alert">too many</td></tr>',
        "<tr><th>max length</th><td>64</td></tr>",
    ):
        assert html.count(row) == 1, row
    assert re.findall(r"<h(\d)>(.*)</h", html) == [
        *[("2", "train"), ("3", "by role"), ("3", "lengths"), ("3", "checks")],
        *[("2", "eval"), ("3", "lengths")],
    ]


def test_histogram_is_a_chart_with_its_limit(tokenizer: PreTrainedTokenizerBase) -> None:
    first, second = body(tokenizer, audit=AUDIT).split("<svg")[1:]
    # 64 tokens span 520 units from 64 on, 900 samples span 140 from the axis at 170 up.
    bars = re.findall(
        r'class="bar" x="(.*)" y="(.*)" height="(.*)" width="(.*)"><title>(.*)</title>', first
    )
    assert bars == [
        ("64.0", "168.1", "1.9", "129.0", "0 to 16: 12"),
        ("194.0", "30.0", "140.0", "129.0", "16 to 32: 900"),
        ("324.0", "170.0", "0.0", "129.0", "32 to 48: 0"),
    ]
    assert '<line class="limit" x1="584.0"' in first and ">max_length 64</text>" in first
    assert second.count('class="bar"') == 1
    # 1,024 on the axis would leave 8 units of it to the samples.
    assert '<line class="limit" x1="584.0"' in second and ">max_length 1,024 →</text>" in second
    plain = body(tokenizer, audit={"lengths": {"histogram": [[0, 8, 0], [8, 16, 0]]}})
    assert plain.count('class="bar"') == 2 and 'class="limit"' not in plain
    assert ">max<" not in plain and ">16</text>" in plain
    assert "<tr><th>histogram</th><td>-</td></tr>" in body(tokenizer, audit={"histogram": []})
