"""The settings of the section dataset: from files to rows and samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.config.rules import at_least, between, one_of, setting, share, within

FORMAT_NAMES = (
    "prompt_completion",
    "alpaca",
    "question_answer",
    "messages",
    "sharegpt",
    "text",
    "tokenized",
    "columns",
)
# The checks of the audit. Each text follows the number of documents that the check found.
CHECKS = {
    "nothing_trained": "have no trained token, and are left out",
    "never_stops": "train no token that ends the answer",
    "prompt_differs": "have an answer that begins differently from the generation prompt",
    "answer_cut": "have an answer that is cut off at dataset.max_length",
    "double_bos": "begin with two BOS tokens",
    "control_tokens": "contain the text of a control token (see template.control_tokens)",
    "empty_answers": "have an empty answer, which is not trained",
    "duplicates": "are exact copies of an earlier document",
    "near_duplicates": "differ from an earlier document only in white space and case",
    "eval_in_train": "are held out and also trained on",
    "eval_near_train": "are held out and differ from a trained one only in white space and case",
}


@dataclass
class DatasetConfig:
    """Where rows come from, which are held out for evaluation, and how they become samples."""

    name: str | None = setting(
        None,
        "short name, used in run_name; null: the last part of path, or the names in mix",
        in_data_key=False,
    )
    path: str | None = setting(
        None, "where the rows are: file, folder, pattern, URL (s3://, ...) or hub id"
    )
    subset: str | None = setting(None, "configuration name of the hub dataset")
    split: str = setting("train", "split of the hub or saved dataset to train on")
    eval_path: str | None = setting(None, "file or folder of held-out rows")
    eval_split: str | None = setting(None, "split of the hub or saved dataset to evaluate on")
    eval: dict[str, Any] = setting(
        {},
        "further held-out sets, each evaluated by itself: {NAME: {path: ..., split: ...}}; its "
        "figures are eval_NAME_loss, eval_NAME_perplexity and eval_NAME_tokens",
        changes_training=False,
    )
    eval_fraction: float = setting(
        0.0, "fraction of rows held out for evaluation", within(0, 1), null=0.0
    )
    max_row_bytes: int = setting(
        1 << 28,
        "longest line or row of a file, in bytes; a longer one is a bad row, or its file is "
        "refused, and no more than this is read into memory",
        at_least(1),
    )
    streaming: bool = setting(
        False, "true: read only the rows that train.max_steps needs; for data larger than the disk"
    )
    mix: dict[str, Any] = setting(
        {},
        "several sources instead of path: {NAME: {path: ..., weight: W, max_rows: N}}; each row is "
        "seen W times per epoch; of each source, the first N rows are read",
    )
    format: str = setting(
        "auto",
        "format of the rows; auto: detected from the column names",
        one_of("auto", *FORMAT_NAMES),
    )
    columns: dict[str, str] = setting(
        {},
        "column names of the data by template field, such as {prompt: question}; role and content: "
        "keys of messages, such as {role: speaker, content: text}",
    )
    roles: dict[str, Any] = setting(
        {},
        "further names of the roles of messages, such as {user: [customer], assistant: [agent]}; "
        "the roles are user, assistant, system, tool and function_call",
    )
    ignore_columns: list[str] = setting(
        [],
        "columns, after renaming, that are left out although their meaning is known, such as "
        "[history, images]; messages.KEY: a key of the messages in that column",
    )
    max_rows: int | None = setting(
        None, "number of rows to read from the start of each source; null: all", at_least(1)
    )
    max_eval_rows: int | None = setting(
        None,
        "number of rows to read from the start of eval_path, eval_split and each set of eval; "
        "null: all",
        at_least(1),
    )
    max_length: int = setting(
        1024,
        "maximum number of tokens in a sample",
        at_least(8),
        decides=("train.max_length",),
    )
    overlong: str = setting(
        "error",
        "what to do with documents longer than max_length. error: stop the run; truncate: cut off "
        "the end; drop: leave them out; split: make several samples. The audit shows their number",
        one_of("truncate", "drop", "split", "error"),
    )
    packing: str = setting(
        "auto",
        "what a sample is. none: one document; bfd: as many whole documents as fit into max_length "
        "(best-fit decreasing); bfd_split: as bfd, but longer documents are split; wrapped: "
        "documents are joined and cut every max_length tokens; boundary: as wrapped, but cut after "
        "dataset.boundary; auto: wrapped for plain text, else none. Documents never attend to each "
        "other",
        one_of("auto", "none", "bfd", "bfd_split", "wrapped", "boundary"),
    )
    boundary: str = setting(
        "\n",
        "with packing=boundary: a block begins after the last such token of the previous block",
    )
    boundary_overlap: str = setting(
        "context",
        "with packing=boundary: what becomes of the tokens that a block shares with the previous "
        "block. context: they are read but not trained again, so that each token is trained once; "
        "train: they are trained in both blocks",
        one_of("context", "train"),
    )
    sanitize: bool = setting(
        False,
        "true: plain text loses carriage returns, blank lines and repeated spaces; tabs become "
        "spaces",
    )
    order: str = setting(
        "given",
        "order in which packing joins documents. given: as read; shortest: by length, shortest "
        "first; longest: longest first; random: shuffled with the seed",
        one_of("given", "shortest", "longest", "random"),
    )
    sample: float = setting(1.0, "fraction of the samples to train on, evenly spaced", share())
    max_bad_fraction: float = setting(
        0.0,
        "largest fraction of rows that may not match the format or template; else the run stops",
        within(0, 1),
        in_data_key=False,
    )
    stop_above: dict[str, float] = setting(
        {"nothing_trained": 0.05, "never_stops": 0.5, "double_bos": 0.0},
        "for each check of the audit, the fraction of documents above which the run stops; 1: "
        "never",
        changes_training=False,
        in_data_key=False,
    )
    warn_above: dict[str, float] = setting(
        {
            "nothing_trained": 0.0,
            "never_stops": 0.0,
            "prompt_differs": 0.0,
            "answer_cut": 0.0,
            "control_tokens": 0.0,
            "empty_answers": 0.0,
            "duplicates": 0.01,
            "near_duplicates": 0.01,
            "eval_in_train": 0.0,
            "eval_near_train": 0.0,
        },
        "for each check of the audit, the fraction of documents above which a warning is shown; "
        "1: never",
        changes_training=False,
        in_data_key=False,
    )
    num_proc: int | None = setting(
        None,
        "number of processes that tokenise; null: one per CPU core",
        between(1, 1024),
        changes_training=False,
        in_data_key=False,
    )
    exact_match: int = setting(
        0,
        "number of held-out prompts answered greedily before and after training; the share of "
        "exact answers is reported; 0: none",
        at_least(0),
        changes_training=False,
        in_data_key=False,
    )
