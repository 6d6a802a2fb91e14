"""No bad input ends in a traceback, a hang, a write elsewhere, or code that runs.

``benchmarks/hostile_inputs.py`` runs all tables; here, inputs with files are sampled by a hash of
their names, a few of each table.
"""

import zlib
from pathlib import Path

import pytest

from hostile import case as one
from hostile import runs, tables
from hostile.case import Case

SAMPLED = 40  # one input of so many, in the tables whose inputs need a process each
WORDS_SAMPLED = 4  # and of those that are composed, which takes a quarter of a second each
WORDS = tables.in_process()
FORKED = tables.with_files()


def chosen(case: Case, of: int = SAMPLED) -> bool:
    """Choose inputs by their names, so that a new input does not change the choice of others."""
    return zlib.crc32(case.id.encode(errors="backslashreplace")) % of == 0


@pytest.fixture(scope="session")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the folder with the shared run."""
    return runs.build_kit(tmp_path_factory.mktemp("kit"))


def test_the_tables_hold_what_is_promised() -> None:
    every = [*WORDS, *FORKED]
    assert len({case.id for case in every}) == len(every) >= 750
    assert {case.command for case in every} == {
        *("train", "data", "generate", "merge", "prove", "import", "report", "runs")
    }
    assert len([case for case in FORKED if chosen(case)]) >= 4


@pytest.mark.parametrize("group", sorted({case.group for case in WORDS}))
def test_bad_words_are_refused(group: str) -> None:
    wrong = {}
    for case in WORDS:
        composes = case.command not in ("generate", "merge", "import", "report", "runs")
        if case.group == group and (not composes or chosen(case, WORDS_SAMPLED)):
            ended = one.run_here(case)
            if found := one.faults_of(case, ended):
                wrong[case.id] = (found, ended.stderr[-500:])
            elif followed := one.follow_fixes(case):
                wrong[case.id] = ([followed], "")
    assert not wrong


@pytest.mark.parametrize(
    "case", [case for case in FORKED if chosen(case)], ids=lambda case: case.id
)
def test_bad_files_are_refused(case: Case, kit: Path, tmp_path: Path) -> None:
    ended = one.run_confined(case, tmp_path / "input", kit)
    assert not one.faults_of(case, ended, tmp_path / "input"), ended.stderr[-2000:]
