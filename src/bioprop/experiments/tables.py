"""Tables of runs, for the screen and for other programs."""

import csv
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from bioprop.experiments.runs import Run

COLUMNS = ("algorithm", "test_accuracy", "mean_angle", "seconds_per_epoch")


def write_table(runs: Sequence[Run], path: Path) -> None:
    """Write one row a run: accuracy as a fraction, the mean angle in degrees, seconds per epoch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for run in runs:
            numbers = (run.test_accuracy, run.mean_angle, run.seconds_per_epoch)
            writer.writerow((run.algorithm, *(f"{number:.4f}" for number in numbers)))


def screen_table(runs: Sequence[Run], title: str) -> Table:
    """Lay the same numbers out for a person."""
    table = Table(title=title, caption="angle: between update and BP gradient, mean over stages and epochs")
    table.add_column("algorithm")
    for heading in ("test accuracy", "angle to BP", "seconds per epoch"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            run.algorithm,
            f"{100 * run.test_accuracy:.2f} %",
            f"{run.mean_angle:.1f}°",
            f"{run.seconds_per_epoch:.2f}",
        )
    return table
