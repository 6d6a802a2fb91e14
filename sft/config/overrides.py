"""Parse the words of a command line and the entries of a settings file; collect the problems.

The same rules of quoting hold for every command. A text setting takes its value as it is typed.
One pair of quotes around the whole value is removed, so that ``null`` or, in a sweep, a comma can
be text. Other values follow Hydra's grammar; a value outside that grammar, such as one with ``ü``,
is read as YAML.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sft.config import settings_file
from sft.config.grammar import from_yaml, hydra_text, is_list, options_of, parse, unclosed, unquoted
from sft.config.groups import SEVERAL, config_dir_problems, groups, no_option
from sft.config.names import suggest, suggest_sweep
from sft.errors import ConfigError, DataError, Problem

KEY = re.compile(r"[\w$@/.-]+")
FUNCTION = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag|cast)\(")  # of Hydra's grammar


@dataclass(frozen=True)
class Override:
    """One option of a group, or the value of one setting.

    Attributes:
        key: The group or the setting's dotted name.
        value: The option's name, or several with commas, or the setting's value; None for a sweep.
        text: It in Hydra's grammar, if Hydra composes or expands it; "": made from ``value``.
        kind: ``option`` of a group, ``setting``, ``sweep`` (over a setting's or a group's values),
            or ``hydra`` for Hydra's own settings.
        source: File and line, if the override is from a settings file.
    """

    key: str
    value: Any
    text: str = ""
    kind: str = "setting"
    source: str = ""

    def hydra(self) -> str:
        """Return it in Hydra's grammar; with ``++`` unknown keys pass, and we report them later."""
        return self.text or f"++{self.key}={hydra_text(self.value)}"

    def word(self) -> str:
        """Return it as a word of our command line."""
        return self.text or f"{self.key}={hydra_text(self.value)}"


