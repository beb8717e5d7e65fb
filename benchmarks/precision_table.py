"""float32 and bf16-mixed side by side: accuracy, angles, seconds.

    python -m benchmarks.precision_table

Every configuration is trained in both precisions from the same seeds, one run after the other, and tested once by its
best checkpoint, as a user would by ``bioprop fit`` and ``bioprop test``. Angles are those after the last epoch on
held validation images: of the update, in the run's precision, to the BP gradient in float32; of the feedback weights to
the forward weights (the mean over stages). ``rounding`` is the angle of the update to what it would be in float32 at
the same weights. A second table shows what difference targets lose if a difference is taken of two rounded results.
"""

import csv
import os
import warnings
from collections.abc import Sequence
from math import isnan
from pathlib import Path
from statistics import fmean, median, stdev
from typing import NamedTuple
from unittest.mock import patch

import torch
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bioprop.algorithms import LDRL, Algorithm, Backprop
from bioprop.callbacks.alignment import alignment_to_backprop
from bioprop.cli import main
from bioprop.datamodules import Digits, ImageDataModule
from bioprop.functional.angles import angle_degrees, flatten_all
from bioprop.networks import MLP, LeNet, Network
from bioprop.networks.mirrors import LayerMirror

CONFIGS = Path(__file__).parents[1] / "lightning_configs"
PRECISIONS = ("32-true", "bf16-mixed")
QUIET = (
    "--trainer.enable_model_summary=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.logger=CSVLogger",
)


class Result(NamedTuple):
    """One trained network.

    Attributes:
        test: accuracy on the test images, %.
        angles: degrees of the update to the BP gradient, by stage and ``overall``.
        feedback: degrees of the feedback weights to the forward weights, mean over stages; NaN where there are none.
        rounding: degrees of the update to what it would be in float32.
        seconds: time of an epoch of training, median over all but the first.
    """

    test: float
    angles: dict[str, float]
    feedback: float
    rounding: float
    seconds: float


def held_batch(data: ImageDataModule) -> tuple[Tensor, Tensor]:
    """First validation images, as a network sees them."""
    images, labels = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    return images, labels


def run(config: Path, precision: str, seed: int, folder: Path, options: Sequence[str]) -> Result:
    """Train and test one network through the command line."""
    words = ["--config", str(config), *QUIET, f"--trainer.logger.save_dir={folder}"]
    words += [f"--trainer.logger.name={config.stem}_{precision}_{seed}", f"--trainer.precision={precision}"]
    words += [f"--seed_everything={seed}", *options]
    trained = main(["fit", *words])
    best = trained.trainer.checkpoint_callback.best_model_path  # type: ignore[union-attr]
    algorithm, metrics = trained.model, trained.trainer.callback_metrics
    angles = {name.removeprefix("angle/"): float(value) for name, value in metrics.items() if name.startswith("angle/")}
    with (Path(str(trained.trainer.log_dir)) / "metrics.csv").open(newline="") as file:
        seconds = [float(row["train/seconds"]) for row in csv.DictReader(file) if row.get("train/seconds")]
    feedback = algorithm.feedback_angles().values()
    rounding = angle_of_rounding(algorithm, *held_batch(trained.datamodule)) if precision == "bf16-mixed" else 0.0
    tested = main(["test", *words, "--ckpt_path", best])
    accuracy = 100 * float(tested.trainer.callback_metrics["test/accuracy"])
    return Result(
        accuracy, angles, fmean(feedback) if feedback else float("nan"), rounding, median(seconds[1:] or seconds)
    )


def angle_of_rounding(algorithm: Algorithm, images: Tensor, labels: Tensor) -> float:
    """Degrees between the update in bf16-mixed and in float32, at the same weights."""
    exact = algorithm.forward_gradients(images, labels)
    with torch.autocast(images.device.type, torch.bfloat16):
        found = algorithm.forward_gradients(images, labels)
    return float(angle_degrees(*(flatten_all(side[name] for name in exact) for side in (found, exact))))


