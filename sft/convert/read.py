"""Read a configuration of another tool: YAML, JSON, or the calls of a Python script."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from sft.config.plain import parse_json
from sft.config.yaml_files import require_small
from sft.errors import ConfigError, Problem

LARGEST = 1 << 18  # bytes; a configuration has some thousands
# The calls of a script whose keywords are read, and where their keys belong.
CALLS = {
    "load_dataset": "load_dataset.",
    "AutoModelForCausalLM.from_pretrained": "from_pretrained.",
    "SFTConfig": "",
    "TrainingArguments": "",
    "LoraConfig": "LoraConfig.",
    "BitsAndBytesConfig": "BitsAndBytesConfig.",
    "FastLanguageModel.from_pretrained": "FastLanguageModel.",
    "FastLanguageModel.get_peft_model": "get_peft_model.",
    "SFTTrainer": "SFTTrainer.",
    "train_on_responses_only": "train_on_responses_only.",
}
# The names of their arguments without a keyword, of which the first may be an object.
ARGUMENTS = {
    "": ("output_dir",),
    "load_dataset.": ("path", "name"),
    "from_pretrained.": ("model_name_or_path",),
    "FastLanguageModel.": ("model_name",),
    "SFTTrainer.": ("model",),
}
# Arguments that are objects of the script, which other calls describe.
OBJECTS = {"model", "args", "peft_config", "train_dataset", "quantization_config", "tokenizer"}
OBJECTS |= {"processing_class", "eval_dataset"}
EXPRESSION = "its value is an expression of the script, which is not run: write it yourself"
ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Mult: operator.mul,
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
BUILDERS = ("json", "csv", "parquet", "arrow", "text")  # of Datasets, for local files


@dataclass
class Source:
    """A configuration as it was read.

    Attributes:
        path: Its file.
        keys: Its keys and values, in the order of the file.
        unread: Why a key of a script was not read, by key.
        calls: The calls of a script whose keywords were read.
    """

    path: Path
    keys: dict[str, Any]
    unread: dict[str, str] = field(default_factory=dict)
    calls: set[str] = field(default_factory=set)


class _Loader(yaml.SafeLoader):
    """YAML without tags that make objects, with numbers such as 1e-4, without duplicate keys."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _refuse(path: Path | str, rule: str, fix: str) -> ConfigError:
    return ConfigError([Problem(str(path), rule, fix)])


