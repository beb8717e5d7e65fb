"""Pictures of runs, drawn by matplotlib without a screen or a browser."""

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bioprop.callbacks.feedback_record import COLUMNS
from bioprop.errors import UserError
from bioprop.experiments.results import Result, by_stage, write_whole
from bioprop.experiments.summary import Row, Spread, spread

# Okabe & Ito's palette, told apart by colour-blind readers too; markers differ for print, lines where colours repeat
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*", "p")
LINES = ("-", "--", ":")
STYLES = tuple(zip(COLORS, MARKERS, strict=False))
#: Columns of the record of feedback training that are drawn.
SHOWN = ("loss", "angle")


def draw_figures(rows: Sequence[Row], folder: Path, title: str) -> None:
    """Draw ``accuracy.png``, ``angles.png``, ``time.png``, and all three side by side as ``comparison.png``.

    Args:
        rows: rows of one comparison; those without a finished run are left out.
        folder: folder of the pictures.
        title: title of each picture.
    """
    drawn = [row for row in rows if row.finished]
    if not drawn:
        return
    panels = {"accuracy": _draw_accuracy, "angles": _draw_angles, "time": _draw_time}
    for name, draw in panels.items():
        _save([draw], drawn, folder / f"{name}.png", title)
    _save(list(panels.values()), drawn, folder / "comparison.png", title)


