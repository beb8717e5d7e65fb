"""All that needs a GPU, checked and measured on one card in under four minutes, as one table.

    make gpu-check     (where the package is not installed: PYTHONPATH=src python -m benchmarks.gpu_check)

The images are noise in memory, as large as CIFAR-10: figures are of speed, not of accuracy. Exit status 1 where a check
fails; a time above its aim is marked and does not fail.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.multiprocessing as mp
from pytorch_lightning import Callback, LightningModule, Trainer, __version__
from torch import Tensor

import bioprop.algorithms as algorithms
from bioprop.algorithms import LDRL, Algorithm, Backprop, FeedbackAlignment
from bioprop.cli import main as bioprop_main
from bioprop.datamodules import ImageDataModule
from bioprop.feedback.training import FeedbackTraining
from bioprop.networks import InvertibleMLP, Network
from bioprop.runs import GradientAveraging
from bioprop.testing.helpers import copy_state, draw_batch, make_loader, sgd, small_lenet
from bioprop.testing.shared_training import Shares, rows_of_the_whole_noise

#: Batches of a timed epoch, and epochs of a timed run, of which the first warms up.
BATCHES, EPOCHS = 100, 3
#: Rows of a batch that two processes share.
ROWS = 8


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: what is checked or measured.
        value: what was found.
        aim: what it should be.
        verdict: ``ok``, ``FAILED`` (a check) or ``above the aim`` (a time).
    """

    name: str
    value: str
    aim: str
    verdict: str


class NoiseImages(ImageDataModule):
    """White noise in the shape of CIFAR-10.

    Args:
        count: Number of training images.
        shared: Arguments of `ImageDataModule`.
    """

    def __init__(self, count: int = 50_000, **shared: Any) -> None:
        super().__init__(image_shape=(3, 32, 32), classes=tuple("0123456789"), **shared)
        self.count = count

    def _labels(self, split: str) -> Tensor:
        return torch.arange(self.count if split == "train" else 100) % 10

    def _decode(self, split: str, indices: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (len(indices), 3, 32, 32), generator=generator, dtype=torch.uint8)


def concrete_algorithms() -> dict[str, Callable[[], Algorithm]]:
    """Return a function that makes each algorithm of the package on a small network, by name of its class."""
    makers: dict[str, Callable[[], Algorithm]] = {}
    for name in algorithms.__all__:
        cls = getattr(algorithms, name)
        if not getattr(cls, "__abstractmethods__", None):
            makers[name] = partial(_made, cls)
    for rule in ("usf", "frsf", "brsf", "kolen_pollack", "weight_mirror"):
        makers[f"FeedbackAlignment {rule}"] = partial(_made, FeedbackAlignment, rule=rule)
    return makers


def _made(cls: Callable[..., Algorithm], **settings: Any) -> Algorithm:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        network: Network = InvertibleMLP((1, 16, 16), 10) if cls is algorithms.GAITProp else small_lenet()
        return cls(network, optimizer=sgd(), **settings)


def check_gradients(device: torch.device) -> Iterator[Row]:
    """Compare every algorithm's gradients in float64 on the CPU and on the device; train three batches in float32."""
    images, labels = draw_batch(16)
    worst, finite = ("", 0.0), []
    for name, make in concrete_algorithms().items():
        here, there = make().double(), make().double().to(device)
        expected = here.forward_gradients(images.double(), labels)
        found = there.forward_gradients(images.double().to(device), labels.to(device))
        for key, value in expected.items():
            distance = float((found[key].cpu() - value).norm() / value.norm().clamp_min(1e-30))
            worst = max(worst, (f"{name} {key}", distance), key=lambda pair: pair[1])
        trained = _trained(make(), device)
        if not all(bool(value.isfinite().all()) for value in trained.values()):
            finite.append(name)
    yield _check(f"gradients equal the CPU's, float64, worst: {worst[0]}", f"{worst[1]:.1e}", "1e-9", worst[1] < 1e-9)
    yield _check("three batches in float32 are finite", ", ".join(finite) or "all", "all", not finite)


