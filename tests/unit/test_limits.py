"""A limit of time ends a loop of Python and a regular expression, and leaves other timers alone."""

import re
import signal
import time

import pytest

from sft.data import chat_template
from sft.data.chat_template import ChatTemplate
from sft.errors import ModelError
from sft.limits import OutOfTime, TimeLimit


def endless() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    "block", [endless, lambda: re.fullmatch(r"(([a-z._0-9])+)+!", "model.layers.0.self_attn.q")]
)
@pytest.mark.parametrize("often", [False, True])
def test_a_block_ends_when_its_time_is_over(block, often: bool) -> None:
    handler = signal.getsignal(signal.SIGALRM)
    for _ in range(2):
        with pytest.raises(OutOfTime), TimeLimit(0.05, often):
            block()
    with TimeLimit(60):  # the limits within have their own time, and this one goes on
        with pytest.raises(OutOfTime), TimeLimit(0.05, often):
            block()
    with TimeLimit(0.05, often):
        pass
    time.sleep(0.1)  # nothing rings after the block
    assert handler is signal.SIG_DFL or signal.getsignal(signal.SIGALRM) is handler


def test_another_timer_rings_when_it_would_have(monkeypatch: pytest.MonkeyPatch) -> None:
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, _: rang.append(number))
    left = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with TimeLimit(60):
            time.sleep(0.05)
        assert not rang and 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.15
        time.sleep(0.2)
        assert rang == [signal.SIGALRM]
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *left)


def test_a_chat_template_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from made_tokenizers import TINY, AutoTokenizer

    monkeypatch.setattr(chat_template, "LIMIT", 0.1)
    loops = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    template = ChatTemplate(AutoTokenizer.from_pretrained(TINY), loops)
    with pytest.raises(ModelError, match=r"took more than 0\.1 s for one conversation"):
        template.rendered([{"role": "user", "content": "a"}], None, False)