def _save(panels: Sequence[Callable[[Axes, Sequence[Row]], None]], rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw panels side by side, with one legend for all beside them."""
    figure = Figure(figsize=(4.6 * len(panels) + 1.7, max(4.2, 0.24 * len(rows) + 1.0)), layout="constrained", dpi=150)
    figure.suptitle(title)
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, rows)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False)
    written = io.BytesIO()
    figure.savefig(written)
    write_whole(path, written.getvalue())


def _style(number: int) -> dict[str, Any]:
    """Colour, marker and line of a row; where colours repeat, markers are hollow and lines broken."""
    turn, place = divmod(number, len(COLORS))
    style = {"color": COLORS[place], "marker": MARKERS[number % len(MARKERS)], "linestyle": LINES[turn % len(LINES)]}
    return style | {"markerfacecolor": "white" if turn % 2 else COLORS[place]}


def _courses(row: Row) -> tuple[list[int], list[Spread]]:
    """The epochs that were validated in every finished run, and the accuracy after each over the runs."""
    measured = [
        (number, [result.epochs[number - 1].val_accuracy for result in row.finished])
        for number in range(1, min(len(result.epochs) for result in row.finished) + 1)
    ]
    whole = [(number, [each for each in seen if each is not None]) for number, seen in measured]
    kept = [(number, spread(seen)) for number, seen in whole if len(seen) == len(row.finished)]
    return [number for number, _ in kept], [seen for _, seen in kept]


def _draw_course(axes: Axes, row: Row, number: int, places: Sequence[float], course: Sequence[Spread]) -> None:
    mean = [100 * seen.mean for seen in course]
    # a dozen markers, however many epochs
    step = max(1, len(places) // 12)
    axes.plot(places, mean, **_style(number), markersize=4, markevery=step, linewidth=1.3, label=row.name)
    if all(seen.deviation is not None for seen in course):
        deviation = [100 * (seen.deviation or 0.0) for seen in course]
        low = [middle - each for middle, each in zip(mean, deviation, strict=True)]
        high = [middle + each for middle, each in zip(mean, deviation, strict=True)]
        axes.fill_between(places, low, high, color=_style(number)["color"], alpha=0.1, linewidth=0)


def _draw_accuracy(axes: Axes, rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows):
        epochs, course = _courses(row)
        _draw_course(axes, row, number, epochs, course)
    band = " (band: standard deviation)" if any(len(row.finished) > 1 for row in rows) else ""
    axes.set(xlabel="epoch", ylabel="validation accuracy (%)", title=f"Accuracy over epochs{band}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_time(axes: Axes, rows: Sequence[Row]) -> None:
    ends = []
    for number, row in enumerate(rows):
        epochs, course = _courses(row)
        seconds = [
            fmean(sum(each.seconds for each in result.epochs[:last]) for result in row.finished) for last in epochs
        ]
        _draw_course(axes, row, number, seconds, course)
        ends += seconds[-1:]
    axes.set(xlabel="seconds of training", ylabel="validation accuracy (%)", title="Accuracy against time")
    if ends and min(ends) > 0 and max(ends) > 5 * min(ends):
        axes.set_xscale("log")


def _draw_angles(axes: Axes, rows: Sequence[Row]) -> None:
    stages = list(dict.fromkeys(stage for row in rows for result in row.finished for stage in _angles(result)))
    for number, row in enumerate(rows):
        # a little apart, so that ranges do not hide each other
        apart = min(0.08, 0.8 / len(rows)) * (number - (len(rows) - 1) / 2)
        means, low, high, places = [], [], [], []
        for place, stage in enumerate(stages):
            courses = [_angles(result)[stage] for result in row.finished if stage in _angles(result)]
            if courses:
                course = [fmean(angles) for angles in zip(*courses, strict=False)]  # over seeds, epoch by epoch
                means.append(fmean(course))
                low.append(means[-1] - min(course))
                high.append(max(course) - means[-1])
                places.append(place + apart)
        style = {**_style(number), "linestyle": "none"} if len(rows) > len(COLORS) else _style(number)
        axes.errorbar(places, means, [low, high], **style, markersize=4, capsize=2, linewidth=1, label=row.name)
    axes.set_xticks(range(len(stages)), stages)
    axes.axhline(90, color="0.6", linestyle=":", linewidth=1)
    axes.annotate(
        "90°: no better than chance",
        (1, 90),
        (-2, 3),
        ("axes fraction", "data"),
        "offset points",
        ha="right",
        fontsize=8,
        color="0.4",
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.5},
        zorder=5,
    )
    axes.set(xlabel="stage", ylabel="angle to the BP gradient (°)", ylim=(-3, None))
    axes.set_title("Angle per stage (mean and range over epochs)")


def _angles(result: Result) -> dict[str, list[float]]:
    """The course of the angle of each stage, over the epochs that measured it."""
    measured = [by_stage(epoch.angles) for epoch in result.epochs if epoch.angles]
    return {
        stage: [angles[stage] for angles in measured if stage in angles] for stage in (measured[0] if measured else ())
    }


def draw_feedback_training(record: Path, path: Path) -> None:
    """Draw how feedback training went: loss and weight angle of each stage by iteration, as a PNG.

    Args:
        record: ``feedback_training.csv`` as `bioprop.callbacks.FeedbackRecord` writes it; the recorded batches are put
            one after the other, with a gap between them.
        path: file of the picture.

    Raises:
        UserError: if the record is missing, empty or another program's.
    """
    rows: list[dict[str, Any]] = []
    if record.is_file():
        try:
            with record.open(newline="") as file:
                rows = list(csv.DictReader(file))
            rows = [{name: row[name] for name in COLUMNS} | {name: float(row[name]) for name in SHOWN} for row in rows]
        except (ValueError, TypeError, KeyError, csv.Error) as error:
            raise UserError(
                f"{record} is not what FeedbackRecord writes: its columns must be {', '.join(COLUMNS)}, with numbers "
                "below the last two"
            ) from error
    if not rows:
        raise UserError(f"{record} holds no feedback training: train with --trainer.callbacks+=FeedbackRecord")
    figure = Figure(figsize=(10, 4.2), layout="constrained", dpi=150)
    panels = figure.subplots(1, 2)
    for number, stage in enumerate(dict.fromkeys(row["stage"] for row in rows)):
        own = [row for row in rows if row["stage"] == stage]
        color, _ = STYLES[number % len(STYLES)]
        for axes, column in zip(panels, SHOWN, strict=True):
            values: list[float] = []
            for row in own:
                # a gap before each new batch: the ones between were not recorded
                values += [math.nan] * (row["iteration"] == "0" and bool(values)) + [row[column]]
            axes.plot(range(len(values)), values, color=color, marker=".", markersize=4, linewidth=1, label=stage)
    for axes, label in zip(panels, ("feedback loss", "angle between forward and feedback weight (°)"), strict=True):
        axes.set(xlabel="iteration (a gap: the next recorded batch)", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
