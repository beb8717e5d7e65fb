"""The whole target-propagation family on one MLP and one image folder: accuracy, and angles to BP and Gauss-Newton.

    python -m benchmarks.family_table --data_dir path/to/images

Every method has the same network (hidden tanh layers), images, epochs and batch, Adam for the forward weights, and the
same trials: its forward learning rate is the best of ``rates`` by validation accuracy on the first seed. The other
settings are those of ``METHODS``. The test set is read once for each seed, at the end. Angles are those of the whole
update on the first validation batch, after training, with Gauss-Newton damped by 0.1.
"""

import csv
import logging
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from time import perf_counter
from typing import NamedTuple

import torch
from jsonargparse import auto_cli
from pytorch_lightning import Trainer, seed_everything
from rich.console import Console
from rich.table import Table

from bioprop.algorithms import (
    DDTPRHL,
    DTP,
    DTPDRL,
    LDRL,
    Algorithm,
    Backprop,
    DDTPControl,
    DDTPLinear,
    FixedWeightDTP,
    ParallelLDRL,
    TargetPropagation,
)
from bioprop.callbacks.alignment import alignment_to_backprop, alignment_to_gauss_newton
from bioprop.datamodules import ImageFolder
from bioprop.networks import MLP, Network

DAMPING = 0.1
METHODS: dict[str, Callable[..., Algorithm]] = {
    "BP": Backprop,
    "TP": partial(
        TargetPropagation,
        beta=10.0,
        noise=0.1,
        feedback_lr=0.03,
        iterations=5,
        mirror="outer",
        penultimate_target="gradient",
    ),
    "DTP": partial(
        DTP, beta=0.5, noise=0.1, feedback_lr=1e-3, iterations=4, mirror="outer", penultimate_target="gradient"
    ),
    "L-DRL": partial(LDRL, beta=0.5, noise=0.1, feedback_lr=0.05, iterations=20),
    "parallel L-DRL": partial(ParallelLDRL, beta=0.5, noise=0.1, feedback_lr=0.5, samples=10),
    "DTP-DRL": partial(DTPDRL, feedback_lr=3e-4),
    "DDTP-linear": partial(DDTPLinear, feedback_lr=1e-2),
    "DDTP-RHL": partial(DDTPRHL, feedback_lr=1e-4),
    "DDTP-control": partial(DDTPControl, feedback_lr=3e-3),
    "FW-DTP": partial(FixedWeightDTP, beta=0.5),
}


class Result(NamedTuple):
    """One trained network: accuracies in [0, 1], angles in degrees, seconds of training."""

    validation: float
    test: float
    to_backprop: float
    to_gauss_newton: float
    seconds: float


def run(make: Callable[..., Algorithm], rate: float, seed: int, epochs: int, hidden: int, data_dir: str) -> Result:
    """Train and judge one network."""
    seed_everything(seed, verbose=False)
    data = ImageFolder(data_dir, channels=1, batch_size=128)
    data.setup("fit")
    network: Network = MLP(data.image_shape, data.num_classes, hidden=(hidden,) * 5, activation="tanh")
    algorithm = make(network, optimizer=partial(torch.optim.Adam, lr=rate))
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = perf_counter()
    trainer.fit(algorithm, datamodule=data)
    seconds = perf_counter() - start
    validation = float(trainer.callback_metrics["val/accuracy"])
    (tested,) = trainer.test(algorithm, datamodule=data, verbose=False)
    images, labels = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    return Result(
        validation,
        float(tested["test/accuracy"]),
        float(alignment_to_backprop(algorithm, images, labels)["overall"].angle),
        float(alignment_to_gauss_newton(algorithm, images, labels, DAMPING)["overall"].angle),
        seconds,
    )


def measure(
    data_dir: str,
    methods: list[str] | None = None,
    epochs: int = 3,
    seeds: int = 3,
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3),
    hidden: int = 256,
    threads: int = 1,
    out: str = "runs/family",
) -> None:
    """Tune, train and print the table; every run is a row of ``runs.csv``.

    Args:
        data_dir: image folder, ``{train,test}/<class>/*``.
        methods: names out of `METHODS`; all of them by default.
        epochs: of every run.
        seeds: runs at the chosen rate, from seed 0.
        rates: forward learning rates tried on seed 0.
        hidden: units of each of the five hidden layers.
        threads: of torch.
        out: folder of ``runs.csv``.
    """
    torch.set_num_threads(threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*does not have many workers|.*LeafSpec")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    table = Table("method", "lr", "test accuracy, %", "angle to BP", "angle to Gauss-Newton", "s per epoch")
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["method", "rate", "seed", *Result._fields])
        for name in methods or METHODS:
            one = partial(run, METHODS[name], epochs=epochs, hidden=hidden, data_dir=data_dir)
            tried = {rate: one(rate, 0) for rate in rates}
            rate = max(tried, key=lambda each: tried[each].validation)
            results = [tried[rate], *(one(rate, seed) for seed in range(1, seeds))]
            for each, result in [*((each, tried[each]) for each in rates if each != rate)]:
                writer.writerow([name, each, 0, *result])
            for seed, result in enumerate(results):
                writer.writerow([name, rate, seed, *result])
            file.flush()
            table.add_row(
                name,
                f"{rate:g}",
                _spread([100 * result.test for result in results]),
                _spread([result.to_backprop for result in results], "°"),
                _spread([result.to_gauss_newton for result in results], "°"),
                f"{mean(result.seconds for result in results) / epochs:.1f}",
            )
    table.title = f"{epochs} epochs, {seeds} seeds, 5 x {hidden} tanh, {threads} threads, torch {torch.__version__}"
    Console(width=120).print(table)


def _spread(values: list[float], unit: str = "") -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{mean(values):.1f}{unit} +- {spread:.1f}"


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
