"""How the modules of sft stand to one another: no circle of imports, private names in one file."""

import ast
import graphlib
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import sft

PACKAGE = Path(sft.__file__).parent

# Private names that more than one file touches, each with its reason.
SHARED = {
    "_evaluate": "training.timed times what the Trainer and training.resumable call",
    "_parameters": "merge.stream asks whether there are any: parameters(recurse=False) says so too",
}
DEEPSPEED_MARKS = {"ds_id", "ds_numel", "ds_shape", "ds_status", "ds_tensor"}


def modules() -> dict[str, str]:
    """Read every module's text, by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        *folders, name = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(folders if name == "__init__" else [*folders, name])] = path.read_text()
    return found


def imported(source: str) -> Iterator[str]:
    """Yield what is imported anywhere: at the top, in a function, for the type checker only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Map each module to those of the given modules that it imports."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        graph[module] = set()
        for name in imported(source):
            while name and name not in sources:  # of a function or class, its module
                name = name.rpartition(".")[0]
            graph[module] |= {name} - {"", module}
    return graph


def circle(graph: Mapping[str, set[str]]) -> list[str]:
    """Return the modules of one circle, each imported by the one before; empty: there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def test_no_circle_of_imports() -> None:
    graph = arrows(modules())
    assert len(graph) > 80 and sum(map(len, graph.values())) > 150
    assert circle(graph) == []


def test_the_tour_of_the_code_lists_every_wing_above_what_it_imports() -> None:
    contributing = (PACKAGE.parent / "CONTRIBUTING.md").read_text()
    tour = contributing.partition("```text\nsft/\n")[2].partition("\nhydra_plugins/")[0]
    wings = re.findall(r"^  (\w+)/ ", tour, re.MULTILINE)
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {*wings, "cli"} == folders
    listed = {name for line in tour.splitlines() for name in re.findall(r"\b\w+\.py\b", line)}
    assert listed >= {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    for module, others in arrows(modules()).items():
        _, wing, *rest = [*module.split("."), "", ""]
        if wing in wings and rest[0] != "__main__":
            for other in others:
                below = other.split(".")[1:2]
                if below and below[0] in wings:
                    assert wings.index(wing) <= wings.index(below[0]), (module, other)


@pytest.mark.parametrize(
    "back",
    [
        "from sft import a",
        "import sft.a",
        "def f():\n    from sft.a import A\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sft.a import A\n",
    ],
)
def test_a_circle_is_found(back: str) -> None:
    sources = {"sft": "", "sft.a": "from sft.b.c import C", "sft.b.c": "import sft.d"}
    assert circle(arrows({**sources, "sft.d": "import torch"})) == []
    found = circle(arrows({**sources, "sft.d": back}))
    assert found[0] == found[-1] and set(found) == {"sft.a", "sft.b.c", "sft.d"}


def test_every_target_of_an_injected_fault_exists() -> None:
    """A fault that is injected nowhere would let its test pass, or its benchmark wait."""
    files = [*PACKAGE.parent.glob("benchmarks/*.py"), *PACKAGE.parent.glob("tests/**/*.py")]
    faults = r"SIG[A-Z0-9]+:(sft\.[\w.]+):(?:before|after):"
    targets = {target for path in files for target in re.findall(faults, path.read_text())}
    assert {"sft.training.guard.Guard.on_step_end", "sft.checkpoint.weights.write"} < targets
    for target in sorted(targets):
        assert callable(pkgutil.resolve_name(target)), target


def private_names(source: str) -> tuple[set[str], set[str]]:
    """Return the private attributes that a file touches, and those among them it has not made."""
    touched, own = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(part, ast.Name):
                        own.add(part.id)
                    elif isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                        own.add(part.attr)
        if isinstance(node, ast.Attribute):
            touched.add(node.attr)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("attr"):
            touched |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    touched = {
        name
        for name in touched
        if name in DEEPSPEED_MARKS or (name.startswith("_") and not name.startswith("__"))
    }
    return touched, touched - own


def spread(sources: Mapping[str, str]) -> dict[str, list[str]]:
    """Map private names of others to the files that touch them, where there are several."""
    names = {module: private_names(source) for module, source in sources.items()}
    foreign = set().union(*(others for _, others in names.values()))
    touching = {
        name: sorted(module for module, (touched, _) in names.items() if name in touched)
        for name in foreign
    }
    return {name: files for name, files in touching.items() if len(files) > 1}


def test_a_private_attribute_of_a_library_is_touched_in_one_file() -> None:
    assert spread(modules()).keys() == SHARED.keys()


def test_a_private_attribute_in_two_files_is_found() -> None:
    mine = "class A:\n    def f(self):\n        self._own = 1\n        return self._own\n"
    assert spread({"a": mine, "b": mine, "c": "x._loss = 2; x.open"}) == {}
    for other in ("x._loss", "getattr(x, '_loss', None)", "class B:\n    _loss = 0\nB()._loss"):
        assert spread({"c": "x._loss = 2", "d": other}) == {"_loss": ["c", "d"]}
    assert spread({"c": "p.ds_id", "d": "hasattr(p, 'ds_id')"}) == {"ds_id": ["c", "d"]}
