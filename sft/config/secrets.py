"""Find what must not be shown of settings: tokens, keys, passwords."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from typing import Any

HIDDEN = "(not shown)"
SECRET = re.compile(
    r"(?<!bos|eos|pad|unk|sep|cls)(_|\b)token$|(api|access|secret|private|wandb)_?key$"
)
TOKEN = re.compile(r"\b(hf_|sk-|ghp_|glpat-)\w{12,}|://[^/@\s]*:[^/@\s]+@")  # and a URL's password
# The user of a URL, and the values of its query that sign a request.
USER = re.compile(r"(?<=://)[^/@\s]+@")
SIGNED = re.compile(
    r"(?i)([?&][^=&\s]*(?:sig|token|key|secret|password|credential)[^=&\s]*=)[^&\s]+"
)
# Variables of the environment whose values are secrets, of which a setting may have been made.
VARIABLE = re.compile(r"(?i)(token|key|secret|password)(_id)?$")
SHORTEST = 8  # characters of such a value; a shorter one may be part of any text
NAMED = re.compile(r"([\w.]+)['\"]?\s*:")  # what may be a key in the text of a mapping
COMMANDS = {"on_alert"}  # settings that are commands of a shell, whose words may be anything


def may_be_secret(key: str, value: Any) -> bool:
    """Check whether a text, or one within a mapping or list, may be a token, key or password."""
    if isinstance(value, dict):
        return any(may_be_secret(str(name), item) for name, item in value.items())
    if isinstance(value, list):
        return any(may_be_secret(key, item) for item in value)
    name = key.rpartition(".")[2].lower()
    named = name == "key" or SECRET.search(name) or re.search("auth|password|secret", name)
    return isinstance(value, str) and bool(named or TOKEN.search(value))


def shown(word: str) -> str:
    """Return a word of a command line, without a value that may be a secret."""
    key, equals, value = word.partition("=")
    name = key.lstrip("+")
    secret = equals and (name in COMMANDS or may_be_secret(name, value))
    return f"{key}={HIDDEN}" if secret else word


def without_secrets(value: Any, key: str = "", environ: Mapping[str, str] = os.environ) -> Any:
    """Copy settings, or what a run's files say, without what may be a secret.

    Args:
        value: A mapping, a list or a single value.
        key: Its name.
        environ: The environment; a text that holds the value of a secret variable is hidden.
    """
    if isinstance(value, dict):
        return {name: without_secrets(item, str(name), environ) for name, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, key, environ) for item in value]
    if not isinstance(value, str):
        return value
    text = SIGNED.sub(rf"\g<1>{HIDDEN}", USER.sub("", value))
    secrets = (item for name, item in environ.items() if VARIABLE.search(name))
    known = any(len(item) >= SHORTEST and item in text for item in secrets)
    return HIDDEN if known or key in COMMANDS or may_be_secret(key, text) else text


def command_without_secrets(command: str) -> str:
    """Copy a command line, without the values of its settings that may be secrets."""
    try:
        words = shlex.split(command)
    except ValueError:  # a damaged file
        return str(without_secrets(command))
    return shlex.join(map(_word_without_secrets, words))


def _word_without_secrets(word: str) -> str:
    key, equals, value = word.partition("=")
    if not equals or "/" in key:
        return str(without_secrets(word))
    within = value if value.startswith(("{", "[")) else ""
    if any(may_be_secret(name, value) for name in NAMED.findall(within)):
        return f"{key}={HIDDEN}"
    return f"{key}={without_secrets(value, key.lstrip('+~'))}"
