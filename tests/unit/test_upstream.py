"""Names that sft takes from its libraries without a promise are listed, there, and unchanged."""

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from upstream_check import PACKAGES, problem
from upstream_names import UPSTREAM
from upstream_scan import bases, derived, inherited, sources, unlisted, users_of

from sft.config.upstream import package_dir

ENTRIES = [(owner, entry) for owner, entries in UPSTREAM.items() for entry in entries]


def test_every_name_is_there_and_takes_what_sft_passes() -> None:
    wrong, unused = [], []
    for owner, entry in ENTRIES:
        files = users_of(owner, entry.partition("(")[0])
        unused += [] if files else [f"sft no longer uses {entry} of {owner}: remove it"]
        wrong.append(problem(owner, entry, " and ".join(files)))
    assert len(ENTRIES) > 100
    assert not any(wrong) and not unused, "\n".join([*filter(None, wrong), *unused])


def test_every_private_name_in_sft_is_listed() -> None:
    found = [
        f"{file} uses {name}, which its library may change without notice: list it in UPSTREAM "
        "(tests/upstream_names.py), or do without it"
        for file, text in sources().items()
        for name in unlisted(text, inherited().get(file, frozenset()))
    ]
    assert not found, "\n".join(found)


def overrides() -> tuple[int, list[str]]:
    """Count the methods of sft that replace a library's, and say which take too little."""
    seen, wrong = 0, []
    for kind in derived():
        for name, method in vars(kind).items():
            stock = next((vars(base)[name] for base in bases(kind) if name in vars(base)), None)
            if name == "__init__" or not (inspect.isfunction(method) and inspect.isfunction(stock)):
                continue
            seen += 1
            own, theirs = (inspect.signature(each).parameters for each in (method, stock))
            lacking = [
                p.name for p in theirs.values() if p.name not in own and p.kind < p.VAR_KEYWORD
            ]
            if lacking and not any(p.kind is p.VAR_KEYWORD for p in own.values()):
                wrong.append(f"{kind.__qualname__}.{name} does not take {', '.join(lacking)}")
    return seen, wrong


