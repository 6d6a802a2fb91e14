"""The parts of a run's page beside its curves: one function for each part, "" if nothing is known."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sft import html
from sft.config.compare import flatten
from sft.config.rules import typed
from sft.config.settings import Config
from sft.data.histogram import histogram
from sft.report.folder import MERGE_REPORT, Folder, number
from sft.run import record

SHOWN_PROMPTS, SHOWN_ANSWERS, SHOWN_ALERTS, SHOWN_OPERATIONS = 8, 8, 50, 40
PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")
# Of the audit, what config.yaml says too.
AUDIT_LEFT_OUT = ("histogram",)


def when(seconds: Any) -> str:
    """Return a time as a text, in this machine's zone."""
    value = number(seconds)
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(value)) if value == value else "-"


def duration(seconds: Any) -> str:
    """Return a length of time as a text of two units."""
    value = number(seconds)
    if value != value or value < 0:
        return "-"
    for unit, part, size in (("d", "h", 86400), ("h", "min", 3600), ("min", "s", 60)):
        if value >= size:
            rest = int(value % size // {"h": 3600, "min": 60, "s": 1}[part])
            return f"{int(value // size)} {unit}" + (f" {rest} {part}" if rest else "")
    return f"{value:.3g} s"


def hidden(value: Any) -> str:
    """Return a setting's value as it is typed, without the password of a URL."""
    return PASSWORD.sub("***@", typed(value))


def samples(run: Folder) -> str:
    """Show answers that were generated while training, by prompt and step."""
    by_prompt: dict[Any, list[dict[str, Any]]] = {}
    for answer in run.lines(record.SAMPLES):
        by_prompt.setdefault(answer.get("index"), []).append(answer)
    shown = ""
    for answers in list(by_prompt.values())[:SHOWN_PROMPTS]:
        answers.sort(key=lambda answer: number(answer.get("step")))
        every = (len(answers) - 1) / max(SHOWN_ANSWERS - 1, 1)
        chosen = answers
        if len(answers) > SHOWN_ANSWERS:
            chosen = [answers[round(every * place)] for place in range(SHOWN_ANSWERS)]
        rows = [("prompt", answers[-1].get("prompt"), "")]
        if answers[-1].get("reference") is not None:
            rows.append(("held-out answer", answers[-1]["reference"], ""))
        rows += [
            (
                f"step {answer.get('step')}",
                answer.get("answer"),
                "" if answer.get("stopped", True) else " <small>(cut at the limit)</small>",
            )
            for answer in chosen
        ]
        shown += '<div class="sample"><dl>\n' + "".join(
            f"<dt>{html.text(name)}</dt><dd><pre>{html.long_text(said, 600)}</pre>{note}</dd>\n"
            for name, said, note in rows
        )
        shown += "</dl></div>\n"
    note = f"{len(by_prompt)} prompts" if len(by_prompt) > SHOWN_PROMPTS else ""
    return html.card(
        "Samples while training", shown, note and f"the first {SHOWN_PROMPTS} of {note}"
    )


def forgetting(run: Folder) -> str:
    """Show what the model lost on general text."""
    found = run.mapping("forgetting")
    if not found:
        return ""
    rows = [
        ["before training", f"{number(found.get('before')):.4f}"],
        ["after training", f"{number(found.get('after')):.4f}"],
        ["change", _flag(f"{number(found.get('change')):+.1%}", bool(found.get("flagged")))],
    ]
    label = "Loss on general text, in nats per byte"
    return html.card("Forgetting", html.table([], rows, label), label[0].lower() + label[1:])


def _flag(value: str, flagged: bool) -> str:
    return f'<td class="{"alert" if flagged else "ok"}">{html.text(value)}</td>'


def audit(run: Folder) -> str:
    """Show how rows became samples."""
    found = run.json(record.AUDIT)
    parts = found.get("parts", found)
    return html.card("Data", html.figures(parts, histogram, 3)) if parts else ""


def choices(run: Folder) -> str:
    """Show what auto has chosen, and why."""
    rows = [
        [html.text(key), html.text(hidden(said.get("value"))), html.text(said.get("reason", ""))]
        for key, said in run.mapping("choices").items()
        if isinstance(said, dict)
    ]
    if not rows:
        return ""
    return html.card(
        "What auto chose", html.table(["setting", "value", "because"], rows, "Choices", "text")
    )


def checkpoints(run: Folder) -> str:
    """List the checkpoints with their sizes, and say which has the best evaluation."""
    best = run.mapping("best")
    metric = str(best.get("metric", "eval_loss"))
    smallest = run.best(metric)
    best_step = number(best["step"]) if "step" in best else smallest[0] if smallest else None
    evaluated = dict(run.points(metric))
    rows = []
    for step, size in run.checkpoints():
        value = evaluated.get(float(step))
        rows.append(
            [
                f"checkpoint-{step}",
                html.amount(size),
                "-" if value is None else f"{value:.4f}",
                '<td class="best">best</td>' if step == best_step else "",
            ]
        )
    weights = record.weights(run.path)
    for folder in filter(None, (weights, run.path / record.MERGED)):
        if folder.is_dir():
            written = best.get("written") and folder == weights
            rows.append(
                [
                    folder.name,
                    html.amount(sum_of(folder)),
                    "",
                    "of the best step" if written else "",
                ]
            )
    if not rows:
        return ""
    return html.card("Weights", html.table(["folder", "size", metric, ""], rows, "Checkpoints"))


def sum_of(folder: Path) -> int:
    """Sum the bytes of the files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def events(run: Folder) -> str:
    """List starts, ends and alerts of the run in their order."""
    rows = [
        [
            when(stop.get("time")),
            f"step {html.text(stop.get('step', '?'))}",
            html.text(stop.get("status", "")),
            html.text(stop.get("reason") or ""),
        ]
        for stop in run.run.get("stops", [])
        if isinstance(stop, dict)
    ]
    for entry in run.run.get("resumed", []):
        if isinstance(entry, dict):
            allowed = ", ".join(map(str, entry.get("allowed") or []))
            ranks = entry.get("ranks", "?")
            rows.append(
                [
                    when(entry.get("time")),
                    html.text(entry.get("from", "?")),
                    "resumed",
                    html.text(f"on {ranks} ranks" + (f"; allowed: {allowed}" if allowed else "")),
                ]
            )
    alerts = run.lines(record.ALERTS)
    rows += [
        [
            when(alert.get("time")),
            f"step {html.text(alert.get('step', '?'))}",
            f'<td class="alert">{html.text(alert.get("kind", "alert"))}</td>',
            html.text(alert.get("message", "")),
        ]
        for alert in alerts[:SHOWN_ALERTS]
    ]
    if not rows:
        return ""
    rows.sort(key=lambda row: row[0])
    note = (
        f"the first {SHOWN_ALERTS} of {len(alerts):,} alerts" if len(alerts) > SHOWN_ALERTS else ""
    )
    head = ["time", "where", "what", ""]
    return html.card("Stops, resumes and alerts", html.table(head, rows, "Events", "text"), note)


def profile(run: Folder) -> str:
    """Show the table of the slowest operations: profile=torch."""
    shown = ""
    for path in sorted((run.path / record.PROFILE).glob("operations_rank*.txt"))[:2]:
        lines = run.text(f"{record.PROFILE}/{path.name}", 40_000).splitlines()[:SHOWN_OPERATIONS]
        body = html.text("\n".join(line[:240] for line in lines))
        label = html.text(path.stem.replace("_", " of "))
        shown += f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        shown += f'<pre style="white-space:pre">{body}</pre></div>\n'
    return html.card("Slowest operations", shown)


def merged(run: Folder) -> str:
    """Show the report of the merge."""
    found = run.json(f"{record.MERGED}/{MERGE_REPORT}")
    if not found:
        return ""
    passed = found.get("passed")
    verdict = {True: "verified", False: "failed", None: "not verified"}.get(passed, str(passed))
    flat = {key: value for key, value in flatten(found).items() if key != "passed"}
    rows = [["verification", _flag(verdict, passed is not True)]]
    rows += [
        [html.name(key.replace(".", ": ")), html.cell(value, key)] for key, value in flat.items()
    ]
    return html.card("Merge", html.table([], rows, "Report of the merge", "text"))


def settings(run: Folder) -> str:
    """List the settings that differ from their defaults."""
    defaults = flatten(dataclasses.asdict(Config()))
    rows = [
        [
            html.text(key),
            html.text(hidden(value)),
            html.text(hidden(defaults[key])) if key in defaults else "-",
        ]
        for key, value in run.flat().items()
        if defaults.get(key, ...) != value and not (value in ({}, []) and key not in defaults)
    ]
    if not rows:
        return ""
    table = html.table(["setting", "value", "default"], rows, "Settings", "text")
    return html.card("Settings that differ from their defaults", table)


def machine(run: Folder) -> str:
    """List versions and hardware."""
    facts = {**run.mapping("hardware"), "ranks": run.run.get("ranks"), "git": run.run.get("git")}
    facts = {key: value for key, value in facts.items() if value not in (None, [])}
    tables = ""
    for label, found in (("versions", run.mapping("versions")), ("hardware", facts)):
        rows = [[html.name(key), html.cell(value, key)] for key, value in found.items()]
        if rows:
            tables += f"<div>{html.table([label, ''], rows, label)}</div>\n"
    return html.card(
        "Software and machine", f'<div class="columns">{tables}</div>' if tables else ""
    )


def again(run: Folder) -> str:
    """Show the command of the run."""
    command = run.run.get("command")
    if not isinstance(command, str):
        return ""
    shown = html.text(PASSWORD.sub("***@", command))
    return html.card("The command", f'<pre class="command">{shown}</pre>\n')


def damaged(run: Folder) -> Iterator[str]:
    """Yield what could not be read."""
    for name, what in run.damaged.items():
        yield f"{name}: {what}"
