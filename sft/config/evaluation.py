"""What is evaluated: held-out sets, their figures, and train.metric, the figure that decides."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from sft.config import data_checks, upstream
from sft.config.artefact_meta import meta_of
from sft.config.data_settings import DatasetConfig
from sft.config.rules import written
from sft.config.settings import Config
from sft.config.train_settings import TrainConfig
from sft.errors import Problem

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a set: part of the names of figures and files
FIGURES = ("loss", "perplexity")  # of each held-out set, of which smaller values are better
# One of these by its full name: the set, None for the main held-out rows, and the figure.
RESULT = re.compile(rf"eval_(?:(.+)_)?({'|'.join(FIGURES)})")
# Figures of the trained batches. An evaluation is judged by their last logged value.
TRAINED = ("loss", "entropy", "mean_token_accuracy")
ANSWERED = "exact_match"
GREATER = (ANSWERED, "mean_token_accuracy")  # figures of which larger values are better
# Settings that are used after an evaluation only, and what they do without any.
USES = {
    "load_best_model_at_end": "there is no evaluation that could be the best",
    "early_stopping_patience": "there is no evaluation after which the run could stop",
}


def held_out(data: DatasetConfig) -> list[str]:
    """Name the held-out parts of the data: ``eval``, and ``eval_NAME`` of each set."""
    if meta := meta_of(data.path):
        return [part for part in meta["parts"] if part != "train"]
    main = ["eval"] if data.eval_path or data.eval_split or data.eval_fraction else []
    return main + [f"eval_{name}" for name in data.eval]


def figures(config: Config) -> list[str]:
    """Name the figures by which the evaluations of a run can be compared."""
    parts = held_out(config.dataset)
    found = [f"{part}_{figure}" for part in parts for figure in FIGURES]
    return [*found, *([ANSWERED] if config.dataset.exact_match else []), *TRAINED]


def greater_is_better(train: TrainConfig) -> bool:
    """Return whether larger values of ``train.metric`` are better."""
    set_ = train.greater_is_better
    return train.metric in GREATER if set_ is None else set_


def is_evaluation(logged: Mapping[str, Any]) -> bool:
    """Return whether a logged record is that of an evaluation."""
    return any(map(RESULT.fullmatch, logged))


def problems(config: Config) -> Iterator[Problem]:
    """Check the held-out sets and the settings that use an evaluation."""
    yield from _held_out(config.dataset, config.template.kind)
    yield from _sets(config.dataset)
    train, parts, default = config.train, held_out(config.dataset), TrainConfig()
    names = ("metric", "greater_is_better", *USES)
    used = [name for name in names if getattr(train, name) != getattr(default, name)]
    if not parts:
        for name in used:
            rule = USES.get(name, "has no effect: there is no evaluation")
            rule = f"there are no held-out rows; {rule}" if name in USES else rule
            yield Problem(
                written(f"train.{name}", getattr(train, name)), rule, "dataset.eval_fraction=0.05"
            )
        return
    known = figures(config)
    if train.metric in known:
        return
    key = written("train.metric", train.metric)
    if train.metric == ANSWERED:
        yield Problem(key, "no held-out prompt is answered", "dataset.exact_match=200")
    elif train.metric == default.metric:
        rule = "the only held-out rows are the sets of dataset.eval, so it must name one of them"
        yield Problem(key, rule, f"train.metric={known[0]}")
    else:
        rule = f"is no figure of this run's evaluations; these are {', '.join(known)}"
        close = upstream.closest(train.metric, known)
        yield Problem(key, rule, f"train.metric={close or known[0]}")


def _held_out(data: DatasetConfig, kind: str) -> Iterator[Problem]:
    """Check which rows are held out, and whether the model can answer them."""
    sources = {
        "dataset.eval_path": data.eval_path,
        "dataset.eval_split": data.eval_split,
        "dataset.eval_fraction": data.eval_fraction,
    }
    given = [f"{key}={value}" for key, value in sources.items() if value]
    prepared = data_checks.prepared_parts(data)
    if given and prepared:
        yield Problem(
            given[0],
            "has no effect on prepared data, whose held-out samples were chosen when it was made",
            "leave it out, or prepare the data again with it",
        )
    if len(given) > 1:  # an option of dataset may have set the last of them
        others = [item.partition("=")[0] for item in given[1:]]
        yield Problem(
            ", ".join(given),
            "only one setting may choose the held-out rows",
            " ".join(f"{key}={0 if key == 'dataset.eval_fraction' else 'null'}" for key in others),
        )
    if data.exact_match and not given and "eval" not in prepared:
        yield Problem(
            f"dataset.exact_match={data.exact_match}",
            "needs held-out rows whose prompts the model answers",
            "dataset.eval_fraction=0.05",
        )
    if data.exact_match and kind == "text":
        yield Problem(
            f"dataset.exact_match={data.exact_match}",
            "plain text has no prompt that the model could answer",
            "dataset.exact_match=0",
        )
    if data.max_eval_rows is not None and data.eval_fraction and not data.eval:
        yield Problem(
            f"dataset.max_eval_rows={data.max_eval_rows}",
            f"has no effect with dataset.eval_fraction={data.eval_fraction}",
            "dataset.eval_fraction=0",
        )


def _sets(data: DatasetConfig) -> Iterator[Problem]:
    """Check the names and the entries of ``dataset.eval``."""
    if data.eval and meta_of(data.path):
        rule = "has no effect on prepared data, whose held-out sets were chosen when it was made"
        fix = "leave it out, or prepare the data again with it"
        yield Problem(f"dataset.eval={data.eval}", rule, fix)
        return
    for name, item in data.eval.items():
        key = f"dataset.eval.{name}"
        if not NAME.fullmatch(str(name)):
            rule = "the name of a set has letters, digits, _ and -, at most 64 of them"
            yield Problem(f"{key}={item}", rule, f"dataset.eval.NAME={item}")
        if isinstance(item, dict) and item.get("split") and data.path and "path" not in item:
            item = {**item, "path": data.path}
        yield from data_checks.source_problems(key, item, f"{key}={{path: FILE}}", weight=False)
    taken = {"eval", *(f"eval_{name}" for name in data.eval)}
    for name in data.mix.keys() & taken:
        rule = "is the name of held-out rows in the audit"
        yield Problem(f"dataset.mix.{name}", rule, "a different name of the source")
