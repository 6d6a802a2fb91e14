"""What every test shares."""

import pytest


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take away what a surrounding torchrun or sweep would say about ranks."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "SFT_ERROR_FILE"):
        monkeypatch.delenv(name, raising=False)