def check_same_bits(device: torch.device) -> Iterator[Row]:
    """Train every algorithm twice from one seed with deterministic kernels."""
    different = []
    for name, make in concrete_algorithms().items():
        first, second = (_trained(make(), device, deterministic=True) for _ in range(2))
        if any(not torch.equal(first[key], second[key]) for key in first):
            different.append(name)
    torch.use_deterministic_algorithms(False)
    yield _check("the same seed gives the same bits", ", ".join(different) or "all", "all", not different)


def check_recording(device: torch.device) -> Iterator[Row]:
    """Compare weights after training with steps recorded as CUDA graphs and one by one, with deterministic kernels."""
    worst, complaints = ("", 0.0), []
    for name, make in concrete_algorithms().items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            recorded = _trained(make(), device, deterministic=True)
        complaints += [name for each in caught if "not recorded" in str(each.message)]
        with (
            patch.object(Algorithm, "_may_record", lambda *_: False),
            patch.object(FeedbackTraining, "_may_record", lambda *_: False),
        ):
            single = _trained(make(), device, deterministic=True)
        far = max(float((recorded[key] - value).double().norm()) for key, value in single.items())
        worst = max(worst, (name, far), key=lambda pair: pair[1])
    torch.use_deterministic_algorithms(False)
    yield _check("no recording failed", ", ".join(dict.fromkeys(complaints)) or "none", "none", not complaints)
    yield _check(f"recorded steps equal single ones, worst: {worst[0]}", f"{worst[1]:.1e}", "1e-5", worst[1] < 1e-5)


def check_two_processes(device: torch.device) -> Iterator[Row]:
    """Train with two processes on the one card, over gloo, and compare with one process, in float64."""
    for name, make in {
        "L-DRL": partial(_made, LDRL),
        "BP": partial(_made, Backprop),
        "FA": partial(_made, FeedbackAlignment, rule="fa"),
    }.items():
        alone = _shared_training(make, device, 0, 1)
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_join, (make, device, folder), nprocs=2)  # type: ignore[no-untyped-call]
            together = torch.load(Path(folder) / "weights.pt", weights_only=True)
        far = max(float((together[key] - value).double().norm()) for key, value in alone.items())
        yield _check(f"two processes on one card equal one, {name}", f"{far:.1e}", "1e-9", far < 1e-9)


def _join(rank: int, make: Callable[[], Algorithm], device: torch.device, folder: str) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541"}
    weights = _shared_training(make, device, rank, 2)
    if rank == 0:
        torch.save(weights, Path(folder) / "weights.pt")


def _shared_training(make: Callable[[], Algorithm], device: torch.device, rank: int, count: int) -> dict[str, Tensor]:
    algorithm = make().double()
    settings: dict[str, Any] = {"devices": 1}
    if count > 1 and device.type == "cuda":
        settings = {"devices": count, "strategy": GradientAveraging(parallel_devices=[torch.device("cuda", 0)] * count)}
    elif count > 1:
        settings = {"devices": count, "strategy": GradientAveraging()}
    trainer = _trainer(device, precision="64-true", **settings)
    with rows_of_the_whole_noise(rank, count), _silence():
        trainer.fit(algorithm, Shares(rank, count, ROWS))
    return {key: value.cpu() for key, value in copy_state(algorithm).items()}


def _trained(algorithm: Algorithm, device: torch.device, **settings: Any) -> dict[str, Tensor]:
    """Train on four batches and return the weights."""
    with _silence():
        _trainer(device, **settings).fit(algorithm, make_loader(batches=8, size=16))
    return {key: value.cpu() for key, value in copy_state(algorithm).items()}


def _trainer(device: torch.device, **settings: Any) -> Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    accelerator = "gpu" if device.type == "cuda" else "cpu"
    return Trainer(
        **(
            {"accelerator": accelerator, "devices": 1, "max_epochs": 1, "enable_checkpointing": False}
            | quiet
            | settings
        )
    )