class Reader:
    """Parses the words of one command and collects their problems.

    Args:
        schema: The dataclass of all settings.
        config_dir: A folder with the user's own options.
        composes: True: the command has groups; False: it has settings only.
        sweep: Whether a word may have several values.
        option_of: Finds the option of the group dataset for a file or folder of rows; None if there
            is nothing at this path.

    Raises:
        ConfigError: ``config_dir`` cannot be used.
    """

    def __init__(
        self,
        schema: Any,
        config_dir: str | None,
        composes: bool = True,
        sweep: bool = False,
        option_of: Callable[[str], str | None] = lambda path: None,
    ) -> None:
        if unusable := list(config_dir_problems(config_dir)):
            raise ConfigError(unusable)
        self.schema, self.config_dir = schema, config_dir
        self.sweep, self.option_of = sweep, option_of
        self.groups = groups(config_dir) if composes else {}
        self.problems: list[Problem] = []

    def read(self, words: list[str]) -> list[Override]:
        """Parse the words. Overrides of a settings file come first; the command line wins."""
        files = [word for word in words if settings_file.is_one(word)]
        for word in files[1:]:
            rule = f"a command takes one settings file, and {files[0]} is given already"
            self.problems.append(Problem(word, rule, "put all settings into one file"))
        line: dict[str, Override] = {}
        for word in words:
            if word not in files:
                for item in self._word(word):
                    if item.key in line:
                        rule = f"{item.key} is given twice"
                        self.problems.append(Problem(word, rule, "keep one of them"))
                    line.setdefault(item.key, item)
        given = [*(self._of_file(files[0], line) if files else []), *line.values()]
        for item in given if self.sweep else []:
            if item.kind == "setting" and parse(item.hydra()) is None:
                rule = "cannot be passed to a sweep's trials: it is not in Hydra's grammar"
                place = f"{item.source}: " if item.source else ""
                fix = "put it into an option of your own: --config-dir DIR"
                self._wrong(f"{place}{item.key}={item.value}", rule, fix)
        return given

    def _word(self, word: str) -> Iterator[Override]:
        key, equals, text = word.partition("=")
        key = key.lstrip("+")
        if key.startswith("~"):
            self._wrong(word, "a setting cannot be deleted", "remove it from the command")
        elif not equals or not KEY.fullmatch(key):
            known = key in self.groups or settings_file.field_of(self.schema, key) is not None
            rule = "has no value" if known else "is neither a setting nor a settings file (*.yaml)"
            fix = f"{key}=VALUE" if known else "write each setting as key=value"
            if KEY.fullmatch(key.strip()) and equals:
                fix = f"{key.strip()}={text.strip()}"
            self._wrong(word or "''", rule, fix)
        elif key == "hydra" or key.startswith(("hydra.", "hydra/")):
            yield Override(key, None, word, "hydra")
        elif key in self.groups:
            yield from self._option(word, key, text)
        else:
            yield from self._setting(word, key, text)

    def _wrong(self, setting: str, rule: str, fix: str) -> None:
        self.problems.append(Problem(setting, rule, fix))

    def _setting(self, word: str, key: str, text: str) -> Iterator[Override]:
        field = settings_file.field_of(self.schema, key)
        is_text = isinstance(field, dataclasses.Field) and settings_file.holds_text(field, key)
        if is_text and self.sweep and is_list(text):
            values = [item.strip() for item in text.split(",")]
            spelled = ",".join(item if item == "null" else hydra_text(item) for item in values)
            yield Override(key, None, f"++{key}={spelled}", "sweep")
            return
        value: Any = None if text == "null" else unquoted(text) if is_text else text
        rule = getattr(field, "metadata", {}).get("rule")
        misfits = is_text and "," in text and rule is not None and not rule.holds(value)
        parsed = parse(f"{key}={text}") if self.sweep or not is_text or misfits else None
        if parsed is not None and parsed.is_sweep_override():
            yield from self._sweep(word, key, text, parsed.is_interval_sweep())
            return
        if not is_text:
            if parsed is None and FUNCTION.match(text) and (missing := unclosed(f"{key}={text}")):
                rule = "cannot be parsed: its brackets do not match"
                self._wrong(word, rule, f"{key}={text}{missing}")
                return
            try:
                value = from_yaml(text) if parsed is None else parsed.value()
            except yaml.YAMLError:
                rule = "cannot be parsed: its brackets, braces or quotes do not match"
                fix = (
                    "close each of them, put quotes around a text that contains one, and put "
                    "quotes for the shell around the whole word"
                )
                self._wrong(word, rule, fix)
                return
        yield Override(key, value)

    def _sweep(self, word: str, key: str, text: str, interval: bool) -> Iterator[Override]:
        if settings_file.field_of(self.schema, key) is None:
            fix = suggest_sweep(key, self.schema, text) if self.sweep else ""
            self._wrong(word, "there is no such setting", fix or suggest(key, self.schema, text))
        elif not self.groups:
            self._wrong(word, "takes one value, but several are given", f"{key}=[{text}]")
        elif not self.sweep:
            field = settings_file.field_of(self.schema, key)
            kind = str(getattr(field, "type", "Any"))
            fix = f"add -m, or {key}=[{text}]" if kind.startswith(("list", "Any")) else "add -m"
            self._wrong(word, "several values need a sweep (-m)", fix)
        elif interval:
            self._wrong(word, "interval() does not list the values to try", f"{key}=ONE,OTHER")
        else:
            yield Override(key, None, f"++{key}={text}", "sweep")

    def _option(self, word: str, group: str, text: str, source: str = "") -> Iterator[Override]:
        ours, known = groups(None), self.groups[group]
        name = unquoted(text)
        if group == "dataset" and name not in known and (found := self._rows(name)):
            yield Override(group, found, f"{group}={found}", "option", source)
            yield Override("dataset.path", name, source=source)
            return
        parsed = None if source and group not in SEVERAL else parse(f"{group}={text}")
        several = parsed is not None and parsed.is_sweep_override()
        if several and not self.sweep:
            one = f"choose one: {word.partition(',')[0]}"
            fix = f"{group}=[{text}]" if group in SEVERAL else f"add -m, or {one}"
            self._wrong(word, "several values need a sweep (-m)", fix)
            return
        chosen = [name] if parsed is None else options_of(parsed)
        if group in SEVERAL and parsed is not None and isinstance(parsed.value(), list):
            chosen = [str(option) for option in parsed.value()]
        unknown = [option for option in chosen if option not in known]
        for option in unknown:
            if several and group == "dataset" and Path(option).exists():
                fix = f"dataset=jsonl dataset.path={text}"
                self._wrong(f"dataset={option}", "a sweep over files needs dataset=OPTION", fix)
            else:
                self.problems.append(no_option(group, option, known))
        if not unknown:
            joined = f"[{','.join(chosen)}]" if len(chosen) > 1 else chosen[0] if chosen else "none"
            spelled = f"{group}={text if several else joined}"
            kind = "sweep" if several else "option"
            yield Override(
                group, ",".join(chosen), spelled if group in ours else f"+{spelled}", kind, source
            )

    def _rows(self, path: str) -> str | None:
        """Find the option for a file or folder of rows; None if there is nothing at this path."""
        try:
            return self.option_of(path)
        except DataError as error:
            rule, _, fix = str(error).partition("\n    fix: ")
            self._wrong(f"dataset={path}", rule, fix)
            return "jsonl"

    def _of_file(self, path: str, line: dict[str, Override]) -> Iterator[Override]:
        """Read the overrides of a settings file that the command line does not replace."""
        decided = set(line)
        for item in line.values():
            if item.kind == "option":
                for option in item.value.split(","):
                    decided |= settings_file.set_by_option(item.key, option, self.config_dir)
        entries = settings_file.entries(path, self.schema, set(self.groups), self.problems)
        for key, value, place in entries:
            if key in decided:
                continue
            if key not in self.groups:
                yield Override(key, value, source=place)
                continue
            count = len(self.problems)
            text = hydra_text(value)
            for item in self._option(f"{key}={text}", key, text, place):
                if item.key not in decided:
                    yield item
            self.problems[count:] = [
                dataclasses.replace(problem, setting=f"{place}: {problem.setting}")
                for problem in self.problems[count:]
            ]


def located(problems: list[Problem], given: list[Override]) -> list[Problem]:
    """Add file and line to each problem of a setting that is from a settings file."""
    places = {item.key: item.source for item in given if item.source}
    result = []
    for problem in problems:
        found = re.match(r"[\w.-]+", problem.setting)
        key = found[0] if found else ""
        place = places.get(key) or next(
            (
                place
                for other, place in places.items()
                if key and (key.startswith(f"{other}.") or other.startswith(f"{key}."))
            ),
            None,
        )
        if place:
            problem = dataclasses.replace(problem, setting=f"{place}: {problem.setting}")
        result.append(problem)
    return result