def read(file: str) -> Source:
    """Read a configuration; no code runs and no variable of the environment is expanded.

    Raises:
        ConfigError: The file is missing, too large, damaged, or holds no keys.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        rule = "is a folder" if path.is_dir() else "there is no such file"
        names = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
        close = get_close_matches(path.name, names, 1)
        fix = f"did you mean {path.parent / close[0]}?" if close and not path.is_dir() else ""
        raise _refuse(file, rule, fix or f"give a path that exists, from {Path.cwd()}")
    if path.stat().st_size > LARGEST:
        rule = f"has {path.stat().st_size:,} bytes, and a configuration at most {LARGEST:,}"
        raise _refuse(file, rule, "give the YAML that the other tool trains with")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise _refuse(file, "is not text in UTF-8", "give a YAML, JSON or Python file") from error
    if path.suffix == ".py":
        return _of_script(path, text)
    values = _json(path, text) if path.suffix == ".json" else _yaml(path, text)
    if not isinstance(values, dict) or not values:
        rule = "holds no keys: it must be a mapping, such as base_model: NAME"
        raise _refuse(file, rule, "give the YAML that the other tool trains with")
    return Source(path, {str(key): value for key, value in values.items()})


def _json(path: Path, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise _refuse(path, f"is not valid JSON: {error}", "correct the file") from error


def _yaml(path: Path, text: str) -> Any:
    try:
        root = yaml.compose(text, Loader=_Loader)
        require_small(root)
        for first, again in _duplicates(root):
            rule = f"{again.value} is given in line {first.start_mark.line + 1} already"
            raise _refuse(
                f"{path}:{again.start_mark.line + 1}", rule, "keep one, as most tools the last"
            )
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise _refuse(place, f"is not plain YAML: {error.problem}", "correct this line") from error
    except RecursionError as error:
        raise _refuse(path, "is nested too deeply", "correct the file") from error
    except (yaml.YAMLError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise _refuse(path, f"cannot be read: {reason}", "correct the file") from error


def _duplicates(node: yaml.Node | None) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Yield the keys that a mapping has twice, within other mappings too."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    yield seen[key.value], key
                seen[key.value] = key
            yield from _duplicates(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _duplicates(item)


def _of_script(path: Path, text: str) -> Source:
    """Read the keywords of the calls of a script, without running it."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise _refuse(path, f"is not valid Python: {error}", "give the script itself") from error
    nodes = list(ast.walk(tree))
    stored = [n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
    stored += [node.arg for node in nodes if isinstance(node, ast.arg)]
    constants = {
        node.targets[0].id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and stored.count(node.targets[0].id) == 1
    }
    source = Source(path, {})
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    for node in sorted(calls, key=lambda node: (node.lineno, node.col_offset)):
        name = ast.unparse(node.func)
        call = next((call for call in CALLS if f".{name}".endswith(f".{call}")), None)
        if call is None:
            continue
        source.calls.add(call)
        names = ARGUMENTS.get(CALLS[call], ())
        given = [ast.keyword(name, value) for name, value in zip(names, node.args, strict=False)]
        for keyword in [*given, *node.keywords]:
            for each in _unpacked(keyword, constants):
                _keyword(source, CALLS[call], each, constants)
    _name_rows(source)
    if not source.keys and not source.unread:
        rule = f"has no call of {', '.join(CALLS)} with keywords"
        raise _refuse(path, rule, "write the keywords into a YAML file, one per line")
    return source


def _unpacked(keyword: ast.keyword, constants: dict[str, ast.expr]) -> list[ast.keyword]:
    """Return the keywords of ``**{...}``, if the keys are constants; else the keyword itself."""
    node: ast.expr | None = keyword.value
    if isinstance(node, ast.Name):
        node = constants.get(node.id)
    if keyword.arg is None and isinstance(node, ast.Dict):
        names = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
        if all(isinstance(name, str) for name in names):
            pairs = zip(names, node.values, strict=True)
            return [ast.keyword(str(name), value) for name, value in pairs]
    if keyword.arg is None and isinstance(node, ast.Call) and ast.unparse(node.func) == "dict":
        if not node.args:
            return node.keywords
    return [keyword]


def _keyword(
    source: Source, prefix: str, keyword: ast.keyword, constants: dict[str, ast.expr]
) -> None:
    key = f"{prefix}{keyword.arg or '**' + ast.unparse(keyword.value)}"
    node = keyword.value
    try:
        value = _constant(node, constants)
    except (ValueError, TypeError, MemoryError, RecursionError, ArithmeticError):
        if keyword.arg not in OBJECTS and key not in source.keys:
            source.unread[key] = EXPRESSION
        return
    if source.keys.setdefault(key, value) != value:
        source.unread[key] = f"line {node.lineno} gives another value: the first one is converted"


def _constant(node: ast.expr, constants: dict[str, ast.expr]) -> Any:
    """Return the value of a literal, a named one, or a sum, product and so on of numbers."""
    if isinstance(node, ast.Name) and node.id in constants:
        others = {name: value for name, value in constants.items() if name != node.id}
        return _constant(constants[node.id], others)
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        left, right = _constant(node.left, constants), _constant(node.right, constants)
        if all(isinstance(value, int | float) for value in (left, right)):
            return ARITHMETIC[type(node.op)](left, right)
    is_name = re.fullmatch(r"(torch|TaskType)\.\w+", text := ast.unparse(node))
    return text if is_name else ast.literal_eval(node)


def _name_rows(source: Source) -> None:
    """Name the arguments of load_dataset, and the model, as ``trl sft`` names them."""
    names = {"path": "dataset_name", "name": "dataset_config", "split": "dataset_train_split"}
    files = source.keys.pop("load_dataset.data_files", None)
    if isinstance(files, dict) and len(files) == 1:
        files = next(iter(files.values()))
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    is_local = source.keys.get("load_dataset.path") in BUILDERS
    if isinstance(files, str) and is_local:
        source.keys["load_dataset.path"] = files
    elif files is not None:
        source.unread["load_dataset.data_files"] = "dataset.path is one file, folder or pattern"
    if is_local and not isinstance(files, str):
        del source.keys["load_dataset.path"]
    renamed = {f"load_dataset.{name}": key for name, key in names.items()}
    renamed |= {
        "from_pretrained.model_name_or_path": "model_name_or_path",
        "SFTTrainer.model": "model_name_or_path",
    }
    source.keys = {renamed.get(key, key): value for key, value in source.keys.items()}
