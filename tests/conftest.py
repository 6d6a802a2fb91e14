"""What every test shares."""

import gc
import os
import signal
import tempfile

import pytest
import warm_python

# Before anything imports torch. Two workers with two threads each, on two cores, mostly wait for
# one another, and a thread that waits keeps its core: tests took up to ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"
# Prepared data of the tests, apart from the user's; processes that tests start inherit it.
os.environ["SFT_CACHE_DIR"] = tempfile.mkdtemp(prefix="sft-cache-")
# What a shell starts in the background ignores interrupts, and so would every child of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Let the workers of pytest-xdist share a server, which imports while they collect."""
    if config.getoption("numprocesses", None):
        warm_python.start()


def pytest_collection_finish() -> None:
    """Keep the libraries out of collections of garbage: each run asks for two, of 0.4 seconds."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what a surrounding torchrun or sweep would say about ranks."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SFT_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def warm_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchrun start ranks that need not import the libraries."""
    monkeypatch.setenv("PYTHON_EXEC", warm_python.executable())