def two_projections(self: LayerMirror, outputs: Tensor, step: Tensor, switches: Tensor | None) -> Tensor:
    """``G(y + step) - G(y)`` as it stands, in place of ``G`` of the difference."""
    after: Tensor = self(outputs + step, switches)
    return after - self(outputs, switches)


def difference_table() -> Table:
    """Angle of L-DRL's update with symmetric feedback to BP's, on digits, by the way its differences are formed."""
    data = Digits()
    data.setup("fit")
    batch = held_batch(data)
    networks: dict[str, Network] = {}
    for name, build in (("MLP", MLP), ("LeNet", LeNet)):
        torch.manual_seed(0)
        networks[name] = build(data.image_shape, data.num_classes)
    table = Table("network", "beta", "float32", "bf16-mixed", "bf16-mixed, two projections", "BP in bf16-mixed")
    table.title = "degrees to BP, symmetric feedback, exact mirrors"
    for name, network in networks.items():
        for beta in (0.5, 0.05, 0.005):
            algorithm = LDRL(network, beta=beta)
            algorithm.symmetrize_feedback()
            angles = [alignment_to_backprop(algorithm, *batch)["overall"].angle]
            with torch.autocast("cpu", torch.bfloat16):
                angles.append(alignment_to_backprop(algorithm, *batch)["overall"].angle)
                with patch.object(LayerMirror, "difference", two_projections):
                    angles.append(alignment_to_backprop(algorithm, *batch)["overall"].angle)
                angles.append(alignment_to_backprop(Backprop(network), *batch)["overall"].angle)
            table.add_row(name, f"{beta:g}", *(f"{float(angle):.2f}" for angle in angles))
    return table


def measure(
    configs: tuple[str, ...] = tuple(f"{name}_lenet_digits" for name in ("backprop", "ldrl", "dtp", "fa")),
    seeds: int = 3,
    threads: int = 2,
    out: str = "runs/precision",
    options: tuple[str, ...] = (),
) -> None:
    """Train, test and print both tables; every run is a row of ``runs.csv``.

    Args:
        configs: names of files in ``lightning_configs``.
        seeds: runs of each, from seed 0.
        threads: number of torch's threads.
        out: folder of the runs and of ``runs.csv``.
        options: further words of the command line, for all runs.
    """
    torch.set_num_threads(threads)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    stages: list[str] = []
    results: dict[tuple[str, str], list[Result]] = {}
    with (folder / "runs.csv").open("w", newline="") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Checkpoint directory")
        writer = csv.writer(file)
        for name in configs:
            for seed in range(seeds):
                for precision in PRECISIONS:  # side by side, so that what else the machine does falls on both
                    result = run(CONFIGS / f"{name}.yaml", precision, seed, folder, options)
                    results.setdefault((name, precision), []).append(result)
                    if not stages:
                        stages = list(result.angles)
                        writer.writerow(["config", "precision", "seed", "test", *stages, *Result._fields[2:]])
                    writer.writerow([name, precision, seed, result.test, *result.angles.values(), *result[2:]])
                    file.flush()
    table = Table("config", "precision", "test, %", *stages, "feedback", "rounding", "s per epoch")
    for (name, precision), found in results.items():
        table.add_row(
            name,
            precision,
            _spread([result.test for result in found], 2),
            *(_spread([result.angles[stage] for result in found]) for stage in stages),
            _spread([result.feedback for result in found]),
            _spread([result.rounding for result in found]),
            _spread([result.seconds for result in found], 2),
        )
    table.title = f"{seeds} seeds, {threads} threads, torch {torch.__version__}, {os.cpu_count()} cores"
    console = Console(width=170)
    console.print(table)
    console.print(difference_table())


def _spread(values: list[float], digits: int = 1) -> str:
    if isnan(values[0]):
        return ""
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.{digits}f} +- {spread:.{digits}f}"


if __name__ == "__main__":
    auto_cli(measure, as_positional=False)
