"""Angle to the BP gradient against cost, by L-DRL's second noise and iterations, trained from random feedback.

    python -m benchmarks.angle_cost --data_dir data/images

Needs an image folder of 32x32 photographs. Angles are means over seeds after some batches; cost is the time of a whole
step over BP's, one thread, all in turns. Writes <output>.csv, .md and .png.
"""

import csv
import io
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Literal

import torch
from jsonargparse import auto_cli
from matplotlib.figure import Figure
from rich.progress import track

from benchmarks.courses import Course, Training, load, train
from benchmarks.learners import algorithm_learner
from benchmarks.measuring import interleaved
from bioprop.experiments.results import write_whole

MARKS = (10, 50, 100)
#: The step of independent noise as it was tried at several counts of iterations: the fraction of a Newton step.
INDEPENDENT = {"second_noise": "independent", "noise": 0.1, "feedback_lr": 0.05}
METHODS: dict[str, dict[str, Any]] = {
    "independent, 2": INDEPENDENT | {"iterations": 2},
    "independent, 5": INDEPENDENT | {"iterations": 5},
    "independent, 20": INDEPENDENT | {"iterations": 20},
    "expected, 1": {"second_noise": "expected", "iterations": 1},
    "expected, auto": {"second_noise": "expected"},
    "echo, auto": {"second_noise": "echo"},
    "echo, 1": {"second_noise": "echo", "iterations": 1},
    "echo, 2": {"second_noise": "echo", "iterations": 2},
    "echo, 4": {"second_noise": "echo", "iterations": 4},
}
COLORS = {"independent": "#0072B2", "expected": "#009E73", "echo": "#D55E00"}


def measure(
    data_dir: str,
    network: Literal["lenet", "narrow simplevgg"] = "narrow simplevgg",
    seeds: int = 3,
    rounds: int = 7,
    jobs: int = 2,
    output: Path = Path("runs/angle_cost"),
) -> None:
    """Train, time, and write table and picture.

    Args:
        data_dir: folder with train/<class>/*.
        network: name of the network to train.
        seeds: number of seeds, each with its own weights, noise and order.
        rounds: timed steps of each method.
        jobs: trainings side by side, one thread each.
        output: path of the files, without their endings.
    """
    trainings = {
        (name, seed): Training(data_dir, network, settings, batches=max(MARKS), marks=MARKS, seed=seed)
        for name, settings in METHODS.items()
        for seed in range(seeds)
    }
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = list(track(pool.map(train, trainings.values()), "training", len(trainings)))
    courses = dict(zip(trainings, found, strict=True))
    costs = _costs(data_dir, network, rounds)
    by_method = {name: [courses[name, seed] for seed in range(seeds)] for name in METHODS}
    output.parent.mkdir(parents=True, exist_ok=True)
    _write_csv(by_method, costs, output.with_suffix(".csv"))
    write_whole(output.with_suffix(".md"), _table(by_method, costs).encode())
    write_whole(output.with_suffix(".png"), _picture(by_method, costs, network))


def _costs(data_dir: str, network: str, rounds: int) -> dict[str, float]:
    """Median time of a whole step over BP's, by method."""
    torch.set_num_threads(1)
    one = Training(data_dir, network, None, batches=1)
    data, (batch,), _ = load(one)

    def stepping(settings: dict[str, Any] | None) -> Callable[[], None]:
        algorithm = Training(data_dir, network, settings).build(data.image_shape, data.num_classes)
        step = algorithm_learner(algorithm).step
        return lambda: step(*batch)

    seconds = interleaved({name: stepping(each) for name, each in {"BP": None, **METHODS}.items()}, rounds)
    return {name: median(times) / median(seconds["BP"]) for name, times in seconds.items()}


def _write_csv(courses: dict[str, list[Course]], costs: dict[str, float], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "seed", "batch", "stage", "angle", "bp_steps"])
        for name, each in courses.items():
            for seed, course in enumerate(each):
                for mark, angles in course.stages.items():
                    for stage, angle in (angles | {"overall": course.overall[mark]}).items():
                        writer.writerow([name, seed, mark, stage, f"{angle:.3f}", f"{costs[name]:.3f}"])


def _table(courses: dict[str, list[Course]], costs: dict[str, float]) -> str:
    stages = list(courses["echo, auto"][0].stages[max(MARKS)])
    lines = [
        "| second noise, iterations | BP steps | " + " | ".join(f"overall, {mark}" for mark in MARKS) + " | "
        f"stages after {max(MARKS)}: {', '.join(stages)} |",
        "|---|---|" + "---|" * (len(MARKS) + 1),
    ]
    for name, each in courses.items():
        done = [course for course in each if course.diverged is None]
        cells = [name, f"{costs[name]:.1f}"]
        if len(done) < len(each):
            cells += [f"{len(each) - len(done)} of {len(each)} diverged"] + [""] * len(MARKS)
        else:
            cells += [_spread([course.overall[mark] for course in done]) for mark in MARKS]
            cells.append(
                ", ".join(f"{fmean(course.stages[max(MARKS)][stage] for course in done):.1f}" for stage in stages)
            )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{fmean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def _picture(courses: dict[str, list[Course]], costs: dict[str, float], network: str) -> bytes:
    figure = Figure(figsize=(4.2 * len(MARKS), 4.0), layout="constrained", dpi=150)
    figure.suptitle(f"{network}: angle of the update to the BP gradient against cost")
    for axes, mark in zip(figure.subplots(1, len(MARKS), sharey=True), MARKS, strict=True):
        for kind, color in COLORS.items():
            points = []
            for name, each in courses.items():
                values = [course.overall[mark] for course in each if mark in course.overall]
                if name.startswith(kind) and values:
                    points.append((costs[name], fmean(values), stdev(values) if len(values) > 1 else 0.0, name))
            points.sort()
            x, y, spread, names = zip(*points, strict=True)
            axes.errorbar(x, y, spread, color=color, marker="o", capsize=2, label=kind)
            for cost, angle, text in zip(x, y, names, strict=True):
                axes.annotate(text.split(", ")[1], (cost, angle), (4, 4), textcoords="offset points", fontsize=8)
        axes.set(title=f"after {mark} batches", xlabel="cost of a batch, BP steps", xscale="log", ylim=(0, None))
        axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("degrees")
    figure.axes[-1].legend(frameon=False)
    written = io.BytesIO()
    figure.savefig(written)
    return written.getvalue()


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