def test_overrides_take_what_the_library_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that a release adds to a method of ours would be a TypeError in a run."""
    seen, wrong = overrides()
    assert seen > 15 and not wrong, "\n".join(wrong)
    more = lambda self, checkpoint, strict: None  # noqa: E731
    monkeypatch.setattr("transformers.trainer.Trainer._load_rng_state", more)
    assert overrides()[1] == ["ResumableTrainer._load_rng_state does not take strict"]


def test_masks_are_prepared_as_seven_values() -> None:
    """Ours returns as many: ``attention._preprocess``."""
    from transformers import masking_utils

    source = Path(inspect.getfile(masking_utils)).read_text(encoding="utf-8")
    function = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "_preprocess_mask_arguments"
    )
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return)]
    assert [len(value.elts) for value in returned if isinstance(value, ast.Tuple)] == [7, 7, 7]


def test_trl_ships_its_chat_templates() -> None:
    assert (package_dir("trl") / "chat_templates" / "qwen3.jinja").is_file()


@pytest.mark.parametrize(
    ("owner", "entry"),
    [
        ("transformers.trainer:Trainer", "_get_grad_norm(model, grad_norm)"),
        ("transformers.masking_utils", "sdpa_mask"),
        ("hydra.core.utils", "JobReturn"),
        ("transformers.modeling_utils:PreTrainedModel", "_supports_sdpa"),
    ],
)
def test_a_name_that_is_gone_is_said(
    owner: str, entry: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert entry in UPSTREAM[owner]
    module, _, kind = owner.partition(":")
    name = entry.partition("(")[0]
    monkeypatch.delattr(f"{module}.{kind}.{name}" if kind else f"{module}.{name}")
    files = " and ".join(users_of(owner, name))
    library = module.partition(".")[0]
    version = importlib.metadata.version(PACKAGES.get(library, library))
    assert files and problem(owner, entry, files) == (
        f"{owner.replace(':', '.')}.{name} is gone in {library} {version}; sft needs it in {files}"
    )


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("transformers.trainer:Trainer", "_tr_loss"),
        ("deepspeed.runtime.zero.partition_parameters", "ds_tensor"),
        ("deepspeed.ops", "__compatible_ops__"),
        ("transformers.utils.hub:cached_files", "_raise_exceptions_for_missing_entries"),
        ("torch.ops.mkldnn", "_linear_pointwise"),
        ("bitsandbytes.nn.modules:Int8Params", "SCB"),
    ],
)
def test_what_only_the_source_shows_is_found_there(owner: str, name: str) -> None:
    assert problem(owner, name, "FILE") is None
    said = problem(owner, f"{name}_renamed", "FILE")
    assert said is not None and said.endswith("; sft needs it in FILE") and " is gone in " in said


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (lambda s: None, "it takes (s) instead of (source_key, weight_renamings, ...)"),
        (
            lambda source_key, weight_renamings, meta, *, add, reverse: None,
            "it now requires meta, add",
        ),
        (lambda source_key, weight_renamings: None, "it does not take reverse"),
        (lambda weight_renamings, source_key: None, "it takes (weight_renamings, source_key) in"),
        (lambda source_key, weight_renamings, more=1, reverse=False, **rest: None, None),
    ],
)
def test_a_changed_signature_is_said(
    changed: Any, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = "transformers.core_model_loading"
    monkeypatch.setattr(f"{owner}.rename_source_key", changed)
    entry = "rename_source_key(source_key, weight_renamings, *, reverse)"
    said = problem(owner, entry, "sft/merge/base_files.py")
    if reason is None:
        assert said is None
    else:
        version = importlib.metadata.version("transformers")
        start = f"{owner}.rename_source_key has changed in transformers {version}; "
        assert said is not None and said.startswith(
            f"{start}sft needs it in sft/merge/base_files.py: "
        )
        assert reason in said


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import torch\ntorch.ops.aten._scaled_mm(1)", "torch.ops.aten._scaled_mm"),
        ("def f(trainer):\n    trainer._secret = 1", "_secret"),
        (
            "def f(model):\n    return getattr(model, '_supports_flex_attn', False)",
            "_supports_flex_attn",
        ),
        (
            "from peft.utils.save_and_load import get_peft_model_state_dict",
            "peft.utils.save_and_load.get_peft_model_state_dict",
        ),
        (
            "import deepspeed\ndeepspeed.runtime.utils.see_memory_usage('x')",
            "deepspeed.runtime.utils.see_memory_usage",
        ),
        ("from torch._dynamo import reset", "torch._dynamo.reset"),
        ("def f(load):\n    return load('x', _commit_hash=None)", "_commit_hash"),
        (
            "class Trainer(SFTTrainer):\n    def _maybe_log_save_evaluate(self): ...",
            "_maybe_log_save_evaluate",
        ),
    ],
)
def test_a_name_that_is_not_listed_is_found(text: str, name: str) -> None:
    assert unlisted(text, frozenset({"_maybe_log_save_evaluate"})) == [name]


def test_names_of_sft_itself_are_no_librarys() -> None:
    text = "from transformers import Trainer\nclass A:\n    def _f(self): self._x = self._f()\n"
    assert unlisted(text) == []


@pytest.mark.parametrize("module", ["train", "data", "merge", "generate"])
@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_refused_before_torch_loads(module: str, platform: str) -> None:
    code = (
        f"import runpy, sys; sys.platform = {platform!r}; sys.modules['torch'] = None\n"
        "sys.modules['fcntl'] = None\n"
        f"runpy.run_module('sft.{module}', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"error: sft runs on Linux only, and this is {platform}\n"
        "    fix: a Linux machine or container; on Windows, WSL 2\n"
    )
