"""Pictures of a comparison, drawn by matplotlib without a screen or a browser."""

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from bioprop.callbacks.pictures import BLACK, CHANCE, COLORS, MARKERS
from bioprop.experiments.costs import Costs
from bioprop.experiments.results import Epoch, by_stage, hidden_mean, write_whole
from bioprop.experiments.summary import Row, Spread, backprop, backprop_seconds, interval, spread

LINES = ("-", "--", ":")
#: Most rows in one panel of curves; more are drawn in a panel for each family.
TOGETHER = 6

Measure = Callable[[Epoch], float]
Panel = Callable[[Axes], None]


def draw_figures(rows: Sequence[Row], costs: Costs, folder: Path, title: str) -> None:
    """Draw the figures, each as PNG and PDF, and an overview, ``comparison.png``.

    ``curves`` (validation accuracy over epochs), ``time`` (the same over seconds of training), ``angle_curves`` (the
    mean angle to the BP gradient over the hidden stages), ``accuracy`` (on the test images, run by run), ``angles``
    (stage by stage), ``accuracy_angle`` and ``accuracy_cost``.

    Args:
        rows: rows of one comparison; those without a finished run are left out.
        costs: time per batch.
        folder: folder of the pictures.
        title: network and data.
    """
    drawn = [row for row in rows if row.finished]
    if not drawn:
        return
    base = backprop(drawn)
    style = {row.name: _style(number, row is base) for number, row in enumerate(sorted(drawn, key=lambda r: r is base))}
    most = max(len(row.finished) for row in drawn)
    seeds = f"{most} seeds" if most > 1 else "1 seed"
    around = f"{seeds}, mean and standard deviation" if most > 1 else seeds
    few, known = len(drawn) <= TOGETHER, not math.isnan(backprop_seconds(rows, costs))
    panels = [drawn]
    if not few:
        families = dict.fromkeys(row.family for row in drawn if row is not base)
        panels = [[row for row in drawn if row is base or row.family == family] for family in families]

    def curves(rows: Sequence[Row], measure: Measure, label: str = "", over_time: bool = False) -> Panel:
        def draw(axes: Axes) -> None:
            for row in rows:
                _draw_course(axes, row, measure, over_time, style[row.name])
            axes.set(xlabel="seconds of training" if over_time else "epoch", ylabel=label)
            axes.set_title("" if few else next((row.family for row in rows if row is not base), ""), fontsize="medium")
            axes.legend(frameon=False, fontsize="small")
            if not over_time:
                axes.xaxis.set_major_locator(MaxNLocator(integer=True))

        return draw

    def accuracy_against(where: Callable[[Row], Spread], label: str, legend: bool, log: bool = False) -> Panel:
        def draw(axes: Axes) -> None:
            for row in drawn:
                _draw_point(axes, row, where(row), style[row.name], named=few)
            axes.set(xlabel=label, ylabel="test accuracy (%)")
            axes.set_ylim(top=min(axes.get_ylim()[1], 100.5))
            if legend and not few:
                axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
            if log:
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.xaxis.set_major_formatter("{x:g}")
                axes.xaxis.set_minor_formatter("")

        return draw

    def by_angle(legend: bool) -> Panel:
        label = "angle to BP, mean over hidden stages (°)"
        return accuracy_against(lambda row: row.spread(lambda run: run.mean_angle()), label, legend)

    def by_cost(legend: bool) -> Panel:
        seconds = backprop_seconds(rows, costs)

        def ratio(row: Row) -> Spread:
            return spread(each / seconds for each in costs.seconds(row.name))

        return accuracy_against(ratio, "time per batch, x BP", legend, log=True)

    def dots(axes: Axes) -> None:
        _draw_dots(axes, drawn, style)

    def stages(axes: Axes) -> None:
        _draw_stages(axes, drawn)

    height = max(3.6, 0.26 * len(drawn) + 1.6)
    low = (7.2, 4.4)
    _save(folder / "accuracy", [dots], (7.2, height), f"{title}: test accuracy\n{seeds}")
    _save(folder / "angles", [stages], (7.2, height), f"{title}: angle to BP by stage\n{seeds}, mean over epochs")
    _save(folder / "accuracy_angle", [by_angle(True)], low, f"{title}: accuracy and angle\n{around}")
    if known:
        _save(folder / "accuracy_cost", [by_cost(True)], low, f"{title}: accuracy and cost\n{around}")
    for name, what, measure, over_time in (
        ("curves", "validation accuracy (%)", _accuracy, False),
        ("time", "validation accuracy (%)", _accuracy, True),
        ("angle_curves", "angle to BP, mean over hidden stages (°)", _angle, False),
    ):
        drawings = [curves(each, measure, over_time=over_time) for each in panels]
        size = low if few else (9.0, 3.4 * math.ceil(len(panels) / 2) + 0.4)
        _save(folder / name, drawings, size, f"{title}: {what}\n{around}", shared=what)
    first = curves(drawn, _accuracy, "validation accuracy (%)") if few else by_angle(False)
    overview = [first, dots, stages, by_cost(False) if known else by_angle(False)]
    _save(folder / "comparison", overview, (10.5, 2 * max(3.8, height)), f"{title}, {around}", kinds=("png",))


