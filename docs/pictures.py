"""The picture of target propagation: activations go up through the stages, targets come down through the feedback.

    python -m docs.pictures

writes `docs/target_propagation.svg`.
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

PICTURE = Path(__file__).parent / "target_propagation.svg"
FORWARD, FEEDBACK, LOSS = "#0072B2", "#D55E00", "#009E73"
#: Columns of activations and targets, in inches, and the height of the space between two stages.
LEFT, RIGHT, STEP = 1.1, 5.6, 1.1
ACTIVATIONS = ("$s^0 = x$", "$s^1$", "$s^2$", "$s^3$")


def draw(path: Path = PICTURE) -> None:
    """Draw three stages, their targets and their local losses.

    Args:
        path: file to write, as SVG.
    """
    figure = Figure(figsize=(6.6, 4.6))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 6.6), ylim=(0, 4.6))
    axes.axis("off")
    top = len(ACTIVATIONS) - 1
    for number, name in enumerate(ACTIVATIONS):
        height = 0.5 + STEP * number
        _box(axes, LEFT, height, name, FORWARD)
        if number == 0:
            continue
        _arrow(axes, (LEFT, height - STEP + 0.22), (LEFT, height - 0.22), FORWARD)
        axes.text(LEFT - 0.15, height - STEP / 2, f"$F^{number}$", color=FORWARD, ha="right", va="center", fontsize=12)
        _box(axes, RIGHT, height, f"$t^{number}$", FEEDBACK)
        if number < top:
            _arrow(axes, (RIGHT, height + STEP - 0.22), (RIGHT, height + 0.22), FEEDBACK)
            above = number + 1
            text = f"$G^{above}$, with the difference\n$t^{number} = s^{number} + G(t^{above}) - G(s^{above})$"
            axes.text(RIGHT - 0.15, height + STEP / 2, text, color=FEEDBACK, ha="right", va="center", fontsize=9)
            axes.plot([LEFT + 0.6, RIGHT - 0.6], [height] * 2, color=LOSS, linestyle=":")
            middle = f"local loss $\\frac{{1}}{{2}}|F^{number}(s^{number - 1}) - t^{number}|^2$"
            axes.text((LEFT + RIGHT) / 2, height - 0.09, middle, color=LOSS, ha="center", va="top", fontsize=9)
    height = 0.5 + STEP * top
    _arrow(axes, (LEFT + 0.6, height), (RIGHT - 0.6, height), LOSS)
    step = r"output target: $t^3 = s^3 - \beta\,\partial L/\partial s^3$"
    axes.text((LEFT + RIGHT) / 2, height + 0.12, step, color=LOSS, ha="center", fontsize=9)
    with matplotlib.rc_context({"svg.hashsalt": "bioprop", "svg.fonttype": "path"}):
        figure.savefig(path, metadata={"Date": None})


def _box(axes: matplotlib.axes.Axes, x: float, y: float, text: str, color: str) -> None:
    box = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": color}
    axes.text(x, y, text, ha="center", va="center", fontsize=12, bbox=box)


def _arrow(axes: matplotlib.axes.Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "linewidth": 1.6})


if __name__ == "__main__":
    draw()
