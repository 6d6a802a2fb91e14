"""Convert keys to settings, with a line for each key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sft.config.foreign import DEFAULT, DIFFERS, UNKNOWN, Key, Outcome, listed, off, same
from sft.config.names import GROUPS

# Keys that decide when several give one setting, and keys that give way.
STRONG = (
    *("cosine_min_lr_ratio", "excess_length_strategy", "lora_target_linear", "neat_packing"),
    *("tokens", "add_tokens"),
)
WEAK = ("dtype", "torch_dtype", "compute_dtype", "bnb_4bit_compute_dtype")


@dataclass
class Line:
    """What became of one key.

    Attributes:
        key: The key, such as ``datasets[0].path``.
        value: Its value.
        outcome: What became of it.
        given: Whether the file has the key; False: the other tool's default.
        secret: Whether the value must not be shown.
    """

    key: str
    value: Any
    outcome: Outcome
    given: bool = True
    secret: bool = False


@dataclass
class Conversion:
    """Settings, and the lines that say where they are from.

    Attributes:
        table: The keys of the tool.
        keys: The keys of the file, with those defaults of the tool that the file leaves out.
        gpus: The number of GPUs that the other tool trains on.
        calls: The calls of a script.
        settings: Settings and options of groups.
        wanted: Settings that are taken if no key gives them.
        kind: How rows become text: chat, alpaca, completion or text.
    """

    table: Mapping[str, Key]
    keys: dict[str, Any]
    gpus: int = 1
    calls: frozenset[str] = frozenset()
    lines: list[Line] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    wanted: dict[str, Any] = field(default_factory=dict)
    kind: str = "chat"

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a key; a key without a value counts as left out."""
        value = self.keys.get(name)
        return default if value is None else value

    def add(self, key: str, value: Any, outcome: Outcome, given: bool = True) -> Outcome:
        """Take over the settings of a key; where another key has decided, that one remains."""
        secret = (entry := self.entry(key)) is not None and entry.secret
        other = [
            name
            for name, ours in outcome.settings.items()
            if name in self.settings and self.settings[name] != ours
        ]
        if other:
            left = {name: ours for name, ours in outcome.settings.items() if name not in other}
            by = ", ".join(self.decided(name) for name in other)
            note = f"{' and '.join(other)} is decided by {by}"
            outcome = replace(
                outcome, settings=left, note=note, kind=outcome.kind if left else DEFAULT
            )
        self.settings |= outcome.settings
        self.wanted = {**outcome.also, **self.wanted}
        self.lines.append(Line(key, value, outcome, given, secret))
        return outcome

    def decided(self, setting: str) -> str:
        """Return the key that gave a setting."""
        return next((line.key for line in self.lines if setting in line.outcome.settings), "sft")

    def drop(self, setting: str, note: str) -> None:
        """Take a setting back that has no effect, in the other tool either."""
        self.settings.pop(setting, None)
        for line in self.lines:
            if setting in line.outcome.settings:
                rest = {k: v for k, v in line.outcome.settings.items() if k != setting}
                kind = line.outcome.kind if rest else DEFAULT
                line.outcome = replace(line.outcome, settings=rest, kind=kind, note=note)

    def mark(self, key: str, outcome: Outcome) -> None:
        """Replace what became of a key whose settings were not taken over."""
        for line in self.lines:
            if line.key == key:
                for setting in line.outcome.settings:
                    self.settings.pop(setting, None)
                self.settings |= outcome.settings
                line.outcome = outcome

    def plain(self, name: str, value: Any, given: bool) -> None:
        """Convert a key by the table alone."""
        entry = self.entry(name)
        if entry is None and value is None:
            self.add(name, value, same("is empty, and sets nothing"), given)
            return
        unknown = Outcome(UNKNOWN, note="unknown to sft import: see the other tool's manual")
        self.add(name, value, entry.of(value) if entry else unknown, given)

    def entry(self, name: str) -> Key | None:
        """Return the table's entry of a key, by its full name or, for a script's, by its last."""
        return self.table.get(name) or self.table.get(name.rpartition(".")[2])


Special = Callable[[Conversion, str, Any, bool], None]


