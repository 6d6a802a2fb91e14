"""Show what becomes of other tools' keys: ``python scripts/import_coverage.py [--tool TOOL]``.

Without an option, it prints the table of docs/importing.md: what became of the keys of the
configurations in tests/foreign_configs.yaml. With ``--tool`` it prints all keys of a tool.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from sft.config.foreign import CONVERTED, DEFAULT, DIFFERS, NOT_OURS, UNKNOWN
from sft.config.foreign_common import LORA, TRAINING
from sft.config.names import TABLES
from sft.convert.convert import TOOLS, Result

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("same name", "other name", "differs", "default", "not ours", "unknown")


def counted(result: Result) -> Counter[str]:
    """Count the keys of a configuration by what became of them."""
    found: Counter[str] = Counter()
    kinds = {DIFFERS: "differs", DEFAULT: "default", NOT_OURS: "not ours", UNKNOWN: "unknown"}
    for line in result.conversion.lines:
        if line.given and line.outcome.kind == CONVERTED:
            leaf = line.key.rpartition(".")[2]
            is_same = leaf in {name.rpartition(".")[2] for name in line.outcome.settings}
            found["same name" if is_same else "other name"] += 1
        elif line.given:
            found[kinds[line.outcome.kind]] += 1
    return found


def table(results: Mapping[str, Result]) -> str:
    """Return the table of docs/importing.md."""
    lines = [f"| tool | configurations | keys | {' | '.join(COLUMNS)} | converted |"]
    lines.append("|---" * (len(COLUMNS) + 4) + "|")
    tools = {tool: [r for r in results.values() if r.tool == tool] for tool in TOOLS}
    for name, chosen in [*tools.items(), ("all", list(results.values()))]:
        found = sum(map(counted, chosen), Counter[str]())
        keys = sum(found.values())
        left = found["not ours"] + found["unknown"]
        cells = [TOOLS.get(name, name), len(chosen), keys, *(found[column] for column in COLUMNS)]
        lines.append(f"| {' | '.join(map(str, cells))} | {1 - left / keys:.0%} |")
    return "\n".join(lines) + "\n"


def keys_of(tool: str) -> str:
    """Return a table of all keys of a tool; shared ones are those of Transformers and PEFT."""
    shared = {**TRAINING, **LORA} if tool not in ("trl", "peft") else {}
    lines = ["| key | sft | |", "|---|---|---|"]
    for name, key in sorted(TABLES[tool].items()):
        if shared.get(name) != key:
            ours = f"`{key.ours}`" if key.ours else key.kind
            lines.append(f"| `{name}` | {ours} | {key.note} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", choices=sorted(TABLES))
    if tool := parser.parse_args().tool:
        sys.stdout.write(keys_of(tool))
        return
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "unit")]
    from test_import import CASES, imported

    results = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            results[name] = imported(case, Path())
    sys.stdout.write(table(results))


if __name__ == "__main__":
    main()