def _save(
    path: Path,
    panels: Sequence[Panel],
    size: tuple[float, float],
    title: str,
    shared: str = "",
    kinds: Sequence[str] = ("png", "pdf"),
) -> None:
    """Draw panels, two beside each other.

    Args:
        path: file of the picture, without its ending.
        panels: draw one each.
        size: width and height in inches.
        title: above all of them.
        shared: label of the vertical axis that all of them have in common.
        kinds: endings of the files.
    """
    figure = Figure(figsize=size, layout="constrained", dpi=150)
    figure.suptitle(title)
    grid = figure.subplots(math.ceil(len(panels) / 2), min(len(panels), 2), squeeze=False, sharey=bool(shared))
    for axes, draw in zip(grid.flat, panels, strict=False):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    if shared:
        figure.supylabel(shared, fontsize="medium")
    for kind in kinds:
        written = io.BytesIO()
        # the same picture is the same file, whenever it is drawn
        figure.savefig(written, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
        figure.set_layout_engine("none")  # what the first has laid out holds for the other
        write_whole(path.with_suffix(f".{kind}"), written.getvalue())


def _style(number: int, is_base: bool) -> dict[str, Any]:
    """Colour, marker and line of a row; where colours repeat, markers are hollow and lines broken."""
    if is_base:
        return {"color": BLACK, "marker": "o", "linestyle": "-", "markerfacecolor": BLACK}
    turn, place = divmod(number, len(COLORS))
    style = {"color": COLORS[place], "marker": MARKERS[number % len(MARKERS)], "linestyle": LINES[turn % len(LINES)]}
    return style | {"markerfacecolor": "white" if turn % 2 else COLORS[place]}


def _accuracy(epoch: Epoch) -> float:
    return math.nan if epoch.val_accuracy is None else 100 * epoch.val_accuracy


def _angle(epoch: Epoch) -> float:
    return hidden_mean(epoch.angles)


def _draw_course(axes: Axes, row: Row, measure: Measure, over_time: bool, style: dict[str, Any]) -> None:
    """Draw the mean over the runs, epoch by epoch where all have measured it, in a band of one standard deviation."""
    runs = [result.epochs for result in row.finished]
    seen = [(number, spread(measure(run[number]) for run in runs)) for number in range(min(map(len, runs)))]
    kept = [(number, each) for number, each in seen if not math.isnan(each.mean)]
    places: list[float] = [number + 1 for number, _ in kept]
    if over_time:
        places = [fmean(sum(epoch.seconds for epoch in run[: number + 1]) for run in runs) for number, _ in kept]
    mean = [each.mean for _, each in kept]
    step = max(1, len(places) // 12)  # a dozen markers, however many epochs
    axes.plot(places, mean, **style, markersize=4, markevery=step, linewidth=1.3, label=row.title)
    if len(runs) > 1:
        low, high = ([each.mean + sign * (each.deviation or 0.0) for _, each in kept] for sign in (-1, 1))
        axes.fill_between(places, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _draw_point(axes: Axes, row: Row, where: Spread, style: dict[str, Any], named: bool) -> None:
    """Draw a row's test accuracy against another of its figures, with its name beside the point."""
    accuracy = row.test_accuracy
    if math.isnan(accuracy.mean) or math.isnan(where.mean):
        return
    place, height = where.mean, 100 * accuracy.mean
    axes.errorbar(
        [place],
        [height],
        [100 * (accuracy.deviation or 0.0)],
        [where.deviation or 0.0],
        **style | {"linestyle": "none"},
        markersize=5,
        capsize=2,
        linewidth=1,
        label=row.title,
    )
    if named:
        axes.annotate(row.title, (place, height), (5, 4), textcoords="offset points", fontsize="small")


def _draw_dots(axes: Axes, rows: Sequence[Row], style: dict[str, dict[str, Any]]) -> None:
    """Draw test accuracies: every run, their mean, and its 95% confidence interval where there are enough runs."""
    for place, row in enumerate(rows):
        values = [100 * each for each in row.tested.values()]
        if not values:
            continue
        low, high = interval(values) if len(values) > 2 else (fmean(values), fmean(values))
        axes.plot([low, high], [place, place], color=style[row.name]["color"], linewidth=1.5)
        axes.plot(values, [place] * len(values), "|", color=style[row.name]["color"], markersize=7)
        axes.plot([fmean(values)], [place], **style[row.name] | {"linestyle": "none"}, markersize=6)
    axes.set_yticks(range(len(rows)), [row.title for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("test accuracy (%): runs, mean, its 95% interval from 3 runs on", fontsize="small")
    axes.set_xlim(right=min(axes.get_xlim()[1], 100.0))


def _draw_stages(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw a heat map of angles, methods by stages, the output stage last."""
    angles = {row.name: _by_stage(row) for row in rows}
    measured = [row for row in rows if angles[row.name]]
    stages = list(dict.fromkeys(stage for row in measured for stage in angles[row.name]))
    if not stages:
        axes.set_visible(False)
        return
    table = [[angles[row.name].get(stage, math.nan) for stage in stages] for row in measured]
    shown = axes.imshow(table, cmap="viridis_r", vmin=0.0, vmax=CHANCE, aspect="auto")
    for down, line in enumerate(table):
        for across, angle in enumerate(line):
            if not math.isnan(angle):
                color = "white" if angle > CHANCE / 2 else "black"
                axes.text(across, down, f"{angle:.0f}", ha="center", va="center", color=color, fontsize="small")
    axes.grid(visible=False)
    axes.set_xticks(range(len(stages)), stages)
    axes.set_yticks(range(len(measured)), [row.title for row in measured])
    axes.set_xlabel("angle to BP by stage (°); 90 is chance, the output stage is 0 for all", fontsize="small")
    bar = axes.figure.colorbar(shown, ax=axes, shrink=0.8)
    bar.outline.set_visible(False)


def _by_stage(row: Row) -> dict[str, float]:
    """The mean angle of each stage over epochs and runs."""
    measured = [by_stage(epoch.angles) for result in row.finished for epoch in result.epochs if epoch.angles]
    stages = dict.fromkeys(stage for angles in measured for stage in angles)
    return {stage: fmean(angles[stage] for angles in measured if stage in angles) for stage in stages}
