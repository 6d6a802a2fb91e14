"""Which names sft uses of its libraries, and which of them are not listed: by its own source."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from support import ROOT
from upstream_names import UPSTREAM

import sft

LIBRARIES = {owner.partition(".")[0] for owner in UPSTREAM} - {"torch"}
# Modules below the top of a library that its documentation shows to users.
DOCUMENTED = {
    *("transformers.logging", "huggingface_hub.logging", "hydra.errors"),
    "hydra.core.config_store",
}
# Private by their spelling only: Python's own, and what sft itself composes.
PYTHONS = {"_exit", "_replace"}
PHRASES = {"_", "_defaults", "_offload", "_seed"}
DUNDERS = {"__compatible_ops__"}  # those that are not Python's


class Use(NamedTuple):
    """A name as a file of sft uses it.

    Attributes:
        name: The attribute, string, keyword or imported name.
        module: What it is imported from or looked up in; empty where only Python knows.
        foreign: It must be in ``UPSTREAM``.
    """

    name: str
    module: str
    foreign: bool


def sources() -> dict[str, str]:
    folders = [ROOT / "sft", ROOT / "hydra_plugins"]
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in paths}


def uses_of(text: str, inherited: frozenset[str] = frozenset()) -> Iterator[Use]:
    """Yield every name by which a file could use a library.

    Args:
        text: The file.
        inherited: Private names of the library classes that its classes derive from: they are the
            library's, although the file assigns or overrides them.
    """
    tree = ast.parse(text)
    aliases = dict(_aliases(tree))
    ours = set(_defined(tree)) - inherited
    nodes = list(ast.walk(tree))
    composed = {id(p) for node in nodes if isinstance(node, ast.JoinedStr) for p in node.values}
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield Use(alias.name, node.module, _is_internal(node.module, alias.name))
        elif isinstance(node, ast.Attribute):
            module = _module_of(node.value, aliases)
            private = _is_private(node.attr) and node.attr not in ours
            internal = id(node) not in inner and _is_internal(module, node.attr)
            yield Use(node.attr, module, private or internal)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if node.value.isidentifier():
                private = _is_private(node.value) and node.value not in PHRASES
                yield Use(node.value, "", private and id(node) not in composed)
        elif isinstance(node, ast.keyword) and node.arg:
            yield Use(node.arg, "", _is_private(node.arg))
        elif isinstance(node, ast.FunctionDef):
            yield Use(node.name, "", node.name in inherited)


def _is_private(name: str) -> bool:
    hidden = name.startswith("_") and not name.endswith("__")
    return name in DUNDERS or (hidden and name not in PYTHONS)


def _is_internal(module: str, name: str) -> bool:
    """Say whether an import is of something that a library does not show to its users."""
    if not module or module.split(".")[0] in ("sft", "__future__"):
        return False
    if any(_is_private(part) for part in (*module.split("."), name)):
        return True
    return module.partition(".")[0] in LIBRARIES and "." in module and module not in DOCUMENTED


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Map names in a file to what they were imported as."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (
                    (alias.asname or alias.name).partition(".")[0],
                    (alias.name if alias.asname else alias.name.partition(".")[0]),
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _module_of(node: ast.expr, aliases: dict[str, str]) -> str:
    """Name the module that an expression such as ``deepspeed.utils`` is; empty for all others."""
    if isinstance(node, ast.Name):
        found = aliases.get(node.id, "")
    elif isinstance(node, ast.Attribute):
        above = _module_of(node.value, aliases)
        found = f"{above}.{node.attr}" if above else ""
    else:
        found = ""
    return found if found == found.lower() else ""  # a class is no module


def _defined(tree: ast.Module) -> Iterator[str]:
    """Yield the private names that a file defines itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


def derived() -> list[type[Any]]:
    """List the classes of sft that derive from a library's."""
    found = []
    packages = [sft, importlib.import_module("hydra_plugins.sft_sweep")]
    for package in packages:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name.endswith(".__main__"):
                continue
            loaded = importlib.import_module(module.name)
            found += [
                kind
                for kind in vars(loaded).values()
                if inspect.isclass(kind) and kind.__module__ == module.name and bases(kind)
            ]
    return found


def bases(kind: type[Any]) -> list[type[Any]]:
    return [base for base in inspect.getmro(kind) if base.__module__.split(".")[0] in LIBRARIES]


@functools.cache
def inherited() -> dict[str, frozenset[str]]:
    """Name, by file, the private names of the library classes that its classes derive from."""
    found: dict[str, set[str]] = {}
    for kind in derived():
        names = found.setdefault(str(Path(inspect.getfile(kind)).relative_to(ROOT)), set())
        for base in bases(kind):
            names |= {name for name in vars(base) if _is_private(name)}
            names |= set(re.findall(r"\bself\.(_[a-z]\w*)", inspect.getsource(base)))
    return {file: frozenset(names) for file, names in found.items()}


def listed() -> set[tuple[str, str]]:
    return {
        (owner, entry.partition("(")[0]) for owner, entries in UPSTREAM.items() for entry in entries
    }


def unlisted(text: str, inherited: frozenset[str] = frozenset()) -> list[str]:
    """Name what a file uses of a library that ``UPSTREAM`` does not list."""
    full, names = listed(), {name for _, name in listed()}
    return sorted(
        {
            f"{use.module}.{use.name}".lstrip(".")
            for use in uses_of(text, inherited)
            if use.foreign
            and ((use.module, use.name) not in full if use.module else use.name not in names)
        }
    )


@functools.cache
def all_uses() -> dict[str, set[tuple[str, str]]]:
    return {file: {use[:2] for use in uses_of(text)} for file, text in sources().items()}


def users_of(owner: str, name: str) -> list[str]:
    """List the files that import a name from its owner, or else those that use the name at all."""
    uses = all_uses()
    importing = [file for file, found in uses.items() if (name, owner) in found]
    return importing or [f for f, found in uses.items() if any(name == used for used, _ in found)]
