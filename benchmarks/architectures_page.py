"""Write docs/architectures.md from the results of architectures.py.

python benchmarks/architectures_page.py FOLDER ... > docs/architectures.md

Each folder is what ``--keep`` of that script left; a later folder's result replaces an earlier one.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import transformers

DRAFT = "a draft model for speculative decoding: it reads its target's states and takes no tokens"
CODES = "Transformers cannot build it from its own config; it predicts codes of audio, not text"
REASONS = {
    "gemma3n": "its vision tower needs the packages timm and pillow; gemma3n_text is in the table",
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), DRAFT),
    **dict.fromkeys(("musicgen", "musicgen_melody"), CODES),
}
WEAK = 0.3
EXACT = 1e-5  # the bound that is not written beside a figure
FOLDER = r"/\S*/(?=[\w-]+-(?:fp32|bf16)/)"  # in messages: where the runs were
LATER = ("eval", "merge", "answers")
PARTS = ("default", "other", "packed", *LATER)
HEAD = """# Architectures

Every type of causal language model that Transformers {version} lists, as a model of a few thousand
parameters with random weights, on a CPU. One step of `sft.train` is compared with Transformers and
PEFT alone: eager attention, one document at a time, autograd on the model's own logits. Documents
are longer than all windows and chunks.

- **gradient**: the distance of the adapter's gradients, as a share of their length, with the
  default settings, and whether these join documents into one row or pad them. The bound in float32
  is 1e-5. Where it is larger, the figure has its **bound** beside it: in float32, 4 times the
  distance of plain float32 from float64; in bf16, twice the distance of plain bf16 from plain
  float32 with the same weights, or 2^-7. (Beyond that, the means over five sets of documents are
  compared.) So bf16 shows gross faults only, such as a leak, and float32 shows small ones. Where an
  indexer or a router chooses by scores that nearly tie, or a layer amplifies rounding, plain bf16
  is so far from float32 that bf16 shows little. Types whose bound is above 0.3 are marked "weak",
  and only float32 shows that their gradient is right.
- **other** and **packed**: the same with the other value of `train.padding_free` (float32 only),
  and with `dataset.packing=bfd`. "refused" is said before the first step; with the default settings
  the rows are then padded.
- **eval**: the first evaluation loss, as a share of the loss.
- **merge**: the largest difference of a logit between the merged model and the base with the
  adapter as it was when training ended, both computed by Transformers and PEFT alone, as a share of
  the largest logit. The bound is 1e-5 in float32, or 4 times the same figure of PEFT's own merge;
  in bf16 it is twice that figure, or 2^-7.
- **answers**: prompts answered in a batch and alone; 0 is equal. Otherwise two tokens nearly tied:
  the difference of their logits as a share of the largest one, at most 1e-5, or 2^-5 in bf16.

A type is "exact" if all of these are within their bounds, "refused" if sft says before training
that it cannot, and "wrong" otherwise. A refusal after training is wrong too. The tests plant a
gradient that is 1 % off in one of 14 adapters, and positions that no guard caught, and see "wrong".

{counts}

    python benchmarks/architectures.py --workers 2 --write docs/architectures.md

Convolutions and recurrent states (LFM2, Qwen3.5, Qwen3-Next, Granite 4, Falcon-H1, Nemotron-H)
get the boundaries of documents (`cu_seq_lens_q`, `seq_idx`) on a GPU where their kernels
(`causal_conv1d`, `fla`, `mamba_ssm`) are installed; elsewhere their rows are padded. Before the
first step, sft proves on the model itself that it is causal, that padding changes nothing, and that
no document in a row changes another.

"""


def total(result: dict[str, Any]) -> str:
    if "build" in result:
        return "not built"
    found = [result[part]["verdict"] for part in PARTS if part in result]
    if result["default"]["verdict"] == "refused":
        return "refused"
    # What is refused after training was not said in time.
    late = [result[part]["verdict"] for part in LATER if part in result]
    return "wrong" if "wrong" in found or "refused" in late else "exact"


def is_weak(result: dict[str, Any]) -> bool:
    """Return whether plain bf16 is so far from float32 that the gradient's figure shows little."""
    return result.get("default", {}).get("bound", 0.0) > WEAK


def cell(result: dict[str, Any], part: str) -> str:
    found = result.get(part)
    if found is None:
        return ""
    if "figure" not in found:
        return str(found["verdict"])
    figure = "0" if found["figure"] == 0 else f"{found['figure']:.0e}"
    if part == "default" and found["bound"] > EXACT:
        figure += f" of {found['bound']:.0e}"
    if found.get("reference") == "sdpa":
        figure += " (sdpa)"
    return figure if found["verdict"] == "exact" else f"**wrong** {figure}"


def notes(result: dict[str, Any]) -> str:
    said = [result["alone"]] if "alone" in result else []
    said += [
        f"{part}: {result[part]['message']}"
        for part in ("default", "eval", "merge", "answers")
        if "message" in result.get(part, {})
    ]
    if result.get("merge", {}).get("rounded"):
        said.append("the merge needs dtype=float32")
    text = re.sub(FOLDER, "RUNS/", "; ".join(said))
    return text.replace("|", "/").replace(" fix:", "; fix:")[:300]


def page(results: list[dict[str, Any]], seconds: float | None = None) -> str:
    lines = []
    for precision, name in (("fp32", "float32"), ("bf16", "bf16")):
        counts = Counter(total(item) for item in results if item["precision"] == precision)
        listed = ", ".join(f"{counts[key]} {key}" for key in ("exact", "refused", "wrong"))
        weak = sum(is_weak(item) for item in results if item["precision"] == precision)
        if weak:
            listed = listed.replace(" exact", f" exact ({weak} of them weak)")
        if counts:
            lines.append(f"- {name}: {listed}; {counts['not built']} could not be built")
    if seconds is not None:
        lines.append(f"- the table took {seconds / 60:.0f} minutes")
    text = HEAD.format(version=transformers.__version__, counts="\n".join(lines))
    columns = ["type", "precision", "verdict", "rows", "gradient", *PARTS[1:]]
    text += f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    built = [item for item in results if "build" not in item]
    for item in built:
        rows = {True: "joined", False: "padded"}.get(item.get("joined"), "")
        said = f"{total(item)} (weak)" if is_weak(item) else total(item)
        cells = [item["kind"], item["precision"], said, rows]
        cells += [cell(item, part) for part in PARTS]
        text += "| " + " | ".join(cells) + " |\n"
    text += "\n## What is said\n\n| type | precision | message |\n|---|---|---|\n"
    for item in built:
        if said := notes(item):
            text += f"| {item['kind']} | {item['precision']} | {said} |\n"
    text += "\n## Not built\n\n| type | precision | reason |\n|---|---|---|\n"
    for item in results:
        if "build" in item:
            reason = REASONS.get(item["kind"], f"Transformers alone raises: {item['build']}")
            text += f"| {item['kind']} | {item['precision']} | {reason[:240].replace('|', '/')} |\n"
    return text


def collect(folders: list[Path]) -> list[dict[str, Any]]:
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for folder in folders:
        for file in sorted(folder.glob("*/result.json"), key=lambda path: path.stat().st_mtime):
            result = json.loads(file.read_text())
            found[result["kind"], result["precision"]] = result
    return [found[key] for key in sorted(found)]


if __name__ == "__main__":
    sys.stdout.write(page(collect([Path(name) for name in sys.argv[1:]])))
