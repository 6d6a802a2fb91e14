"""Tab completion: the scripts for bash, zsh and fish, and the words that they offer.

The shell's script calls ``sft --complete SHELL WORD ...`` with the words up to the cursor. The
words come from the dataclasses and the names of YAML files; no config is composed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft.cli.commands import COMMANDS, command
from sft.cli.options import OPTIONS, REFUSED, SHELLS
from sft.config.rules import fields_of

# The script completes the commands python and python3 only if it was printed by
# ``python -m sft --completion``.
BASH = """\
_sft_complete() {
    local line="${COMP_LINE:0:COMP_POINT}" program="${COMP_WORDS[0]}" IFS=$'\\n'
    COMPREPLY=()
    if [[ $program == *python* ]]; then
        [[ $line == *" -m sft"* ]] || return 0
        COMPREPLY=($("$program" -m sft --complete bash "$line" "$COMP_WORDBREAKS" 2>/dev/null))
    else
        COMPREPLY=($("$program" --complete bash "$line" "$COMP_WORDBREAKS" 2>/dev/null))
    fi
    (( ${#COMPREPLY[@]} )) || compopt +o nospace 2>/dev/null  # bash completes a file name
}
complete -o nospace -o default -F _sft_complete NAMES
"""
ZSH = """\
_sft_complete() {
    local -a found open closed call
    call=("${words[1]}")
    if [[ ${words[1]} == *python* ]]; then
        [[ "${words[*]}" == *" -m sft"* ]] || { _default; return }
        call+=(-m sft)
    fi
    found=("${(@f)$("${call[@]}" --complete zsh "${(@)words[1,CURRENT]}" 2>/dev/null)}")
    closed=(${(M)found:#* })
    open=(${found:#* })
    if (( $#closed + $#open )); then
        (( $#closed )) && compadd -- "${(@)closed% }"
        (( $#open )) && compadd -S '' -- "${open[@]}"
    else
        compset -P '*='
        _files
    fi
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u }
compdef _sft_complete NAMES
"""
FISH = """\
function _sft_complete
    set -l tokens (commandline -opc) (commandline -ct)
    if string match -q '*python*' -- $tokens[1]
        string match -q '* -m sft*' -- "$tokens"; or return
        $tokens[1] -m sft --complete fish $tokens 2>/dev/null
    else
        $tokens[1] --complete fish $tokens 2>/dev/null
    end
end
"""


def script(shell: str) -> str:
    """Return a shell's completion script, for ``eval "$(sft --completion bash)"``."""
    names = ["sft"]
    if sys.orig_argv[1:2] == ["-m"]:
        names += ["python", "python3"]
    if shell == "fish":
        return FISH + "".join(f"complete -c {name} -a '(_sft_complete)'\n" for name in names)
    return {"bash": BASH, "zsh": ZSH}[shell].replace("NAMES", " ".join(names))


def complete(shell: str, *words: str) -> None:
    """Print the words that can follow at the cursor, one a line; a complete word ends in a space.

    Args:
        shell: ``bash``, ``zsh`` or ``fish``.
        words: For bash, the line up to the cursor and COMP_WORDBREAKS; for the others, the words up
            to the cursor, of which the last may be empty.
    """
    breaks = ""
    if shell == "bash":
        line, breaks = words
        words = tuple(_split(line))
    else:
        words = tuple("".join(_split(word)[:1]) for word in words)  # without their quotes
    *before, word = _after_program(list(words)) or [""]
    found = list(_candidates(before, word))
    if shell == "bash":  # bash replaces only the text after the last of COMP_WORDBREAKS
        cut = max((word.rfind(mark) for mark in "=:" if mark in breaks), default=-1) + 1
        found = [(text[cut:], note) for text, note in found]
    for text, note in found:
        described = f"{text.rstrip()}\t{note}" if note else text.rstrip()
        sys.stdout.write((described if shell == "fish" else text) + "\n")


def _split(line: str) -> list[str]:
    """Split a line as a shell does; the closing quote may be missing from the last word."""
    for quote in ("", "'", '"'):
        with contextlib.suppress(ValueError):
            words = shlex.split(line + quote)
            return [*words, ""] if not quote and line[-1:].isspace() else words
    return line.split(" ")


def _after_program(words: list[str]) -> list[str]:
    """Return the words after ``sft`` or ``python -m sft``; ``-m sft.train`` gives ``train``."""
    for index, word in enumerate(words[:-1]):
        following = words[index + 1]
        if word == "-m" and following.partition(".")[0] == "sft":
            name = following.partition(".")[2]
            return ([name] if name else []) + words[index + 2 :]
    return words[1:]


def _candidates(before: list[str], word: str) -> Iterator[tuple[str, str]]:
    """Yield (completed word, description) for the word at the cursor."""
    if not before:
        for name in (*COMMANDS, "--help", "--version", "--completion"):
            if name.startswith(word):
                yield f"{name} ", command(name).summary if name in COMMANDS else ""
        return
    if before[0] in ("help", "--help", "-h"):  # sft help train zero
        if len(before) > 1:
            before = [before[1], "--help", *before[2:]]
        else:
            yield from ((f"{name} ", "") for name in COMMANDS if name.startswith(word))
            return
    if before[-1] == "--completion":
        yield from ((f"{shell} ", "") for shell in SHELLS if shell.startswith(word))
    if before[0] not in COMMANDS or before[-1] in ("--completion", "--config-dir", "-cd"):
        return
    chosen = command(before[0])
    if before[-1] in ("--cfg", "-c"):
        yield from ((f"{kind} ", "") for kind in ("job", "hydra", "all") if kind.startswith(word))
    elif word.startswith("-"):
        refused = {f"--{name.replace('_', '-')}" for name in REFUSED}
        long = [name for name in OPTIONS if name.startswith("--") and name not in refused]
        yield from ((f"{name} ", "") for name in long if name.startswith(word))
    else:
        found = _groups(before) if chosen.config_name else {}
        plus = word[: len(word) - len(word.lstrip("+"))]
        for text, note in _words(chosen.schema(), found, word[len(plus) :], before):
            yield plus + text, note


def _groups(before: list[str]) -> dict[str, set[str]]:
    from sft.config.groups import groups

    config_dir = None
    for option, value in itertools.pairwise(before):
        config_dir = value if option in ("--config-dir", "-cd") else config_dir
    return groups(config_dir if config_dir and Path(config_dir).is_dir() else None)


def _words(
    config: Any, found: dict[str, set[str]], word: str, before: list[str]
) -> Iterator[tuple[str, str]]:
    key, equals, value = word.partition("=")
    if equals:
        yield from _values(config, found, key, value)
        return
    section, dot, leaf = word.rpartition(".")
    if not dot:
        helps = "--help" in before or "-h" in before
        for name in sorted(found):
            if name.startswith(word):
                yield (f"{name} " if helps else f"{name}="), "group"
        if helps:
            return
    node = config
    for name in section.split(".") if section else ():
        node = getattr(node, name, None)
    if not dataclasses.is_dataclass(node):
        return
    for name, field, value_here in fields_of(node):
        if name.startswith(leaf):
            if dataclasses.is_dataclass(value_here):
                yield f"{section}{dot}{name}.", "section"
            else:
                yield f"{section}{dot}{name}=", field.metadata["help"]


def _values(
    config: Any, found: dict[str, set[str]], key: str, value: str
) -> Iterator[tuple[str, str]]:
    """Yield the options of a group, also after a comma, or the legal values of a setting."""
    from sft.cli.helptext import described

    if key in found:
        done, comma, last = value.rpartition(",")
        for option in sorted(found[key]):
            if option.startswith(last):
                yield f"{key}={done}{comma}{option}", described(key, option)
        return
    *sections, leaf = key.split(".")
    node = config
    for name in sections:
        node = getattr(node, name, None)
    if not dataclasses.is_dataclass(node):
        return
    for name, field, default in fields_of(node):
        if name != leaf:
            continue
        rule = field.metadata.get("rule")
        listed = rule.text.removeprefix("must be one of ") if rule else ""
        choices = listed.split(", ") if rule and listed != rule.text else []
        if field.type == "bool":
            choices = ["false", "true"]
        elif not choices and isinstance(default, int | float):
            choices = [str(default)]
        yield from ((f"{key}={choice} ", "") for choice in choices if choice.startswith(value))
