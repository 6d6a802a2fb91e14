"""What a run has done, beside its curves: samples, forgetting, weights, stops and alerts.

Each function returns a card of the page; "" if nothing is known.
"""

from __future__ import annotations

import itertools
from typing import Any

from sft import html
from sft.report.folder import Folder, mappings, number, size
from sft.report.words import flag, rounded, when
from sft.run import record

PROMPTS, ANSWERS, ALERTS, OPERATIONS = 8, 8, 50, 20  # at most shown


def samples(run: Folder) -> str:
    """Show answers that were generated while training, by prompt and step."""
    by_prompt: dict[Any, list[dict[str, Any]]] = {}
    for answer in run.lines(record.SAMPLES):
        by_prompt.setdefault(answer.get("index"), []).append(answer)
    shown = "".join(_sample(answers) for answers in itertools.islice(by_prompt.values(), PROMPTS))
    note = f"the first {PROMPTS} of {len(by_prompt):,} prompts" if len(by_prompt) > PROMPTS else ""
    return html.card("Samples while training", shown, note)


def _sample(answers: list[dict[str, Any]]) -> str:
    """Show one prompt and its answers: the first, the last, and some in equal distances."""
    answers = sorted(answers, key=lambda answer: number(answer.get("step")))
    last = answers[-1]
    same = [list(group) for _, group in itertools.groupby(answers, lambda one: one.get("answer"))]
    every = max(1.0, (len(same) - 1) / (ANSWERS - 1))
    places = dict.fromkeys(round(every * place) for place in range(ANSWERS))
    rows = [("prompt", last.get("prompt"), "")]
    rows += [("right answer", last["reference"], "")] if last.get("reference") is not None else []
    for place in places:
        if place < len(same):
            first, answer = same[place][0], same[place][-1]
            steps = f"step {html.figure(first.get('step'))}"
            if first is not answer:
                steps = f"{steps} to {html.figure(answer.get('step'))}"
            cut = "" if answer.get("stopped", True) else " <small>cut at the limit</small>"
            rows.append((steps, answer.get("answer"), cut))
    shown = "".join(
        f"<dt>{html.text(name)}</dt><dd><pre>{html.long_text(said, 600)}</pre>{note}</dd>\n"
        for name, said, note in rows
    )
    return f'<div class="sample"><dl>\n{shown}</dl></div>\n'


def forgetting(run: Folder) -> str:
    """Show what the model has lost on general text."""
    found = run.mapping("forgetting")
    if not found:
        return ""
    change = f"{number(found.get('change')):+.1%}"
    rows = [
        ["before training", f"{number(found.get('before')):.4f}"],
        ["after training", f"{number(found.get('after')):.4f}"],
        ["change", flag(change, bool(found.get("flagged")))],
    ]
    note = "loss on general text, in nats per byte"
    return html.card("Forgetting", html.table([], rows, note), note, "half")


def weights(run: Folder) -> str:
    """List checkpoints, adapter and merged model with their sizes, and say which is the best."""
    best = run.mapping("best")
    metric = str(best.get("metric", "eval_loss"))
    smallest = run.best(metric)
    best_step = number(best.get("step")) if best else smallest[0] if smallest else None
    evaluated = dict(run.points(metric))
    rows = []
    for step, length in run.checkpoints():
        found = evaluated.get(float(step))
        value = "-" if found is None else rounded(found)
        mark = '<td class="note best">best</td>' if step == best_step else ""
        rows.append([f"checkpoint-{step}", html.amount(length), value, mark])
    trained = record.weights(run.path)
    for folder in (trained, run.path / record.MERGED):
        if folder is not None and folder.is_dir():
            note = ""
            if best.get("written") and folder == trained:
                note = f'<td class="note">of step {html.text(best.get("step"))}, the best</td>'
            rows.append([folder.name, html.amount(size(folder)), "", note])
    if not rows:
        return ""
    head = ["folder", "size", html.text(metric), ""]
    table = html.table(head, rows, "Checkpoints and weights")
    return html.card("Weights", table, kind="half")


def events(run: Folder) -> str:
    """List the stops, resumes and alerts of a run, by step."""
    rows: list[tuple[float, list[str]]] = []
    for stop in run.entries("stops"):
        status, reason = (html.text(stop.get(key) or "") for key in ("status", "reason"))
        rows.append((number(stop.get("step")), [when(stop.get("time")), status, reason]))
    for entry in run.entries("resumed"):
        name = str(entry.get("from", ""))
        allowed = "; ".join(map(str, entry.get("allowed") or []))
        ranks = entry.get("ranks")
        said = f"from {name}, on {ranks} rank{'s' * (ranks != 1)}"
        said += f"; allowed: {allowed}" if allowed else ""
        step = float(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else 0.0
        rows.append((step, [when(entry.get("time")), "resumed", html.text(said)]))
    alerts = run.lines(record.ALERTS)
    for alert in alerts[:ALERTS]:
        kind = flag(f"alert: {str(alert.get('kind')).replace('_', ' ')}", True)
        said = str(alert.get("message", "")).removeprefix(f"step {alert.get('step')}: ")
        rows.append((number(alert.get("step")), [when(alert.get("time")), kind, html.text(said)]))
    if not rows:
        return ""
    rows.sort(key=lambda row: row[0])
    note = f"the first {ALERTS} of {len(alerts):,} alerts" if len(alerts) > ALERTS else ""
    cells = [[html.figure(int(step)) if step == step else "-", *row] for step, row in rows]
    head = ["step", "time", "what", "why"]
    return html.card(
        "Stops, resumes and alerts",
        html.table(head, cells, "Stops and alerts", "text stacks events"),
        note,
    )


def profile(run: Folder) -> str:
    """Show the phases of the recorded steps and the slowest operations: profile=torch."""
    shown = ""
    for path in sorted((run.path / record.PROFILE).glob("operations_rank*.json"))[:2]:
        found = run.json(f"{record.PROFILE}/{path.name}")
        phases = [
            [html.text(phase.get("name")), f"{number(phase.get('seconds')):.4g}"]
            for phase in mappings(found.get("phases"))
        ]
        operations = [
            [
                f"<code>{html.text(operation.get('name'))}</code>",
                f"{number(operation.get('share')):.1%}",
                html.cell(operation.get("calls")),
                f"{number(operation.get('cpu_seconds')):.4g}",
                f"{number(operation.get('cuda_seconds')):.4g}",
            ]
            for operation in mappings(found.get("operations"))[:OPERATIONS]
        ]
        rank = path.stem.removeprefix("operations_rank")
        label = f"rank {rank}, steps {html.figure(found.get('steps'))}"
        head = ["operation", "share", "calls", "CPU, s", "GPU, s"]
        shown += f"<h3>{html.text(label).capitalize()}</h3>\n"
        shown += html.table(["phase", "seconds"], phases, f"Phases of {label}")
        shown += html.table(head, operations, f"Operations of {label}")
    return html.card("Slowest operations", shown)
