"""Check where rows come from, how they become samples, and what of them is trained."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

from sft.config import upstream
from sft.config.artefact_meta import meta_of, unread
from sft.config.data_settings import CHECKS, DatasetConfig
from sft.config.rules import written
from sft.config.settings import Config, packing_of
from sft.config.template_settings import TemplateConfig, columns_of
from sft.errors import Problem

TRAIN_ON = {
    "completion": ("completion", "all"),
    "chat": ("assistant", "last_assistant", "all"),
    "text": ("all",),
}
MIX_KEYS = {"path", "subset", "split", "columns", "weight", "max_rows", "roles"}
ROLES = ("user", "assistant", "system", "tool", "function_call")


def problems(config: Config) -> Iterator[Problem]:
    """Check the sections dataset and template, each and together."""
    yield from _sources(config.dataset)
    yield from unread(config.dataset)
    if config.dataset.streaming and config.train.max_steps < 1:
        yield Problem(
            "dataset.streaming=true",
            "reads only the rows that train.max_steps needs, and train.max_steps is not set",
            "train.max_steps=1000",
        )
    yield from _samples(config.dataset, config.template)
    yield from _trained(config.template)
    yield from _texts(config.template)


def _sources(data: DatasetConfig) -> Iterator[Problem]:
    """Check where rows come from."""
    if not data.path and not data.mix:
        yield Problem("dataset.path=null", "a dataset is needed", "dataset.path=FILE_OR_HUB_ID")
    if data.path and data.mix:
        yield Problem(
            "dataset.path, dataset.mix", "only one of the two may be set", "dataset.path=null"
        )
    if data.mix and data.eval_split:
        yield Problem(
            f"dataset.eval_split={data.eval_split}",
            "dataset.mix has several sources, which share no split to evaluate on",
            "dataset.eval_fraction=0.05, or dataset.eval_path=FILE",
        )
    yield from _roles("dataset.roles", data.roles)
    for name, item in data.mix.items():
        key = f"dataset.mix.{name}"
        yield from source_problems(key, item, f"{key}={{path: FILE, weight: 1}}")


def source_problems(key: str, item: Any, fix: str, weight: bool = True) -> Iterator[Problem]:
    """Check one entry of dataset.mix or dataset.eval.

    Args:
        key: The entry's full name.
        item: Its value.
        fix: An entry that can be used.
        weight: Whether the entry may have a weight.
    """
    if not isinstance(item, dict) or not item.get("path"):
        yield Problem(f"{key}={item}", "needs a path", fix)
        return
    known = MIX_KEYS if weight else MIX_KEYS - {"weight"}
    for unknown in item.keys() - known:
        yield Problem(
            f"{key}.{unknown}={item[unknown]}",
            f"the keys of a source are {', '.join(sorted(known))}",
            upstream.did_you_mean(unknown, known),
        )
    times = item.get("weight", 1)
    if isinstance(times, bool) or not isinstance(times, int | float) or not times > 0:
        yield Problem(f"{key}.weight={times}", "must be above 0", f"{key}.weight=1")
    yield from _roles(f"{key}.roles", item.get("roles", {}))
    rows = item.get("max_rows")
    if rows is not None and (type(rows) is not int or rows < 1):
        rule = "must be a whole number of rows, at least 1"
        yield Problem(f"{key}.max_rows={rows}", rule, f"{key}.max_rows=null")


def _roles(key: str, roles: Any) -> Iterator[Problem]:
    """Check the names of roles: each name has one of the known roles."""
    if not isinstance(roles, dict):
        yield Problem(f"{key}={roles}", "must be a mapping of roles to names", f"{key}.user=[NAME]")
        return
    given: dict[str, str] = {}
    for role, names in roles.items():
        if role not in ROLES:
            rule, hint = f"the roles are {', '.join(ROLES)}", upstream.did_you_mean(role, ROLES)
            yield Problem(f"{key}.{role}={names}", rule, hint)
        elif not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            fix = f"{key}.{role}=[{names if isinstance(names, str) and names else 'NAME'}]"
            yield Problem(f"{key}.{role}={names}", "must be a list of names", fix)
        else:
            for name in names:
                if given.setdefault(name, role) != role:
                    rule = f"gives {name} to two roles: {given[name]} and {role}"
                    yield Problem(f"{key}.{role}={names}", rule, "leave it out of one of them")


def _samples(data: DatasetConfig, template: TemplateConfig) -> Iterator[Problem]:
    """Check how rows become samples."""
    default = DatasetConfig()
    joined = packing_of(data, template.kind).value in ("wrapped", "boundary")
    if joined and template.kind != "text":
        yield Problem(
            f"dataset.packing={data.packing}",
            "would separate prompts from their answers; it is for plain text only",
            "dataset.packing=bfd",
        )
    for key, holds, rule in (
        (
            "order",
            joined,
            "needs dataset.packing=wrapped or boundary; else the trainer shuffles samples",
        ),
        (
            "boundary",
            data.packing == "boundary",
            "has an effect only with dataset.packing=boundary",
        ),
        (
            "boundary_overlap",
            data.packing == "boundary",
            "has an effect only with dataset.packing=boundary",
        ),
        ("sanitize", template.kind == "text", "is for plain text only"),
    ):
        value = getattr(data, key)
        if value != getattr(default, key) and not holds:
            yield Problem(
                f"dataset.{key}={value!r}", rule, written(f"dataset.{key}", getattr(default, key))
            )
    for section in ("stop_above", "warn_above"):
        for check, share in getattr(data, section).items():
            key = f"dataset.{section}.{check}"
            if check not in CHECKS:
                hint = upstream.did_you_mean(check, CHECKS)
                yield Problem(f"{key}={share}", f"the checks are {', '.join(CHECKS)}", hint)
            elif not 0 <= share <= 1:
                yield Problem(f"{key}={share}", "must be a fraction from 0 to 1", f"{key}=1")


def prepared_parts(data: DatasetConfig) -> set[str]:
    """Return the parts of a folder of prepared data, such as train; none if it is no such."""
    meta = meta_of(data.path)
    return set(meta["parts"]) if meta else set()


def _is_date(text: str) -> bool:
    try:
        return datetime.date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def _trained(template: TemplateConfig) -> Iterator[Problem]:
    """Check what the kind of the template allows."""
    if template.kind != "chat":
        for key, what in (("system", "system message"), ("chat_template", "Jinja template")):
            if getattr(template, key) is not None:
                yield Problem(
                    f"template.{key}={getattr(template, key)!r}",
                    f"only a template of kind chat has a {what}",
                    "template=chat",
                )
        if template.kwargs:
            yield Problem(
                f"template.kwargs={template.kwargs}",
                "only a template of kind chat has switches",
                "template=chat",
            )
    elif template.control_tokens == "token":
        yield Problem(
            "template.control_tokens=token",
            "in a conversation, only the chat template writes control tokens",
            "template.control_tokens=null",
        )
    if template.date is not None and not _is_date(template.date):
        yield Problem(
            f"template.date={template.date}",
            "must be a day, written as YYYY-MM-DD",
            "template.date=2026-01-31",
        )
    legal = TRAIN_ON.get(template.kind, ())
    if template.train_on is not None and template.train_on not in legal:
        yield Problem(
            f"template.train_on={template.train_on}",
            f"a template of kind {template.kind} trains on {' or '.join(legal)}",
            f"template.train_on={legal[0] if legal else 'null'}",
        )


def _texts(template: TemplateConfig) -> Iterator[Problem]:
    """Check that the template has texts, and that their fields name columns."""
    if template.kind == "completion" and not template.prompts:
        yield Problem(
            "template.prompts=[]",
            "a template of kind completion needs a prompt",
            "template=completion",
        )
    for text in [*template.prompts, *template.completions]:
        try:
            columns = columns_of(text)
        except ValueError as error:
            columns = (f"({error})",)
        wrong = [name for name in columns if not re.fullmatch(r"[\w .-]+", name)]
        if wrong:
            yield Problem(
                f"template {template.name}: {text!r}",
                f"the text between braces is not a column name: {wrong[0]}",
                "write {{ and }} for braces that are part of the text",
            )
    if not template.completions:
        yield Problem(
            "template.completions=[]",
            "a template needs completions, the texts that are trained",
            "template=completion",
        )
