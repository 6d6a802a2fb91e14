"""Compile locks of the dead are removed; of the libraries' messages, only the known are hidden."""

import gc
import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from sft import environment

HOLD = """
import sys
from pathlib import Path
from sft.environment import free_compile_locks
free_compile_locks(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_compile_locks_of_the_dead_are_removed(tmp_path: Path) -> None:
    lock = tmp_path / "cpu_adam" / "lock"
    lock.parent.mkdir()
    lock.touch()
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None and first.stdout.readline() == "held\n"
    assert not lock.exists()
    lock.touch()  # the first compiles now
    second = subprocess.run(command, input="", capture_output=True, text=True, check=True)
    assert second.stdout == "held\n"
    assert lock.exists()
    first.kill()
    first.wait()
    subprocess.run(command, input="", capture_output=True, check=True)
    assert not lock.exists()


def test_only_known_messages_are_hidden(caplog: pytest.LogCaptureFixture) -> None:
    from sft import environment

    environment.prepare()
    for name, message in environment.SILENCED.items():
        package, *path = name.split(".")
        source = Path(str(importlib.metadata.distribution(package).locate_file(package)))
        text = source.joinpath(*path).with_suffix(".py").read_text()
        assert message in text, f"{name} says it in other words now"
        logging.getLogger(name).warning(f"[RANK 0] {message}")  # as Accelerate says it
        logging.getLogger(name).warning("new to us")
    assert [record.getMessage() for record in caplog.records] == ["new to us"] * 3


def test_a_later_run_may_set_the_precision_of_products_anew() -> None:
    """Transformers caches the call that sets it, and the end of a run restores the default."""
    import torch
    from transformers.utils.import_utils import enable_tf32

    from sft import environment

    usual = torch.backends.fp32_precision  # type: ignore[attr-defined]
    for _ in range(2):
        with environment.prepared(distributed=False):
            enable_tf32(True)
            assert torch.backends.fp32_precision == "tf32"  # type: ignore[attr-defined]
        assert torch.backends.fp32_precision == usual  # type: ignore[attr-defined]


def test_what_a_launcher_tells_is_read() -> None:
    from sft import process

    assert (process.launched({}), process.restarts({}), process.local_rank({})) == (False, 0, 0)
    told = {"RANK": "5", "LOCAL_RANK": "1", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert (process.launched(told), process.restarts(told), process.local_rank(told)) == (
        True,
        2,
        1,
    )


def test_the_bar_of_loading_weights_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging as bars

    from sft import library_bars, progress

    before = bars.set_tqdm_hook(library_bars._ours)
    try:
        monkeypatch.setattr(progress, "_open", [])
        loading = iter(bars.tqdm({"a": 1, "b": 2}.items(), desc="Loading weights"))
        assert next(loading) == ("a", 1)
        [shown] = progress._open
        assert (shown.what, shown.total, shown.unit) == ("loading the weights", 2, "tensors")
        assert list(loading) == [("b", 2)] and shown.done == 2 and not progress._open
        assert isinstance(bars.tqdm(total=3), bars.EmptyTqdm)
        assert isinstance(bars.tqdm([1], disable=True), bars.EmptyTqdm)
    finally:
        bars.set_tqdm_hook(before)


@pytest.mark.parametrize("alone", [True, False])
def test_only_a_process_of_a_command_excludes_what_it_imports(
    alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook's own models must stay under the collector."""
    monkeypatch.setattr(environment, "ALONE", alone)
    monkeypatch.delitem(sys.modules, "trl", raising=False)
    gc.unfreeze()
    try:
        with environment.importing():
            assert gc.isenabled() is not alone
        assert gc.isenabled() and (gc.get_freeze_count() > 10_000) is alone
    finally:
        gc.unfreeze()


def test_the_collector_is_as_before_after_the_block() -> None:
    from sft.environment import heap_frozen

    gc.unfreeze()  # what conftest.py has frozen
    before = gc.isenabled(), gc.get_freeze_count() > 0
    for collect_new in (True, False):
        with pytest.raises(KeyError), heap_frozen(collect_new=collect_new):
            assert gc.isenabled() is collect_new and gc.get_freeze_count() > 10_000
            raise KeyError
        assert (gc.isenabled(), gc.get_freeze_count() > 0) == before == (True, False)
