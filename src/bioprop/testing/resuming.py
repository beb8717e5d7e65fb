"""Comparison of two runs, bit for bit: everything their last checkpoints hold, and what they logged."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: What an interruption may change: the clock.
WALL_CLOCK = "seconds"


def differences(one: Path, other: Path) -> list[str]:
    """Names of what differs between the last checkpoints and the metrics of two runs, given their folders."""
    first, second = (
        torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
        for folder in (one, other)
    )
    found = [name for name in _differing(first, second, str(one), str(other)) if WALL_CLOCK not in name]
    rows, others = read_metrics(one), read_metrics(other)
    if rows != others:
        found.append(f"metrics.csv: {rows} and {others}")
    return found


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """Read the metrics of a run, but for those of the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if WALL_CLOCK not in name} for row in csv.DictReader(file)]


def _differing(one: Any, other: Any, folder: str, other_folder: str, name: str = "") -> Iterator[str]:
    if type(one) is not type(other):
        yield name
    elif isinstance(one, Mapping):
        one = {str(key).replace(folder, ""): value for key, value in one.items()}
        other = {str(key).replace(other_folder, ""): value for key, value in other.items()}
        yield from (f"{name}.{key}" for key in one.keys() ^ other.keys())
        for key in one.keys() & other.keys():
            yield from _differing(one[key], other[key], folder, other_folder, f"{name}.{key}")
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield name
        for place, (item, counterpart) in enumerate(zip(one, other, strict=False)):
            yield from _differing(item, counterpart, folder, other_folder, f"{name}.{place}")
    elif isinstance(one, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape or not torch.equal(one, other):
            yield name
    elif isinstance(one, str):
        if one.replace(folder, "") != other.replace(other_folder, ""):
            yield name
    elif one != other and not (one != one and other != other):  # nan is nan
        yield name
