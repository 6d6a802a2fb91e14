"""The config groups, their options, and the suggestion for an option that does not exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sft.config import upstream
from sft.config.paths import CONF_DIR
from sft.config.yaml_files import loaded
from sft.errors import Problem

# Names that other tools use for an option of ours.
MEANT = {
    ("quantization", "4bit"): "quantization=nf4",
    ("quantization", "int4"): "quantization=nf4",
    ("quantization", "8bit"): "quantization=int8",
    ("lora", "full"): "lora=none",
}
SEVERAL = ("tracker", "profile")  # groups of which several options may be chosen: tracker=[A,B]
# Hydra's groups of plugins: the class that sft uses, why no other, and the fix.
PLUGINS = {
    "launcher": (
        "hydra_plugins.sft_sweep.torchrun_launcher.TorchrunLauncher",
        "only sft's own launcher trains the trials of a sweep; this one would train nothing",
        "hydra/launcher=torchrun, or leave it out",
    ),
    "sweeper": (
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "sft supports only the sweeper that tries all combinations of the given values",
        "hydra/sweeper=basic, or leave it out",
    ),
}
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")


def groups(config_dir: str | None) -> dict[str, set[str]]:
    """Return the options of each config group: sft's own and those in ``config_dir``."""
    found: dict[str, set[str]] = {}
    for root in (CONF_DIR, *([Path(config_dir)] if config_dir else [])):
        for file in root.rglob("*.yaml"):
            group = file.parent.relative_to(root).as_posix()
            if group != ".":
                found.setdefault(group, set()).add(file.stem)
    return found


def config_dir_problems(config_dir: str | None) -> Iterator[Problem]:
    """Check the folder of the user's own options."""
    if config_dir is None:
        return
    root = Path(config_dir)
    if not root.is_dir():
        yield Problem(f"--config-dir {config_dir}", "there is no such folder", "--config-dir DIR")
    for file in sorted(root.rglob("*.yaml")):
        name = file.relative_to(root)
        if (CONF_DIR / name).is_file():
            yield Problem(
                f"--config-dir {config_dir}",
                f"{CONF_DIR / name} would be used instead of your {file}",
                f"rename it, for example to {name.with_stem(f'my-{name.stem}')}",
            )
        try:
            loaded(file)
        except Exception as error:  # a YAML error, or bytes that are not text
            reason = " ".join(str(error).split())
            yield Problem(
                f"--config-dir {config_dir}", f"{file}: {reason}", "correct the YAML file"
            )


def plugin_problems(hydra: Any) -> Iterator[Problem]:
    """Refuse a launcher or sweeper of Hydra with which a sweep would not train its trials.

    Args:
        hydra: The section ``hydra`` of the composed config.
    """
    for kind, (name, rule, fix) in PLUGINS.items():
        used = OmegaConf.select(hydra[kind], "_target_") if hydra[kind] else None
        if used != name:
            option = hydra.runtime.choices[f"hydra/{kind}"]
            yield Problem(f"hydra/{kind}={option} ({used})", rule, fix)
    batch = OmegaConf.select(hydra, "sweeper.max_batch_size")
    if batch is not None:
        rule = "would divide the sweep, and a trial that fails would end it"
        yield Problem(f"hydra.sweeper.max_batch_size={batch}", rule, "leave it out")
    for section in (*PLUGINS, "callbacks", "hydra_logging", "job_logging"):
        # What is given to a plugin may name the maker of another object.
        own = ["_target_"] if section in PLUGINS else []
        given = [key for key in hydra[section] or {} if key not in own]
        if given and (maker := _maker(OmegaConf.masked_copy(hydra[section], given))):
            rule = f"makes Hydra call {maker}, and settings run no code"
            yield Problem(f"hydra.{section}", rule, f"remove hydra.{section}")
    for name in ("sweep.dir", "sweep.subdir", "run.dir"):
        section, _, leaf = name.partition(".")
        place = OmegaConf.to_container(hydra[section], resolve=False)[leaf]  # type: ignore[index,call-overload]
        if place == "":
            yield Problem(f"hydra.{name}=", "must not be empty", f"hydra.{name}=DIR")
        if "://" in str(place):
            rule = "must be a local path: sft writes to no URL"
            yield Problem(f"hydra.{name}={place}", rule, f"hydra.{name}=PATH on this machine")


def _maker(node: Any) -> str | None:
    """Return what a section names as the maker of an object, which would be called."""
    for key in node if OmegaConf.is_dict(node) else range(len(node)):
        try:
            value = node[key]  # an interpolation is resolved, as Hydra would
        except OmegaConfBaseException:  # a value that only a started job has
            continue
        text = str(value)
        if key in ("_target_", "()") or (key == "class" and not text.startswith("logging.")):
            return text
        # The logging module imports what follows ext://.
        if text.startswith("ext://") and text not in STREAMS:
            return text
        if OmegaConf.is_config(value) and (found := _maker(value)):
            return found
    return None


def missing_plugin(reason: str) -> Problem | None:
    """Return the problem for a launcher or sweeper that is not installed.

    Args:
        reason: Hydra's message.
    """
    found = re.search(r"'hydra/(launcher|sweeper)/([^']+)'", reason)
    if found is None:
        return None
    _, rule, fix = PLUGINS[found[1]]
    return Problem(f"hydra/{found[1]}={found[2]}", rule, fix)


def no_option(group: str, option: str, known: set[str]) -> Problem:
    """Return the problem for an option that its group does not have, with a suggestion."""
    hint = upstream.did_you_mean(option, known)
    rule = f"{group} has no option {option}; it has {', '.join(sorted(known))}"
    if option == "null" and "none" in known:
        hint = f"{group}=none"
    elif f"stage{option}" in known:
        hint = f"{group}=stage{option}"
    elif (group, option) in MEANT:
        hint = MEANT[group, option]
    elif group == "model" and option.startswith((".", "/", "~")) and not Path(option).is_dir():
        rule = f"there is no folder {option}; {rule}"
        hint = "model=hf model.name_or_path=FOLDER"
    elif "/" in option and group == "model":
        hint = f"model=hf model.name_or_path={option}"
    elif group == "dataset" and "://" in option:
        hint = f"dataset=jsonl dataset.path={option}"
    elif group == "dataset" and (option.startswith((".", "/", "~")) or Path(option).suffix):
        rule = f"there is no file or folder {option}; {rule}"
        hint = f"dataset=FILE, from {Path.cwd()}"
    elif "/" in option:
        hint = f"dataset=jsonl dataset.path={option}"
    elif not hint.startswith("did"):
        hint = "choose one of them"
    return Problem(f"{group}={option}", rule, hint)
