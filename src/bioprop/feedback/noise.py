"""Random numbers that an interrupted run draws again."""

from collections.abc import Sequence
from math import prod
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn


class NoiseStream:
    """Gaussian noise for one stage or layer on one batch, drawn in order.

    Args:
        generator: seeded for the batch; on the device where the noise is wanted.
        dtype: of the noise.
    """

    def __init__(self, generator: torch.Generator, dtype: torch.dtype) -> None:
        self.generator, self.dtype = generator, dtype

    def draw(self, sigma: float, *shapes: Sequence[int]) -> list[Tensor]:
        """Draw ``N(0, sigma^2)``.

        Args:
            sigma: standard deviation.
            shapes: of the tensors; those of four dimensions come in ``channels_last`` layout.

        Returns:
            One tensor a shape.
        """
        return [_shaped(self._values(prod(shape), sigma), shape) for shape in shapes]

    def _values(self, count: int, sigma: float) -> Tensor:
        # contiguous memory is filled fastest
        values = torch.empty(count, device=self.generator.device, dtype=self.dtype)
        return values.normal_(0.0, sigma, generator=self.generator)


def _shaped(values: Tensor, shape: Sequence[int]) -> Tensor:
    """View a vector in a shape, in ``channels_last`` layout if that shape is one of images."""
    if len(shape) != 4:
        return values.view(*shape)
    batch, channels, height, width = shape
    return values.view(batch, height, width, channels).permute(0, 3, 1, 2)


class RandomStreams(nn.Module):
    """Generators that are a function of a seed, the number of batches seen and a place, all saved in checkpoints.

    The seed is drawn from the global generator at construction, so it follows from the seed of the run; the number of
    batches counts through all epochs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seed", torch.randint(2**31, (1,)))
        self.register_buffer("batches", torch.zeros(1, dtype=torch.int64))
        self._generators: dict[tuple[int, torch.device], torch.Generator] = {}
        self.seed: Tensor
        self.batches: Tensor

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Stay on the CPU: reading a counter from a GPU would make the host wait for it."""
        return self

    def generator(self, place: int, device: torch.device, rank: int = 0) -> torch.Generator:
        """Seed the generator of one place for this batch; the same object for the place in every batch.

        Args:
            place: a stage or layer, by its number.
            device: where the numbers are wanted.
            rank: of the process whose images they are for: each draws its own.
        """
        entropy = [int(self.seed), int(self.batches), place, *([rank] if rank else [])]
        (seed,) = np.random.SeedSequence(entropy).generate_state(1)
        # a recorded CUDA graph goes on drawing from the generator it was recorded with
        generator = self._generators.setdefault((place, device), torch.Generator(device))
        return generator.manual_seed(int(seed))

    def noise(self, place: int, like: Tensor, rank: int = 0) -> NoiseStream:
        """Make the noise of this batch for one place, in the type and on the device of a tensor; see `generator`."""
        return NoiseStream(self.generator(place, like.device, rank), like.dtype)

    def next_batch(self) -> None:
        """Move on: the next generators differ from all before."""
        self.batches += 1