def convert_keys(
    conversion: Conversion, given: Mapping[str, Any], special: Mapping[str, Special]
) -> None:
    """Convert every key: strong keys first, and those that are off or weak last.

    Args:
        conversion: Gets lines and settings.
        given: The keys of the file; the conversion's ``keys`` has the tool's defaults too.
        special: Functions for keys that need more than the table.
    """

    def rank(name: str) -> int:
        leaf = name.rpartition(".")[2]
        value = conversion.keys[name]
        weak = leaf in WEAK or value is False or str(value).lower() == "false"
        return 0 if leaf in STRONG else 3 if name not in given else 2 if weak else 1

    for name in sorted(conversion.keys, key=rank):
        leaf = name.rpartition(".")[2]
        value, is_given = conversion.keys[name], name in given
        convert = special.get(name) or special.get(leaf) or Conversion.plain
        convert(conversion, name, value, is_given)
    order = {name: place for place, name in enumerate(conversion.keys)}
    conversion.lines.sort(
        key=lambda line: order.get(line.key, order.get(line.key.partition("[")[0], 0))
    )


def batch(micro: str, accumulation: str) -> dict[str, Special]:
    """Return the functions for the micro-batch and the accumulation of gradients."""

    def accumulated(conversion: Conversion, name: str, value: Any, given: bool) -> None:
        rows, steps, gpus = conversion.get(micro), value, conversion.gpus
        if not isinstance(rows, int) or not isinstance(steps, int):
            reason = f"the batch is {micro} x {name} x GPUs, of which one is not known: "
            conversion.add(name, value, off(f"{reason}train.global_batch_size=N"), given)
            return
        note = (
            f"{rows} x {steps} x {gpus} {'GPU' if gpus == 1 else 'GPUs'}; sft divides the global "
            "batch by the GPUs that it finds, so it stays the same"
        )
        outcome = Outcome(DIFFERS, {"train.global_batch_size": rows * steps * gpus}, note)
        conversion.add(name, value, outcome, given)

    return {accumulation: accumulated}


def tokens(*names: str) -> dict[str, Special]:
    """Return the functions for keys that each add tokens: the first adds those of all of them."""

    def added(conversion: Conversion, name: str, value: Any, given: bool) -> None:
        found: list[Any] = []
        for other in names:
            more = conversion.get(other)
            more = more.get("additional_special_tokens") if isinstance(more, dict) else more
            found += [token for token in listed(more or []) if token not in found]
        conversion.plain(name, found if value else value, given)
        conversion.lines[-1].value = value

    return {names[0]: added}


def embedding_rate(conversion: Conversion, name: str, value: Any, given: bool) -> None:
    """Convert LoRA+'s rate of adapters on the embedding, which has no effect without these."""
    targets = f"{conversion.get('lora_target_modules')} {conversion.get('lora_target')}"
    if value and "emb" not in targets and "wte" not in targets:
        note = "has no effect: no adapter is on the embedding"
        conversion.add(name, value, same(note), given)
    else:
        conversion.plain(name, value, given)


def texts(conversion: Conversion, template: str | None) -> None:
    """Choose the options of the groups model, dataset and template, by the kind of the rows."""
    settings = conversion.settings
    kind = conversion.kind
    settings["dataset"] = {"chat": "chat", "text": "text"}.get(kind, "jsonl")
    if "dataset.mix" in settings:
        settings["dataset"] = "mix"
    settings["template"] = settings.get("template") if kind == "chat" else None
    settings["template"] = settings["template"] or kind
    if settings.get("model.name_or_path"):
        settings["model"] = "hf"
    if kind != "chat":
        for line in conversion.lines:
            if line.key == template and line.outcome.settings:
                line.outcome = same(f"rows of this kind have no chat template (template={kind})")
        for name in ("chat_template", "system", "kwargs"):
            settings.pop(f"template.{name}", None)
    if kind == "text":
        plain_text(conversion)


def plain_text(conversion: Conversion) -> None:
    """Choose the packing of plain text, of which every token is trained."""
    settings = conversion.settings
    settings.pop("template.train_on", None)
    if settings.get("dataset.packing") == "bfd":
        note = "plain text is joined and cut; documents never attend to each other"
        key = conversion.decided("dataset.packing")
        conversion.mark(key, Outcome(DIFFERS, {"dataset.packing": "wrapped"}, note))
        conversion.wanted.pop("dataset.overlong", None)
    elif "dataset.packing" not in settings:
        conversion.wanted.setdefault("dataset.packing", "none")


def finished(conversion: Conversion) -> dict[str, Any]:
    """Return all settings: options of groups first, then the settings of each section."""
    settings = {**conversion.wanted, **conversion.settings}
    groups = {name: value for name, value in settings.items() if name in GROUPS}
    rest = {name: value for name, value in settings.items() if name not in GROUPS}
    order = sorted(rest, key=lambda name: (SECTIONS.index(name.partition(".")[0]), name))
    return {name: groups[name] for name in GROUPS if name in groups} | {
        name: rest[name] for name in order
    }


SECTIONS = ("run_name", "output_dir", "overwrite", "seed", "precision", *GROUPS, "resume")
