"""Bad folders of runs, and environments in which a command cannot work."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hostile.case import Case
from hostile.models import edit, text

Damage = Callable[[Path], Any]
# The shared run: four steps, with a checkpoint after each second one.
WORDS = (
    *("dataset.max_rows=32", "dataset.max_eval_rows=8", "dataset.exact_match=0"),
    *("train.max_steps=4", "train.save_strategy=steps", "train.save_steps=2"),
    *("train.eval_strategy=no", "train.logging_steps=1"),
)
RESUME = (*WORDS, "output_dir={here}/run")
SHORT = (*WORDS[:3], "train.max_steps=1", "train.save_strategy=no", "train.eval_strategy=no")
GENERATE = ("run={here}/run", "prompt=hi", "max_new_tokens=2")
MERGE = ("run={here}/run",)


def _stopped(damage: Damage) -> Callable[[Path, Path], None]:
    """Copy the run as if it had been stopped after its second step, and damage it."""

    def make(here: Path, kit: Path) -> None:
        run = here / "run"
        shutil.copytree(kit / "run", run)
        shutil.rmtree(run / "adapter")
        shutil.rmtree(run / "checkpoint-4")
        edit(run / "run.json", status="stopped")
        damage(run)

    return make


def _finished(damage: Damage) -> Callable[[Path, Path], None]:
    def make(here: Path, kit: Path) -> None:
        shutil.copytree(kit / "run", here / "run")
        damage(here / "run")

    return make


def _gone(name: str) -> Damage:
    return lambda run: (run / name).unlink()


def _flipped(name: str) -> Damage:
    def damage(run: Path) -> None:
        content = bytearray((run / name).read_bytes())
        content[len(content) // 2] ^= 255
        (run / name).write_bytes(content)

    return damage


def _entries(name: str, **entries: Any) -> Damage:
    return lambda run: edit(run / name, **entries)


def _folder_at(name: str) -> Damage:
    def damage(run: Path) -> None:
        (run / name).unlink()
        (run / name).mkdir()

    return damage


def _renamed(run: Path) -> None:
    (run / "checkpoint-2").rename(run / "checkpoint-999")


def _foreign(run: Path) -> None:
    edit(run / "checkpoint-2" / "manifest.json", run="0" * 32)


def _linked(run: Path) -> None:
    shutil.rmtree(run / "checkpoint-2")
    (run / "checkpoint-2").symlink_to("/etc")


# Aliases of YAML that stand for 9 ** 9 texts.
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
AT = "checkpoint-2/"
# A checkpoint that is not complete may be passed over in favour of an older state, which is said.
RESUMED: dict[str, tuple[Damage, str, bool]] = {
    "an empty record": (text("run.json", ""), "", False),
    "a cut record": (text("run.json", '{"status": "st'), "", False),
    "a record that is a list": (text("run.json", "[]"), "", False),
    "a record of bytes": (text("run.json", b"\xff\xfe\x00"), "", False),
    "a record nested deeply": (text("run.json", "[" * 100_000), "", False),
    "a record of other kinds": (_entries("run.json", identity=[], fingerprints={}), "", False),
    "a record of another base": (_entries("run.json", identity={"base": "0"}), "", False),
    "no record": (_gone("run.json"), "", True),
    "a record that is a folder": (_folder_at("run.json"), "", False),
    "no settings": (_gone("config.yaml"), "", False),
    "empty settings": (text("config.yaml", ""), "", False),
    "settings that are no YAML": (text("config.yaml", "a: [b\n- :"), "", False),
    "settings that are a list": (text("config.yaml", "- 1\n"), "", False),
    "settings with a tag": (text("config.yaml", "a: !!python/object:os.system x\n"), "", False),
    "settings with bombs": (text("config.yaml", BOMB), "", False),
    "an empty manifest": (text(f"{AT}manifest.json", ""), "", True),
    "a manifest that is a list": (text(f"{AT}manifest.json", "[]"), "", True),
    "a manifest without entries": (text(f"{AT}manifest.json", "{}"), "", True),
    "a manifest nested deeply": (text(f"{AT}manifest.json", "[" * 100_000), "", True),
    "a manifest of text": (_entries(f"{AT}manifest.json", ranks="two"), "", True),
    "a manifest of another step": (_entries(f"{AT}manifest.json", step=900), "", True),
    "a manifest of another run": (_foreign, "", False),
    "a manifest of files elsewhere": (
        _entries(f"{AT}manifest.json", files={"../../../etc/passwd": {"bytes": 1, "xxh3": "0"}}),
        "",
        True,
    ),
    "a manifest of unlike files": (_entries(f"{AT}manifest.json", files=[1]), "", True),
    "a missing optimizer": (_gone(f"{AT}optimizer-00001.safetensors"), "", True),
    "a changed optimizer": (_flipped(f"{AT}optimizer-00001.safetensors"), "", True),
    "a changed adapter": (_flipped(f"{AT}adapter_model.safetensors"), "", True),
    "a changed state": (text(f"{AT}state.json", "{}"), "", True),
    "a missing state": (_gone(f"{AT}state.json"), "", True),
    "changed random numbers": (_flipped(f"{AT}random.safetensors"), "", True),
    "a checkpoint of another number": (_renamed, "", True),
    "a checkpoint linked elsewhere": (_linked, "", True),
    "metrics of text": (text("metrics.jsonl", "hello\n"), "", True),
    "metrics that are a folder": (_folder_at("metrics.jsonl"), "", False),
    "a lock that is a folder": (_folder_at("lock"), "", False),
}
CHANGED: dict[str, tuple[tuple[str, ...], str]] = {
    "another rate": (("train.learning_rate=1e-3",), "learning_rate"),
    "another rank of the adapter": (("lora.r=4",), "lora.r"),
    "other data": (("dataset.max_rows=16",), ""),
    "a checkpoint that is not there": (("resume.checkpoint=checkpoint-7",), "checkpoint-7"),
    "a checkpoint elsewhere": (("resume.checkpoint=../../x",), ""),
    "a checkpoint by an absolute path": (("resume.checkpoint=/etc",), ""),
}
USED: dict[str, tuple[Damage, str]] = {
    "nothing there": (lambda run: shutil.rmtree(run), ""),
    "an empty folder": (lambda run: (shutil.rmtree(run), run.mkdir()), ""),
    "no adapter": (lambda run: shutil.rmtree(run / "adapter"), ""),
    "an empty adapter": (
        lambda run: (shutil.rmtree(run / "adapter"), (run / "adapter").mkdir()),
        "",
    ),
    "an adapter that is a file": (
        lambda run: (shutil.rmtree(run / "adapter"), (run / "adapter").write_text("x")),
        "",
    ),
    "an adapter that links to itself": (
        lambda run: (shutil.rmtree(run / "adapter"), (run / "adapter").symlink_to("adapter")),
        "",
    ),
    "a damaged card": (text("adapter/sft.json", "{"), ""),
    "a card nested deeply": (text("adapter/sft.json", "[" * 100_000), ""),
    "a changed adapter": (text("adapter/adapter_model.safetensors", b"x" * 100), ""),
    "a damaged tokenizer": (text("adapter/tokenizer.json", "{"), ""),
    "a damaged template": (text("adapter/chat_template.jinja", "{% for"), ""),
}
MERGED: dict[str, tuple[Damage, str]] = {
    "a damaged record": (text("run.json", "{"), ""),
    "damaged probes": (text("probes.jsonl", "{\n"), ""),
    "probes of other tokens": (text("probes.jsonl", '{"input_ids": [-1], "labels": [5]}\n'), ""),
    "something in its output": (lambda run: (run / "merged").mkdir(), ""),
    "a file as its output": (lambda run: (run / "merged").write_text("x"), ""),
}


def _read_only(name: str) -> Callable[[Path, Path], None]:
    def make(here: Path, kit: Path) -> None:
        folder = (here / name).resolve()
        folder.mkdir(exist_ok=True)
        folder.chmod(0o555)

    return make


def _file_at(name: str) -> Callable[[Path, Path], None]:
    def make(here: Path, kit: Path) -> None:
        target = here / name
        if target.is_dir():
            target.rmdir()
        target.write_text("x")

    return make


def _nothing(here: Path, kit: Path) -> None:
    """Plant nothing."""


def _cwd_gone(here: Path, kit: Path) -> None:
    os.chmod(here, 0o555)


# Where a command trains although something is odd, it says so or it does not matter: accepted.
PLACES: tuple[tuple[str, Callable[[Path, Path], None], dict[str, str], str, bool], ...] = (
    ("a working folder without permission", _cwd_gone, {}, "", False),
    ("an output that is a file", _file_at("outputs"), {}, "", False),
    ("an output without permission", _read_only("outputs"), {}, "", False),
    ("a cache without permission", _read_only("../cache"), {}, "", False),
    ("a cache that is a file", _file_at("../cache"), {}, "", False),
    ("a cache on a device", _nothing, {"SFT_CACHE_DIR": "/dev/null/x"}, "", False),
    ("a home without permission", _read_only("../home"), {"SFT_CACHE_DIR": ""}, "", False),
    ("no home", _nothing, {"HOME": "/nowhere"}, "", True),
    ("no temporary folder", _nothing, {"TMPDIR": "/nowhere"}, "", True),
    ("a disk of 100 kB", _nothing, {"HOSTILE_FILE_BYTES": "100000"}, "", False),
    ("a disk of 0 bytes", _nothing, {"HOSTILE_FILE_BYTES": "0"}, "", False),
    ("RANK of text", _nothing, {"RANK": "one"}, "", False),
    ("RANK without WORLD_SIZE", _nothing, {"RANK": "3"}, "", False),
    ("RANK below 0", _nothing, {"RANK": "-1", "WORLD_SIZE": "2"}, "", False),
    ("RANK above WORLD_SIZE", _nothing, {"RANK": "5", "WORLD_SIZE": "2"}, "", False),
    ("WORLD_SIZE of text", _nothing, {"WORLD_SIZE": "many"}, "", False),
    ("WORLD_SIZE of 0", _nothing, {"WORLD_SIZE": "0"}, "", False),
    ("WORLD_SIZE below 0", _nothing, {"WORLD_SIZE": "-2"}, "", False),
    ("WORLD_SIZE without an address", _nothing, {"WORLD_SIZE": "2", "RANK": "0"}, "", False),
    (
        "MASTER_PORT of text",
        _nothing,
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "http"},
        "",
        False,
    ),
    (
        "MASTER_PORT above 65535",
        _nothing,
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
        "",
        False,
    ),
    ("LOCAL_RANK of text", _nothing, {"RANK": "0", "LOCAL_RANK": "x"}, "", False),
    ("LOCAL_WORLD_SIZE of 0", _nothing, {"RANK": "0", "LOCAL_WORLD_SIZE": "0"}, "", False),
    ("restarts of text", _nothing, {"TORCHELASTIC_RESTART_COUNT": "x"}, "", False),
    ("threads of text", _nothing, {"OMP_NUM_THREADS": "all"}, "", True),
)
COMMANDS: tuple[tuple[str, str, tuple[str, ...], Callable[[Path, Path], None], str], ...] = (
    ("merge: output is a file", "merge", ("run={kit}/run", "output={here}/x"), _file_at("x"), ""),
    (
        "merge: output below a file",
        "merge",
        ("run={kit}/run", "output={here}/x/y"),
        _file_at("x"),
        "",
    ),
    (
        "merge: output on a device",
        "merge",
        ("run={kit}/run", "output=/dev/null/x"),
        _nothing,
        "",
    ),
    (
        "merge: output has no permission",
        "merge",
        ("run={kit}/run", "output={here}/x/y"),
        _read_only("x"),
        "",
    ),
    ("merge: a GPU that is not there", "merge", ("run={kit}/run", "device=cuda"), _nothing, "GPU"),
    (
        "generate: output has no permission",
        "generate",
        ("run={kit}/run", "prompt=hi", "output={here}/x/y.jsonl"),
        _read_only("x"),
        "",
    ),
    (
        "generate: a prompt longer than the positions",
        "generate",
        ("run={kit}/run", "prompt=" + "word " * 5000),
        _nothing,
        "",
    ),
    (
        "generate: a model that is a run",
        "generate",
        ("model={kit}/run", "prompt=hi"),
        _nothing,
        "run",
    ),
    ("generate: a run that is an adapter", "generate", ("run={kit}/run/adapter", "prompt=hi"),
     _nothing, ""),
    ("generate: an adapter that is a run", "generate", ("adapter={kit}/run", "prompt=hi"),
     _nothing, "run="),
    ("generate: rows that are not there", "generate", ("run={kit}/run", "file={here}/x.jsonl"),
     _nothing, ""),
    ("data: output below a file", "data", ("dataset.max_rows=8", "output={here}/x/y"),
     _file_at("x"), ""),
    ("data: a page that is a folder", "data", ("dataset.max_rows=8", "preview=1", "html={here}/x"),
     _read_only("x"), ""),
    ("prove: a model that is not there", "prove", ("model=hf", "model.name_or_path=/nowhere/x"),
     _nothing, ""),
    ("prove: data that are not there", "prove", ("dataset.path=/nowhere/x.jsonl",), _nothing, ""),
    ("sweep: a model that is not there", "train",
     ("-m", "model=hf", "model.name_or_path=/nowhere/x", "lora.r=2,4"), _nothing, ""),
    ("sweep: data that are not there", "train",
     ("-m", "dataset.path=/nowhere/x.jsonl", "lora.r=2,4"), _nothing, ""),
    ("sweep: no place for its trials", "train", ("-m", *SHORT, "lora.r=2,4"),
     _read_only("outputs"), ""),
    ("sweep: a place that cannot be made", "train",
     ("-m", *SHORT, "lora.r=2,4", "hydra.sweep.dir=outputs/x"), _file_at("outputs"), ""),
    ("sweep: a file at its place", "train", ("-m", *SHORT, "lora.r=2,4"), _file_at("outputs"), ""),
    ("sweep: a value that is refused", "train", ("-m", *SHORT, "lora.r=2,0"), _nothing,
     "lora.r=0.*fix: lora.r=2"),
    ("sweep: trials that all fail", "train", ("-m", *SHORT, "lora.target_modules=nothing,neither"),
     _nothing, "no trial of the sweep finished.*matches no module"),
    ("sweep: one name", "train", ("-m", *SHORT, "lora.r=2,4", "run_name=x"), _nothing,
     "fix: run_name=null"),
    ("sweep: one folder", "train", ("-m", *SHORT, "lora.r=2,4", "output_dir=x"), _nothing,
     "fix: output_dir=null hydra.sweep.dir=x"),
    ("a settings file with aliases of aliases", "train", ("bomb.yaml",),
     lambda here, kit: (here / "bomb.yaml").write_text(BOMB), ""),
    ("an option with aliases of aliases", "train", ("--config-dir", "conf", "model=bomb"),
     lambda here, kit: ((here / "conf" / "model").mkdir(parents=True),
                        (here / "conf" / "model" / "bomb.yaml").write_text(BOMB)), ""),
    ("a huge batch", "train", (*SHORT, "train.global_batch_size=100000",
     "train.per_device_train_batch_size=100000"), _nothing, ""),
    ("a rank of a million", "train", (*SHORT, "lora.r=1000000"), _nothing, ""),
    ("a rank of 0 for one module", "train", (*SHORT, "lora.rank_pattern={q_proj: 0}"),
     _nothing, ""),
    ("targets that match nothing", "train", (*SHORT, "lora.target_modules=[nothing]"), _nothing,
     ""),
    ("a tracker without its package", "train", (*SHORT, "train.extra.report_to=[comet_ml]"),
     _nothing, ""),
    ("a long name", "train", (*SHORT, "run_name=" + "x" * 300), _nothing, ""),
    ("a name that climbs", "train", (*SHORT, "model.name_or_path=a/../../../x"), _nothing, ""),
    ("an adapter that is not there", "train", (*SHORT, "lora.init_from={here}/x"), _nothing, ""),
    ("a template that is not there", "train", (*SHORT, "template.chat_template=no_such"),
     _nothing, ""),
    ("a template file that is not there", "train", (*SHORT, "template.chat_template=no.jinja"),
     _nothing, ""),
    ("layers of a group", "train", (*SHORT, "lora.extra.layers_to_transform=[0,7]"),
     _nothing, r"layers \[7\]"),
    ("activations to nowhere", "train", (*SHORT, "train.extra.activation_offloading=true"),
     _nothing, "has no GPU"),
    ("DoRA on 8 bits", "train", (*SHORT, "lora.use_dora=true", "quantization=int8"), _nothing,
     "DoRA on 8-bit layers"),
    ("layers that are not there", "train", (*SHORT, "lora.target_modules=[q_proj]",
     "lora.extra.layers_to_transform=[0,99]"), _nothing, r"layers \[99\]"),
    ("more words than fit", "generate", ("run={kit}/run", "prompt=hi",
     "max_new_tokens=999999999999"), _nothing, ""),
)  # fmt: skip


def build_kit(folder: Path) -> Path:
    """Train the run that the tables share; ``folder`` gets it as ``run``."""
    from warm import run_warm

    folder.mkdir(parents=True, exist_ok=True)
    run_warm("train", *WORDS, f"output_dir={folder}/run", cwd=folder)
    return folder


def cases() -> list[Case]:
    """List the inputs of these tables."""
    found = [
        Case("run folders", f"resume: {name}", "train", RESUME, says, _stopped(damage), {}, odd)
        for name, (damage, says, odd) in RESUMED.items()
    ]
    found += [
        Case(
            "run folders",
            f"resume with {name}",
            "train",
            (*(word for word in RESUME if word.split("=")[0] != words[0].split("=")[0]), *words),
            says,
            _stopped(lambda run: None),
        )
        for name, (words, says) in CHANGED.items()
    ]
    found += [
        Case("run folders", f"{command}: {name}", command, words, says, _finished(damage))
        for name, (damage, says) in USED.items()
        for command, words in (("generate", GENERATE), ("merge", MERGE))
        if (command, name) not in (("merge", "a damaged template"),)
    ]
    found += [
        Case("run folders", f"merge: {name}", "merge", MERGE, says, _finished(damage))
        for name, (damage, says) in MERGED.items()
    ]
    found += [
        Case("environments", name, "train", SHORT, says, make, env, odd)
        for name, make, env, says, odd in PLACES
    ]
    found += [
        Case("environments", name, command, words, says, make)
        for name, command, words, make, says in COMMANDS
    ]
    return found