#: What is timed: options of `bioprop fit`, and the aim in milliseconds a batch on one H100.
TIMED: dict[str, tuple[list[str], float]] = {
    "BP, SimpleVGG": (["--config=lightning_configs/backprop_simplevgg_imagefolder.yaml"], 2.5),
    "FA, SimpleVGG": (["--model=FeedbackAlignment", "--model.rule=fa", "--model.network=SimpleVGG"], 3.0),
    "L-DRL, SimpleVGG": (["--config=lightning_configs/ldrl_simplevgg_imagefolder.yaml"], 5.0),
    "L-DRL as published, SimpleVGG": (["--config=lightning_configs/ldrl_simplevgg_cifar10.yaml"], 20.0),
    "L-DRL as published, SimpleVGG, bfloat16": (
        ["--config=lightning_configs/ldrl_simplevgg_cifar10.yaml", "--model.speed.bfloat16=true"],
        12.0,
    ),
    "L-DRL as published, LeNet": (["--config=lightning_configs/ldrl_lenet_cifar10.yaml"], 25.0),
    "L-DRL, LeNet": (["--model=LDRL", "--model.network=LeNet"], 5.0),
    "DTP, SimpleVGG": (["--config=lightning_configs/dtp_simplevgg_imagefolder.yaml"], 35.0),
}


class Clock(Callback):
    """Notes the seconds of every epoch's batches, read when the device is idle."""

    #: Milliseconds a batch of each epoch.
    course: list[float] = []  # noqa: RUF012
    _start = 0.0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = _now()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Read it after the last batch."""
        if trainer.is_last_batch:
            Clock.course.append(1e3 * (_now() - self._start) / trainer.num_training_batches)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def measure_fits(device: torch.device, only: str, batches: int) -> Iterator[Row]:
    """Time a batch of `bioprop fit`, the median of the epochs after the first, and the seconds around the batches."""
    for name, (words, aim) in TIMED.items():
        if only not in name:
            continue
        Clock.course, start = [], perf_counter()
        with tempfile.TemporaryDirectory() as folder, _silence():
            bioprop_main(
                [
                    "fit",
                    *words,
                    "--data=benchmarks.gpu_check.NoiseImages",
                    f"--data.batch_size={256 if 'LeNet' in name else 128}",
                    f"--trainer.accelerator={'gpu' if device.type == 'cuda' else 'cpu'}",
                    f"--trainer.max_epochs={EPOCHS}",
                    f"--trainer.limit_train_batches={batches}",
                    "--trainer.limit_val_batches=0",
                    "--trainer.enable_progress_bar=false",
                    "--trainer.callbacks+=benchmarks.gpu_check.Clock",
                    f"--trainer.default_root_dir={folder}",
                ]
            )
        steady, total = median(Clock.course[1:]), perf_counter() - start
        started = total - sum(Clock.course) * batches / 1e3
        verdict = "ok" if steady <= aim else "above the aim"
        yield Row(f"ms a batch in fit, {name}", f"{steady:.2f}", f"{aim:g}", verdict)
        yield Row(f"s around the batches, {name}", f"{started:.1f}", "15", "ok" if started <= 15 else "above the aim")


def _check(name: str, value: str, aim: str, passed: bool) -> Row:
    return Row(name, value, aim, "ok" if passed else "FAILED")


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", ".*not recorded")
        yield


def run_all(device: torch.device, only: str = "", batches: int = BATCHES) -> list[Row]:
    """Run everything and print each row when it is there.

    Args:
        device: the card; a CPU runs the script, for its test.
        only: part of the names of what is timed.
        batches: number of batches of a timed epoch.
    """
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    _say(f"{name}, torch {torch.__version__}, pytorch-lightning {__version__}, Python {sys.version.split()[0]}")
    rows, start = [], perf_counter()
    parts = [check_gradients(device), check_same_bits(device), check_recording(device), check_two_processes(device)]
    for part in [*parts, measure_fits(device, only, batches)]:
        for row in part:
            rows.append(row)
            _say(f"{row.name:<70} {row.value:>10} {row.aim:>8}  {row.verdict}")
    _say(f"{perf_counter() - start:.0f} s")
    return rows


def main() -> None:
    """Read the options, run, and exit with 1 where a check failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--only", default="", metavar="NAME", help="time only what has this in its name")
    parser.add_argument("--batches", type=int, default=BATCHES, help="batches of a timed epoch")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; --device cpu runs the checks without one")
    rows = run_all(torch.device(given.device), given.only, given.batches)
    sys.exit(any(row.verdict == "FAILED" for row in rows))


if __name__ == "__main__":
    from benchmarks import gpu_check as by_its_name  # so that the command line finds the same `Clock`

    by_its_name.main()
