"""Pictures of a single run, drawn in its folder when it ends."""

import csv
import logging
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from pytorch_lightning import Callback, LightningModule, Trainer

from bioprop.callbacks.alignment import HIDDEN
from bioprop.callbacks.feedback_record import FILE_NAME
from bioprop.runs.folder import run_folder

if TYPE_CHECKING:  # matplotlib takes a while to import: it is, when there is something to draw
    from matplotlib.axes import Axes

logger = logging.getLogger(__name__)

# Okabe & Ito's palette, told apart by colour-blind readers too; markers differ for print
BLACK, COLORS = "#000000", ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p")
CHANCE = 90.0
#: Most epochs whose beginnings are named in the picture of feedback training.
MOST_NAMED = 8

Points = Sequence[tuple[float, float]]


class RunPictures(Callback):
    """Draw how a run of two epochs or more went, from the CSV files in its folder.

    ``curves.png``: loss and accuracy over epochs. ``angles.png``: the angle of every stage to the BP gradient, where
    that was measured, with the mean over the hidden stages. ``feedback_training.png``: what `FeedbackRecord` wrote.
    What cannot be drawn or written is said in a warning.
    """

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, in the first process."""
        if not trainer.is_global_zero or trainer.current_epoch < 2:
            return
        folder = run_folder(trainer)
        for each in trainer.loggers:
            each.save()
        try:
            draw_run(folder)
        except (OSError, ValueError, KeyError, csv.Error) as error:
            logger.warning("the pictures of %s were not drawn: %s", folder, error)


def draw_run(folder: Path) -> None:
    """Draw the pictures of a run for which its folder has the files.

    Raises:
        OSError: if a picture cannot be written.
        ValueError: if a file holds something else than numbers.
        KeyError: if a file lacks a column.
    """
    courses = _courses(folder / "metrics.csv")
    title = f"{folder.parent.name}/{folder.name}"
    figures = {"loss": "loss", "accuracy": "accuracy (%)"}
    curves = [
        (label, {split: courses.get(f"{split}/{name}", []) for split in ("train", "val")})
        for name, label in figures.items()
    ]
    curves[1] = (curves[1][0], {split: [(x, 100 * y) for x, y in points] for split, points in curves[1][1].items()})
    if any(points for _, lines in curves for points in lines.values()):
        _draw(folder / "curves.png", title, "epoch", curves)
    angles = {name.removeprefix("angle/"): points for name, points in courses.items() if name.startswith("angle/")}
    mean = {"mean over hidden stages": angles.pop(HIDDEN)} if HIDDEN in angles else {}
    angles.pop("overall", None)
    if angles:
        _draw(folder / "angles.png", title, "epoch (0: before training)", [("angle to BP (°)", angles | mean)])
    if (folder / FILE_NAME).is_file():
        draw_feedback_training(folder / FILE_NAME, title)


def draw_feedback_training(record: Path, title: str) -> None:
    """Draw ``feedback_training.png`` beside the record: loss and weight angle of each stage, iteration by iteration.

    Recorded batches lie side by side, each a line of its own; a dotted line begins an epoch.
    """
    with record.open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}, "angle": {}}
    epochs: list[tuple[int, int]] = []
    batches = groupby(rows, key=lambda row: (int(row["epoch"]), int(row["batch"])))
    for place, ((epoch, _), batch) in enumerate(batches):
        if not epochs or epoch != epochs[-1][1]:
            epochs.append((place, epoch))
        for stage, iterations in groupby(batch, key=lambda row: row["stage"]):
            seen = list(iterations)
            for name, line in lines.items():
                points = line.setdefault(stage, [])
                points += [(place + 0.8 * number / len(seen), float(row[name])) for number, row in enumerate(seen)]
                points.append((place + 0.9, math.nan))  # breaks the line
    labels = {"loss": "feedback loss", "angle": "angle of feedback to forward weight (°)"}
    panels = [(labels[name], line) for name, line in lines.items()]
    path = record.with_suffix(".png")
    _draw(path, f"{title}: training of feedback weights", "recorded batch, with its iterations", panels, epochs)


def _courses(metrics: Path) -> dict[str, list[tuple[float, float]]]:
    """The figures of ``metrics.csv`` by number of finished epochs."""
    courses: dict[str, list[tuple[float, float]]] = {}
    if metrics.is_file():
        with metrics.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and "/" in name:
                        courses.setdefault(name, []).append((int(row["epoch"]) + 1, float(value)))
    return courses


def _draw(
    path: Path,
    title: str,
    label: str,
    panels: Sequence[tuple[str, dict[str, list[tuple[float, float]]]]],
    epochs: Sequence[tuple[int, int]] = (),
) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.6 * len(panels) + 0.6, 4.0), layout="constrained", dpi=130)
    figure.suptitle(title)
    axes: Axes
    for axes, (vertical, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for number, (name, points) in enumerate(lines.items()):
            is_mean = name.startswith("mean")
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=BLACK if is_mean else COLORS[number % len(COLORS)],
                linewidth=2.0 if is_mean else 1.2,
                marker=MARKERS[number % len(MARKERS)],
                markersize=3.5,
                label=name,
            )
        for place, epoch in epochs:
            axes.axvline(place - 0.1, color="0.7", linestyle=":", linewidth=1)
            if len(epochs) <= MOST_NAMED:
                axes.text(place - 0.05, 1.01, f"epoch {epoch + 1}", transform=axes.get_xaxis_transform(), fontsize=7)
        if vertical.startswith("angle to BP"):
            axes.axhline(CHANCE, color="0.6", linestyle=":", linewidth=1)
            axes.annotate("90°: chance", (1, CHANCE), (-2, 3), ("axes fraction", "data"), "offset points", ha="right")
        axes.set(xlabel=label, ylabel=vertical)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize="small")
    figure.savefig(path)
