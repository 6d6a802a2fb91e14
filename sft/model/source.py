"""Where a model's files are, and the error for files that cannot be loaded."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.config.settings import ModelConfig
from sft.errors import ModelError, SftError


@dataclasses.dataclass(frozen=True)
class Named:
    """The settings of the command that name a model, for the fixes of messages."""

    name: str = "model.name_or_path"
    code: str = "model.trust_remote_code"


TRAINING = Named()
_named: contextvars.ContextVar[Named] = contextvars.ContextVar("named", default=TRAINING)


def named() -> Named:
    """Return the settings with which this command names its model."""
    return _named.get()


@contextlib.contextmanager
def named_by(setting: str) -> Iterator[None]:
    """Within a command that has other settings for its model than those of training."""
    token = _named.set(Named(setting, "trust_remote_code"))
    try:
        yield
    finally:
        _named.reset(token)


@contextlib.contextmanager
def loading(what: str, model: ModelConfig) -> Iterator[None]:
    """Replace the libraries' long errors by a ModelError that names a fix."""
    try:
        yield
    except SftError:
        raise
    except Exception as error:  # the files may hold anything, and the libraries check little of it
        name, named = str(model.name_or_path), _named.get()
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
            reason = "the folder has no config.json"
        if not Path(name).exists():
            reason = f"it is not a local folder, and the hub did not provide it: {reason}"
        if "trust_remote_code" in str(error):
            reason = "it has Python code of its own, which runs only if you allow it"
            fix = f"read that code, then {named.code}=true on the command line"
        elif Path(name).is_absolute() or name.startswith(".") or Path(name).is_dir():
            fix = f"{named.name}=FOLDER with config.json, weights and tokenizer files"
        else:
            fix = (
                "check the name and the network; set HF_TOKEN for gated models; HF_HUB_OFFLINE=1 "
                "uses only cached files; model=tiny is embedded"
            )
        raise ModelError(
            f"the {what} of {name} cannot be loaded: {reason}\n    fix: {fix}"
        ) from error


def source(model: ModelConfig) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained`` that name the model."""
    name = str(model.name_or_path)
    if len(name.splitlines()) > 1:
        raise ModelError(
            f"the name {name!r} of the model has a line break\n"
            f"    fix: {_named.get().name}=HUB_ID_OR_FOLDER"
        )
    if (Path(name).is_absolute() or name.startswith(".")) and not Path(name).is_dir():
        raise ModelError(
            f"there is no model folder {name}\n    fix: {_named.get().name}=HUB_ID_OR_FOLDER"
        )
    return {
        "pretrained_model_name_or_path": name,
        "revision": model.revision,
        "trust_remote_code": model.trust_remote_code,
    }
