"""Pictures of runs, drawn by matplotlib without a screen or a browser."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from bioprop.errors import UserError
from bioprop.experiments.runs import Run

# Okabe & Ito's palette, told apart by colour-blind readers too; markers differ for print
STYLES = (("#000000", "o"), ("#D55E00", "s"), ("#0072B2", "^"), ("#009E73", "D"), ("#CC79A7", "v"), ("#E69F00", "P"))


def draw_comparison(runs: Sequence[Run], path: Path, title: str) -> None:
    """Draw validation accuracy over epochs and the angle of each stage's update to the BP gradient, as a PNG.

    Args:
        runs: of the same network, so that they share the stages.
        path: where the picture goes.
        title: of the whole picture.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    figure.suptitle(title)
    accuracy, angle = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        color, marker = STYLES[number % len(STYLES)]
        epochs = range(1, len(run.val_accuracy) + 1)
        percent = [100 * value for value in run.val_accuracy]
        accuracy.plot(epochs, percent, color=color, marker=marker, markersize=4, label=run.algorithm)
        stages = list(run.angles)
        means = [fmean(course) for course in run.angles.values()]
        spread = [
            [mean - min(course) for mean, course in zip(means, run.angles.values(), strict=True)],
            [max(course) - mean for mean, course in zip(means, run.angles.values(), strict=True)],
        ]
        # a little apart, so that ranges do not hide each other
        places = [place + 0.08 * (number - (len(runs) - 1) / 2) for place in range(len(stages))]
        angle.errorbar(places, means, spread, color=color, marker=marker, capsize=3, label=run.algorithm)
        angle.set_xticks(range(len(stages)), stages)
    accuracy.set(xlabel="epoch", ylabel="validation accuracy (%)", title="Accuracy over epochs")
    accuracy.xaxis.get_major_locator().set_params(integer=True)
    accuracy.legend()
    angle.axhline(90, color="0.6", linestyle=":", linewidth=1)
    angle.annotate(
        "90°: no better than chance",
        (1, 90),
        (-2, 3),
        ("axes fraction", "data"),
        "offset points",
        ha="right",
        fontsize=8,
        color="0.4",
    )
    angle.set(xlabel="stage", ylabel="angle to the BP gradient (°)", ylim=(-3, None))
    angle.set_title("Angle per stage (mean and range over epochs)")
    for axes in (accuracy, angle):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_feedback_training(record: Path, path: Path) -> None:
    """Draw how feedback training went: loss and weight angle of each stage by iteration, as a PNG.

    Args:
        record: ``feedback_training.csv`` as `bioprop.callbacks.FeedbackRecord` writes it; the recorded batches are put
            one after the other, with a gap between them.
        path: where the picture goes.

    Raises:
        UserError: if the record is missing or empty.
    """
    rows = []
    if record.is_file():
        with record.open(newline="") as file:
            rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{record} holds no feedback training: train with --trainer.callbacks+=FeedbackRecord")
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    panels = figure.subplots(1, 2)
    for number, stage in enumerate(dict.fromkeys(row["stage"] for row in rows)):
        own = [row for row in rows if row["stage"] == stage]
        color, _ = STYLES[number % len(STYLES)]
        for axes, column in zip(panels, ("loss", "angle"), strict=True):
            values: list[float] = []
            for row in own:
                # a gap before each new batch: the ones between were not recorded
                values += [math.nan] * (row["iteration"] == "0" and bool(values)) + [float(row[column])]
            axes.plot(range(len(values)), values, color=color, marker=".", markersize=4, linewidth=1, label=stage)
    for axes, label in zip(panels, ("feedback loss", "angle between forward and feedback weight (°)"), strict=True):
        axes.set(xlabel="iteration (a gap: the next recorded batch)", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
