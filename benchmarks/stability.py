"""Stability of L-DRL beside BP: short trainings over learning rates, iterations, batch sizes and noise.

    python -m benchmarks.stability --data_dir data/images

Needs an image folder of 32x32 photographs. Writes a table and <output>, one line a training.
"""

import csv
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.courses import NETWORKS, Course, Training, train

RATES = (0.005, 0.02, 0.05, 0.1)
ITERATIONS = {"echo": (1, 2, 5), "expected": (1, 5)}
#: Iterations that are tried at the highest rates alone: they take most of the time.
MANY, HIGH = 20, (0.05, 0.1)
BATCHES = (16, 32, 64, 256)
SIGMAS = (0.001, 0.01, 0.1)
#: What the grid varies one at a time from.
RATE, BATCH = 0.05, 128
#: Loss above BP's from which on a training counts as fallen behind: several times what seeds make of it.
BEHIND = 0.15
COLUMNS = ("network", "lr", "batch", "second_noise", "iterations", "noise", "loss", "of BP", "angle", "verdict")


def grid(data_dir: str, network: str, batches: int) -> Iterator[Training]:
    """List the trainings of one network, BP's among them."""

    def each(settings: dict[str, Any] | None, **changes: Any) -> Training:
        chosen = {"lr": RATE, "batch": BATCH} | changes
        return Training(data_dir, network, settings, batches=batches, marks=(batches,), **chosen)

    kinds = ({"second_noise": "echo"}, {"second_noise": "expected"})
    for rate in RATES:
        yield each(None, lr=rate)
        for settings in kinds:
            yield each(settings, lr=rate)
            for iterations in ITERATIONS[settings["second_noise"]]:
                yield each(settings | {"iterations": iterations}, lr=rate)
        if rate in HIGH:
            yield each(kinds[0] | {"iterations": MANY}, lr=rate)
    for batch in BATCHES:
        yield each(None, batch=batch, lr=RATES[1])
        yield from (each(settings, batch=batch, lr=RATES[1]) for settings in kinds)
    yield from (each(settings | {"noise": sigma}) for settings in kinds for sigma in SIGMAS)


def measure(
    data_dir: str,
    network: Literal["lenet", "narrow simplevgg", "both"] = "both",
    batches: int = 100,
    jobs: int = 2,
    output: Path = Path("runs/stability.csv"),
) -> list[tuple[Training, Course]]:
    """Train over the grid, print the table and write the CSV.

    Args:
        data_dir: folder with train/<class>/*.
        network: name of the network to train.
        batches: length of each training.
        jobs: trainings side by side, one thread each.
        output: CSV file, written anew.
    """
    networks = list(NETWORKS) if network == "both" else [network]
    trainings = [training for name in networks for training in grid(data_dir, name, batches)]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        found = list(track(pool.map(train, trainings), "training", len(trainings)))
    courses = list(zip(trainings, found, strict=True))
    table, rows = Table(*COLUMNS, title=f"after {batches} batches"), [_row(each, courses) for each in courses]
    for row in rows:
        table.add_row(*row)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    Console(width=130).print(table)
    return courses


def _row(one: tuple[Training, Course], courses: list[tuple[Training, Course]]) -> list[str]:
    training, course = one
    key = training.network, training.lr, training.batch
    (backprop,) = (
        each for other, each in courses if other.settings is None and (other.network, other.lr, other.batch) == key
    )
    if course.diverged is not None:
        verdict = "diverged, as BP" if backprop.diverged is not None else "DIVERGED"
    else:
        verdict = "behind" if course.loss > backprop.loss + BEHIND else ""
    settings = training.settings or {"second_noise": "BP", "iterations": "", "noise": ""}
    chosen = [str(settings.get(name, "auto")) for name in ("second_noise", "iterations", "noise")]
    angle = "" if training.settings is None else "".join(f"{value:.1f}" for value in course.overall.values())
    losses = ["" if each.diverged is not None else f"{each.loss:.3f}" for each in (course, backprop)]
    return [training.network, f"{training.lr}", f"{training.batch}", *chosen, *losses, angle, verdict]


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
