"""Time that Lightning, with the metrics and the log of every batch, adds to the steps of an algorithm."""

import logging
import warnings
from collections.abc import Callable
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from benchmarks.learners import algorithm_learner
from bioprop.algorithms import LDRL, Algorithm, Backprop
from bioprop.networks import MLP, Network

#: Of a network so small that next to nothing is left but the overhead.
SHAPE, CLASSES, BATCH = (1, 8, 8), 10, 32


def small_network() -> Network:
    """Make the network that steps fast."""
    return MLP(SHAPE, CLASSES, hidden=(16,))


ALGORITHMS: dict[str, Callable[[], Algorithm]] = {
    "BP": lambda: Backprop(small_network()),
    "L-DRL without feedback training": lambda: LDRL(small_network(), iterations=0),
}


class _Clock(Callback):
    """Notes when every training batch ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.times.append(perf_counter())


def overheads(batches: int) -> dict[str, list[float]]:
    """Return the seconds that each batch takes longer in `Trainer.fit` than the median step outside, by algorithm.

    Without logger, progress bar and checkpoints.

    Args:
        batches: number of them; the first tenth is not counted.
    """
    data = [(torch.randn(BATCH, *SHAPE), torch.randint(CLASSES, (BATCH,))) for _ in range(batches)]
    return {name: _overhead(make, data) for name, make in ALGORITHMS.items()}


def _overhead(make: Callable[[], Algorithm], data: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
    step, outside = algorithm_learner(make()).step, []
    for images, labels in data:
        start = perf_counter()
        step(images, labels)
        outside.append(perf_counter() - start)
    clock, first = _Clock(), len(data) // 10
    logger = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = logger.level
    with warnings.catch_warnings(), TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # Lightning's advice on data loaders
        logger.setLevel(logging.ERROR)
        try:
            trainer = Trainer(
                max_epochs=1,
                accelerator="cpu",
                callbacks=[clock],
                logger=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                default_root_dir=folder,
            )
            trainer.fit(make(), DataLoader(data, batch_size=None))  # type: ignore[arg-type]
        finally:
            logger.setLevel(level)
    usual = median(outside[first:])
    return [late - early - usual for early, late in zip(clock.times[first:], clock.times[first + 1 :], strict=False)]
