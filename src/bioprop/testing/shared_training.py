"""Training in one process and in two, on the same rows with the same noise."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from pytorch_lightning import Trainer
from torch import Tensor

from bioprop.algorithms import Algorithm
from bioprop.distributed import process_count, process_rank
from bioprop.feedback.noise import NoiseStream, RandomStreams
from bioprop.runs import GradientAveraging
from bioprop.testing.algorithms import AlgorithmContract
from bioprop.testing.helpers import Batch, Weights, copy_state, draw_batch

Trained = tuple[Weights, list[Weights]]
BATCHES, ROWS = 3, 8


class Shares:
    """The rows of every batch that one process has."""

    def __init__(self, rank: int, count: int, rows: int) -> None:
        self.rank, self.count, self.rows = rank, count, rows

    def __iter__(self) -> Iterator[Batch]:
        for seed in range(BATCHES):
            images, labels = draw_batch(self.rows, seed=seed)
            yield images.double()[self.rank :: self.count], labels[self.rank :: self.count]


def train(
    suite: type[AlgorithmContract], settings: dict[str, Any], same_noise: bool = True, rows: int = ROWS
) -> Trained:
    """Train on the rows of this process; return what is logged, and all tensors of the algorithm and its optimizers."""
    algorithm = suite().made_from_seed(5, **settings).double()
    count, rank = process_count(), process_rank()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    several: dict[str, Any] = {"devices": count, "strategy": GradientAveraging()} if count > 1 else {"devices": 1}
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, precision="64-true", enable_checkpointing=False, **quiet, **several
    )
    with rows_of_the_whole_noise(rank, count) if same_noise else nullcontext():
        trainer.fit(algorithm, Shares(rank, count, rows))
    logged = {name: torch.as_tensor(value) for name, value in trainer.callback_metrics.items()}
    return logged, [copy_state(algorithm), *optimizer_states(algorithm)]


def optimizer_states(algorithm: Algorithm) -> list[Weights]:
    """Copy the tensors of each optimizer's state, by number of the parameter and name."""
    return [
        {
            f"{number}.{key}": value.clone()
            for number, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()
            if isinstance(value, Tensor)
        }
        for optimizer in algorithm.trainer.optimizers
    ]


@contextmanager
def rows_of_the_whole_noise(rank: int, count: int) -> Iterator[None]:
    """Let every process draw its rows of the noise that one process would draw for the whole batch."""
    draw, noise = NoiseStream.draw, RandomStreams.noise

    def noise_of_all(streams: RandomStreams, place: int, like: Tensor, rank: int = 0) -> NoiseStream:
        return noise(streams, place, like)

    def draw_own(stream: NoiseStream, sigma: float, *shapes: Sequence[int]) -> list[Tensor]:
        axes = [int(len(shape) == 5) for shape in shapes]  # in the normals of pool windows samples come first
        wholes = [_stretched(shape, axis, count) for shape, axis in zip(shapes, axes, strict=True)]
        drawn = zip(draw(stream, sigma, *wholes), axes, strict=True)
        return [each[:, rank::count] if axis else each[rank::count] for each, axis in drawn]

    with patch.object(NoiseStream, "draw", draw_own), patch.object(RandomStreams, "noise", noise_of_all):
        yield


def _stretched(shape: Sequence[int], axis: int, times: int) -> list[int]:
    return [*shape[:axis], shape[axis] * times, *shape[axis + 1 :]]
