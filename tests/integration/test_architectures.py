"""A sample of families trains one step exactly as Transformers and PEFT do, merges and answers.

The whole table is made by benchmarks/architectures.py, which these tests call.
"""

from pathlib import Path

import architectures
import pytest
from architectures_page import PARTS, total

# What a family stands for, and whether its rows are joined by default on a CPU.
SAMPLE = {
    "llama": ("dense", True),
    "hyperclovax": ("custom scaling", True),
    "gemma3_text": ("sliding windows", True),
    "gemma4_text": ("layers of different shapes", True),
    "llama4_text": ("chunks", False),
    "mixtral": ("experts", True),
    "granitemoe": ("experts under other names", True),
    "qwen2_moe": ("a shared expert", True),
    "afmoe": ("an adapter on a router's parameter", True),
    "deepseek_v32": ("an indexer", False),
    "lfm2": ("convolutions", False),
    "qwen3_next": ("delta rule and attention", False),
    "granitemoehybrid": ("states and experts", False),
    "rwkv": ("a state, without attention masks", False),
}


@pytest.mark.parametrize("kind", SAMPLE)
def test_family_is_exact(kind: str, tmp_path: Path) -> None:
    result = architectures.compare(kind, "fp32", tmp_path, ways=("default",))
    found = {part: result[part] for part in PARTS if part in result}
    assert total(result) == "exact", found
    assert {part for part in found if "figure" in found[part]} >= {"default", "eval", "answers"}
    assert result["joined"] is SAMPLE[kind][1]


def test_what_is_not_causal_is_refused_by_name(tmp_path: Path) -> None:
    result = architectures.compare("xlm", "fp32", tmp_path, ways=("default",))
    assert total(result) == "refused"
    assert result["default"]["message"].startswith("xlm is not causal")
