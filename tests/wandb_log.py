"""Reads the log that W&B writes in offline mode, with W&B's own message types: what an upload would hold."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, RECORD_HEADER = 32768, 7, 7  # bytes, of the file format: LevelDB's log


class WandbLog:
    """One offline run: its name, tags, config, metric definitions, history, summary and exit code (None: not ended)."""

    def __init__(self, path: Path) -> None:
        self.name, self.tags, self.exit_code, self.sweep = "", [], None, ""
        self.config: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.steps: dict[str, str] = {}
        for record in _records(path):
            if record.HasField("run"):
                self.name, self.tags, self.sweep = record.run.display_name, list(record.run.tags), record.run.sweep_id
                self.config |= _values(record.run.config.update)
            elif record.HasField("config"):
                self.config |= _values(record.config.update)
            elif record.HasField("history"):
                self.history.append(_values(record.history.item))
            elif record.HasField("summary"):
                self.summary |= _values(record.summary.update)
            elif record.HasField("metric"):
                self.steps[record.metric.name or record.metric.glob_name] = record.metric.step_metric
            elif record.HasField("exit"):
                self.exit_code = record.exit.exit_code

    def course(self, metric: str) -> list[Any]:
        """The values of a metric, in order."""
        return [row[metric] for row in self.history if metric in row]


def offline_runs(folder: Path) -> dict[str, WandbLog]:
    """All runs below a folder that W&B was told to write into, by id."""
    wandb.teardown()  # ends W&B's own process, which may not have written the last records yet
    return {
        path.stem.removeprefix("run-"): WandbLog(path) for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    }


def _values(items: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}


def _records(path: Path) -> Iterator[Any]:
    data, position, parts = path.read_bytes(), FILE_HEADER, b""
    while position + RECORD_HEADER <= len(data):
        rest_of_block = BLOCK - position % BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if rest_of_block < RECORD_HEADER or kind == 0:  # padding
            position += rest_of_block
            continue
        parts += data[position + RECORD_HEADER : position + RECORD_HEADER + length]
        position += RECORD_HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record
