"""Give every bad input of tests/hostile to its command, and print what each table came to.

    python benchmarks/hostile_inputs.py                    # all tables, 10 to 20 minutes
    python benchmarks/hostile_inputs.py adapters models    # some of them
    python benchmarks/hostile_inputs.py --words            # those that need no process of their own

A line is printed for each input that was met wrongly, with the end of what the command said; then a
table of counts. The exit code is 1 if there is one.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path.insert(0, str(TESTS))


def main(groups: list[str]) -> int:
    """Run the tables; return the number of inputs that were met wrongly."""
    from hostile import case as one
    from hostile import runs, tables

    counts: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    words_only = "--words" in groups
    groups = [group for group in groups if not group.startswith("-")]
    failed = 0
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        home = Path(folder)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ["SFT_CACHE_DIR"] = str(home / "cache")
        forked = [] if words_only else tables.with_files()
        kit = runs.build_kit(home / "kit") if forked else home
        for case in [*tables.in_process(), *forked]:
            if groups and case.group not in groups:
                continue
            here = home / "input" if case in forked else None
            began = time.monotonic()
            if here is None:
                ended = one.run_here(case)
                found = one.faults_of(case, ended)
                found += [said] if (said := one.follow_fixes(case)) else []
            else:
                ended = one.run_confined(case, here, kit)
                found = one.faults_of(case, ended, here)
                remove(here)
            seconds = time.monotonic() - began
            row = counts[case.group]
            row[0], row[1], row[2] = row[0] + 1, row[1] + bool(found), row[2] + seconds
            if found:
                failed += 1
                print(f"\n## {case.id}\n   {case.command} {list(case.words)} {dict(case.env)}")
                print(f"   {'; '.join(found)} (exit {ended.code}, {seconds:.1f} s)")
                print("   | " + ended.stderr[-700:].strip().replace("\n", "\n   | "), flush=True)
    print(f"\n{'table':24} {'inputs':>7} {'wrong':>6} {'seconds':>8}")
    for group, (inputs, wrong, seconds) in counts.items():
        print(f"{group:24} {inputs:7.0f} {wrong:6.0f} {seconds:8.1f}")
    total = [sum(row[i] for row in counts.values()) for i in range(3)]
    print(f"{'all':24} {total[0]:7.0f} {total[1]:6.0f} {total[2]:8.1f}")
    return failed


def remove(folder: Path) -> None:
    """Delete an input's folder, also where it has folders without permission."""
    for path, folders, _ in os.walk(folder):
        for name in folders:
            if not os.path.islink(os.path.join(path, name)):
                os.chmod(os.path.join(path, name), 0o755)
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
