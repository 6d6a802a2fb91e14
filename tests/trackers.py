"""What trackers have of a run, read back from their own files with their own readers."""

import json
import sqlite3
import struct
from collections import Counter
from pathlib import Path
from typing import Any

LOSS = "train/loss"


def tensorboard(run: Path) -> Counter[tuple[str, int]]:
    """Count the scalars of TensorBoard's event files by name and step."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: Counter[tuple[str, int]] = Counter()
    for file in run.glob("events.out.tfevents.*"):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "scalars":
                    found[value.tag, event.step] += 1
    return found


def wandb_records(run: Path) -> list[Any]:
    """Read the records of W&B's offline recordings: LevelDB's log format, without its checksums."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for file in run.glob("wandb/offline-run-*/*.wandb"):
        content, at, record = file.read_bytes(), 7, b""
        while at + 7 <= len(content):
            if 32768 - at % 32768 < 7:  # a header does not cross a block
                at += 32768 - at % 32768
                continue
            _, size, kind = struct.unpack("<IHB", content[at : at + 7])
            record += content[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4) and size:  # whole, or the last part
                records.append(Record.FromString(record))
                record = b""
    return records


def wandb(run: Path) -> Counter[tuple[str, int]]:
    """Count the figures of W&B's history by name and step."""
    found: Counter[tuple[str, int]] = Counter()
    for record in wandb_records(run):
        row = {i.key or i.nested_key[0]: i.value_json for i in record.history.item}
        for name in row.keys() - {"step", "time"}:
            if "/" in name:
                found[name, json.loads(row["step"])] += 1
    return found


def mlflow(run: Path) -> Counter[tuple[str, int]]:
    """Count the values in MLflow's database by name and step."""
    with sqlite3.connect(run.parent / "mlflow.db") as database:
        return Counter(database.execute("select key, step from metrics").fetchall())


def trackio(run: Path) -> Counter[tuple[str, int]]:
    """Count the figures in Trackio's database by name and step."""
    from trackio.sqlite_storage import SQLiteStorage

    with sqlite3.connect(SQLiteStorage.get_project_db_path("sft")) as database:
        rows = database.execute("select step, metrics from metrics").fetchall()
    return Counter((name, step) for step, text in rows for name in json.loads(text) if "/" in name)


READERS = {"tensorboard": tensorboard, "wandb": wandb, "mlflow": mlflow, "trackio": trackio}
