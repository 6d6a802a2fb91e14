"""Options whose package is missing are refused before torch is imported, each with its package."""

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest
from transformers import trainer_optimizer
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK
from unit.test_checks import legal_config

from sft.config import no_effect, packages, upstream
from sft.config.checks import check
from sft.errors import ConfigError, Problem
from sft.training import build

# Packages that are always there, or that only come with special hardware.
OURS = {"torch", "transformers", "math"}


def imported(optim: str) -> set[str]:
    """List the packages that Transformers imports to make an optimizer."""
    handler = trainer_optimizer._OPTIMIZER_HANDLERS[optim]
    tree = ast.parse(inspect.getsource(handler))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level]
    return {str(node.module).partition(".")[0] for node in froms} - OURS


@pytest.mark.parametrize("optim", sorted(upstream.optimizer_names()))
def test_the_package_of_an_optimizer_is_the_one_that_transformers_imports(optim: str) -> None:
    package = packages.package_of(optim)
    assert imported(optim) == (set() if package is None else {package[0]})


def test_the_kernels_are_those_of_transformers() -> None:
    versions = {f"flash_attention_{number}" for number in (2, 3)}
    assert packages.ATTENTION.keys() == versions <= FLASH_ATTN_KERNEL_FALLBACK.keys()


@pytest.mark.parametrize(
    ("settings", "setting", "rule", "pip"),
    [
        ({"train__optim": "galore_adamw_8bit"}, "train.optim", "galore-torch", "galore-torch"),
        ({"train__optim": "schedule_free_sgd"}, "train.optim", "schedulefree", "schedulefree"),
        ({"train__optim": "stable_adamw"}, "train.optim", "torch-optimi", "torch-optimi"),
        ({"train__optim": "adamw_torch_8bit"}, "train.optim", "torchao", "torchao"),
        ({"train__optim": "lomo"}, "train.optim", "lomo-optim", "lomo-optim"),
        (
            {"model__attn_implementation": "flash_attention_2"},
            "model.attn_implementation",
            "flash-attn or kernels",
            "flash-attn",
        ),
        (
            {"train__extra": {"use_liger_kernel": True}},
            "train.extra.use_liger_kernel",
            "liger-kernel",
            "liger-kernel",
        ),
    ],
)
def test_a_missing_package_is_refused(
    settings: dict[str, Any], setting: str, rule: str, pip: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    (problem,) = check(legal_config(**settings))
    assert problem.setting.startswith(f"{setting}=")
    assert (problem.rule, problem.fix) == (f"needs the package {rule}", f"pip install {pip}")
    monkeypatch.setattr(packages, "installed", lambda name: True)
    assert check(legal_config(**settings)) == []


def test_a_kernel_of_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    config = legal_config(model__attn_implementation="kernels-community/flash-attn2")
    monkeypatch.setattr(packages, "installed", lambda name: name != "kernels")
    assert [problem.fix for problem in packages.problems(config)] == ["pip install kernels"]
    monkeypatch.setattr(packages, "installed", lambda name: True)
    assert list(packages.problems(config)) == []


def test_a_folder_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "galore_torch").mkdir()  # such as the folder wandb/ that wandb writes
    monkeypatch.syspath_prepend(tmp_path)
    assert not packages.installed("galore_torch") and packages.installed("torch")


def test_a_tracker_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    (problem,) = check(legal_config(tracker__wandb=True))
    rule, fix = "needs the package wandb", "pip install 'sft[wandb]'"
    assert problem == Problem("tracker=wandb", rule, fix)
    (problem,) = check(legal_config(train__extra={"report_to": ["comet_ml"]}))
    rule, fix = "needs the package comet_ml", "pip install comet_ml"
    assert problem == Problem("train.extra.report_to=comet_ml", rule, fix)


@pytest.mark.parametrize(
    ("name", "rule", "fix"),
    [
        ("mlflow", "would log the steps of a resumed run twice", "tracker=mlflow"),
        ("all", "a tracker must be named", "tracker=[tensorboard,wandb,mlflow,trackio]"),
    ],
)
def test_trackers_of_ours_are_not_left_to_transformers(name: str, rule: str, fix: str) -> None:
    (problem,) = check(legal_config(train__extra={"report_to": name}))
    assert rule in problem.rule and problem.fix == fix


def test_names_for_a_tracker_without_such_names_are_refused() -> None:
    config = legal_config(tracker__tensorboard=True, tracker__group="g")
    assert [(p.setting, p.fix) for p in no_effect.problems(config)] == [
        ("tracker.group=g", "tracker=wandb")
    ]


def test_offloading_activations_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config = legal_config(train__extra={"activation_offloading": True})
    assert check(config) == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"has no GPU\n    fix: train.gradient_checkpointing=tr"):
        build.require(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    build.require(config)
