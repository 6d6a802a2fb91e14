"""The states of all ranks' random generators in a checkpoint."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open

RANDOM = "random.safetensors"


def random_streams() -> dict[str, torch.Tensor]:
    """Return the states of this rank's random generators."""
    version, words, gauss = random.getstate()
    drawn: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = drawn
    assert (version, name) == (3, "MT19937")
    missing = float("nan")
    streams = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words),
        "python_gauss": torch.tensor(missing if gauss is None else gauss, dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss]),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
    }
    if torch.cuda.is_available():
        streams["cuda"] = torch.cuda.get_rng_state()
    return streams


def restore_random_streams(folder: Path, seed: int) -> None:
    """Restore this rank's generators, or seed new ones if the number of ranks has changed."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    with safe_open(folder / RANDOM, "pt") as file:
        keys = set(file.keys())
        if len({key.partition("/")[0] for key in keys}) != ranks:
            fresh = np.random.SeedSequence((seed, int(folder.name.split("-")[1]), rank))
            number = int(fresh.generate_state(1)[0])
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
            return
        own = {
            key.partition("/")[2]: file.get_tensor(key)
            for key in keys
            if key.startswith(f"rank{rank}/")
        }
    torch.set_rng_state(own["torch"])
    gauss = own["python_gauss"].item()
    random.setstate((3, tuple(own["python"].tolist()), None if math.isnan(gauss) else gauss))
    *words, position, has_gauss = own["numpy"].tolist()
    np.random.set_state(
        ("MT19937", np.array(words, np.uint32), position, has_gauss, own["numpy_gauss"].item())
    )
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
