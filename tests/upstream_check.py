"""Check a name of ``upstream_names.UPSTREAM`` against the installed library."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.metadata
import inspect
import textwrap
import warnings
from collections.abc import Iterator
from typing import Any

PACKAGES = {"hydra": "hydra-core"}  # distributions that are not named as their module is


def problem(owner: str, entry: str, files: str) -> str | None:
    """Check one entry of ``UPSTREAM`` against the installed library.

    Args:
        owner: A key of ``UPSTREAM``.
        entry: One of its names.
        files: The files of sft that use it.

    Returns:
        One sentence that says what is wrong, or None.
    """
    name, _, called = entry.partition("(")
    library = owner.partition(".")[0]
    version = importlib.metadata.version(PACKAGES.get(library, library))
    end = f"in {library} {version}; sft needs it in {files}"
    where = f"{owner.replace(':', '.')}.{name}"
    try:
        module, _, class_name = owner.partition(":")
        place = _resolved(module)
        place = getattr(place, class_name) if class_name else place
    except (ImportError, AttributeError):
        return f"{where} is gone {end}"
    if not _has(place, name):
        return f"{where} is gone {end}" if name not in _assigned(place) else None
    if not called:
        return None
    found = list(inspect.signature(getattr(place, name)).parameters.values())
    wrong = _mismatch(called.rstrip(")"), found[found[:1] != [] and found[0].name == "self" :])
    return f"{where} has changed {end}: {wrong}" if wrong else None


def _resolved(path: str) -> Any:
    """Import a module, or the attribute of one that acts as a module (``torch.ops.mkldnn``)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError:
            above, _, name = path.rpartition(".")
            if not above:
                raise
            return getattr(_resolved(above), name)


def _has(place: Any, name: str) -> bool:
    """Say whether a module or class defines a name, without calling a module's ``__getattr__``."""
    lazy = vars(place).get("__getattr__") if inspect.ismodule(place) else None
    if lazy is not None and name not in vars(place):
        return repr(name).replace("'", '"') in inspect.getsource(lazy)
    return hasattr(place, name)


def _mismatch(called: str, found: list[inspect.Parameter]) -> str | None:
    """Say why a function with these parameters cannot be called as ``UPSTREAM`` states."""
    positional, _, named = called.partition("*")
    first = [name.strip() for name in positional.split(",") if name.strip()]
    rest = [name.strip() for name in named.split(",") if name.strip()]
    names = [parameter.name for parameter in found]
    if names[: len(first)] != first:
        return f"it takes ({', '.join(names)}) instead of ({', '.join(first)}, ...)"
    if lacking := [name for name in rest if name not in names]:
        return f"it does not take {', '.join(lacking)}"
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [
        parameter.name
        for parameter in found
        if parameter.default is parameter.empty and parameter.kind not in free
    ]
    if more := [name for name in required if name not in first + rest]:
        return f"it now requires {', '.join(more)}"
    return None


@functools.cache
def _assigned(place: Any) -> frozenset[str]:
    """Name the parameters of a function, or what a module or a class and its bases assign."""
    if inspect.isfunction(place):
        return frozenset(inspect.signature(place).parameters)
    found: set[str] = set()
    for owner in [place] if inspect.ismodule(place) else inspect.getmro(place):
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
        except (OSError, TypeError):  # not written in Python
            continue
        names = set(_stored(tree))
        found |= names | {f"_{owner.__name__}{name}" for name in names if name.startswith("__")}
    return frozenset(found)


def _stored(tree: ast.AST) -> Iterator[str]:
    """Yield what code assigns: attributes, keys, and fields of a dataclass without a default."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict):
            for key in node.keys:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    yield key.value
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            if isinstance(node.slice.value, str):
                yield node.slice.value
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if node.value is None:
                yield node.target.id
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "setattr":
            if isinstance(node.args[1], ast.Constant):
                yield node.args[1].value
