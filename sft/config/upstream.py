"""Read the setting names that the installed libraries accept from their source, without import.

Importing TRL takes seconds; parsing the file that defines ``SFTConfig`` takes milliseconds and
gives the names of the installed version, which a list of our own might not.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path


def package_dir(package: str) -> Path:
    """Locate an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{package} is not installed: pip install sft")
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _module(package: str, file: str) -> ast.Module:
    return ast.parse((package_dir(package) / file).read_text(encoding="utf-8"))


@functools.cache
def field_names(package: str, file: str, class_name: str) -> frozenset[str]:
    """List the annotated fields of a class, with the aliases that pydantic fields declare."""
    names = {
        node.target.id
        for node in _class(package, file, class_name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    public = {name for name in names if not name.startswith("_")}
    return frozenset(public | {*field_aliases(package, file, class_name).values()})


@functools.cache
def field_aliases(package: str, file: str, class_name: str) -> dict[str, str]:
    """Map the fields of a pydantic class to the aliases that they declare."""
    return {
        node.target.id: str(keyword.value.value)
        for node in _class(package, file, class_name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if isinstance(node.value, ast.Call)
        for keyword in node.value.keywords
        if keyword.arg == "alias" and isinstance(keyword.value, ast.Constant)
    }


@functools.cache
def init_names(package: str, file: str, class_name: str) -> frozenset[str]:
    """List the parameters of a class's ``__init__``."""
    for node in _class(package, file, class_name).body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return frozenset(arg.arg for arg in node.args.args[1:] + node.args.kwonlyargs)
    raise LookupError(f"{package}/{file}: {class_name} has no __init__")


@functools.cache
def enum_values(package: str, file: str, class_name: str) -> dict[str, str]:
    """Map the members of a string enumeration to their values."""
    return {
        node.targets[0].id: str(node.value.value)
        for node in _class(package, file, class_name).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }


def optimizer_names() -> frozenset[str]:
    """Return every legal value of ``optim``."""
    return frozenset(enum_values("transformers", "training_args.py", "OptimizerNames").values())


def scheduler_names() -> frozenset[str]:
    """Return every legal value of ``lr_scheduler_type``."""
    return frozenset(enum_values("transformers", "trainer_utils.py", "SchedulerType").values())


@functools.cache
def scheduler_kwargs(name: str) -> dict[str, bool] | None:
    """Return the ``lr_scheduler_kwargs`` of a schedule, and whether each is required.

    Returns:
        Argument: required; None if the schedule accepts any keyword.
    """
    if name in ("constant", "constant_with_warmup"):
        return {}  # get_scheduler does not pass lr_scheduler_kwargs to these
    members = enum_values("transformers", "trainer_utils.py", "SchedulerType")
    functions: dict[str, str] = {}
    nodes: dict[str, ast.FunctionDef] = {}
    for node in _module("transformers", "optimization.py").body:
        if isinstance(node, ast.FunctionDef):
            nodes[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                if isinstance(key, ast.Attribute) and isinstance(value, ast.Name):
                    functions[members[key.attr]] = value.id
    parameters = nodes[functions[name]].args
    if parameters.kwarg:
        return None
    filled_in = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    num_required = len(parameters.args) - len(parameters.defaults)
    return {
        arg.arg: position < num_required
        for position, arg in enumerate(parameters.args)
        if arg.arg not in filled_in
    }


def _class(package: str, file: str, class_name: str) -> ast.ClassDef:
    for node in _module(package, file).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return node
    raise LookupError(f"{package}/{file} defines no class {class_name}")


def sft_config_names() -> frozenset[str]:
    """Return the names of all fields of trl.SFTConfig, inherited fields included."""
    return (
        field_names("trl", "trainer/sft_config.py", "SFTConfig")
        | field_names("trl", "trainer/base_config.py", "_BaseConfig")
        | field_names("transformers", "training_args.py", "TrainingArguments")
    )


def lora_config_names() -> frozenset[str]:
    """Return the names of all fields of peft.LoraConfig, inherited fields included."""
    return (
        field_names("peft", "tuners/lora/config.py", "LoraConfig")
        | field_names("peft", "config.py", "PeftConfig")
        | field_names("peft", "config.py", "PeftConfigMixin")
    )


def bnb_config_names() -> frozenset[str]:
    """Return the names of all parameters of transformers.BitsAndBytesConfig."""
    return init_names("transformers", "utils/quantization_config.py", "BitsAndBytesConfig")


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """Return the name that is most similar to a mistyped name; "" if none is similar enough."""
    spelled = {item.lower(): item for item in sorted(known)}
    close = difflib.get_close_matches(name.lower(), spelled, n=1, cutoff=cutoff)
    return spelled[close[0]] if close else ""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Suggest the legal name that is most similar to a mistyped name."""
    close = closest(name, known)
    return f"did you mean {close}?" if close else "remove it"
