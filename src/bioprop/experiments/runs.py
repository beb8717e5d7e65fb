"""Reading back what a run wrote."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from bioprop.errors import UserError


class Run(NamedTuple):
    """A finished run.

    Attributes:
        algorithm: name of the algorithm's class.
        test_accuracy: fraction of the test images classified right, by the best checkpoint.
        val_accuracy: the same on the validation images, after each epoch.
        angles: by name of stage, degrees between update and BP gradient after each epoch.
        seconds: wall-clock seconds of training, for each epoch.
    """

    algorithm: str
    test_accuracy: float
    val_accuracy: Sequence[float]
    angles: Mapping[str, Sequence[float]]
    seconds: Sequence[float]

    @property
    def mean_angle(self) -> float:
        """Degrees, the mean over stages and epochs; every stage counts the same, whatever the size of its gradient."""
        return fmean(fmean(course) for course in self.angles.values())

    @property
    def seconds_per_epoch(self) -> float:
        """The mean over epochs, the first left out where there are more: it pays for warming up."""
        return fmean(self.seconds[1:] or self.seconds)


def read_run(algorithm: str, metrics: Path, test_accuracy: float) -> Run:
    """Read the ``metrics.csv`` that Lightning's CSVLogger wrote during ``bioprop fit``.

    Args:
        algorithm: name to give the run.
        metrics: path of the file.
        test_accuracy: result of ``bioprop test``.

    Raises:
        UserError: if the file is missing or holds no finished epoch.
    """
    if not metrics.is_file():
        raise UserError(f"{metrics} does not exist: the run has not logged anything there")
    with metrics.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if int(row["epoch"]) >= 0]  # -1: before training
    stages = [
        name.removeprefix("angle/") for name in (rows or [{}])[0] if name.startswith("angle/") and "overall" not in name
    ]
    run = Run(
        algorithm,
        test_accuracy,
        _column(rows, "val/accuracy"),
        {stage: _column(rows, f"angle/{stage}") for stage in stages},
        _column(rows, "train/seconds"),
    )
    if not run.seconds or not run.val_accuracy or not all(run.angles.values()):
        raise UserError(f"{metrics} holds no finished epoch with validation accuracy, angles and seconds")
    return run


def _column(rows: Sequence[Mapping[str, str]], name: str) -> list[float]:
    """The values of a column; rows of other kinds of measurement leave it empty."""
    return [float(row[name]) for row in rows if row.get(name)]
