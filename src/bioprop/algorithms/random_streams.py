"""Random numbers that an interrupted run draws again."""

import numpy as np
import torch
from torch import Tensor, nn


class NoiseStream:
    """Gaussian noise of one stage and batch."""

    def __init__(self, generator: torch.Generator, like: Tensor) -> None:
        self.generator, self.like = generator, like

    def draw(self, iteration: int, sigma: float, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Draw one tensor of ``N(0, sigma^2)`` for each shape; iterations are asked for in order."""
        kind = {"dtype": self.like.dtype, "device": self.like.device}
        return [sigma * torch.randn(shape, generator=self.generator, **kind) for shape in shapes]  # type: ignore[call-overload]


class RandomStreams(nn.Module):
    """Generators that are a function of a seed, the number of batches seen and a place, all saved in checkpoints.

    The seed is drawn from the global generator at construction, so it follows from the seed of the run.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seed", torch.randint(2**31, (1,)))
        self.register_buffer("batches", torch.zeros(1, dtype=torch.int64))
        self.seed: Tensor
        self.batches: Tensor

    def generator(self, place: int, device: torch.device) -> torch.Generator:
        """Make the generator of this batch for one place (a stage or layer, by its number)."""
        sequence = np.random.SeedSequence([int(self.seed), int(self.batches), place])
        return torch.Generator(device).manual_seed(int(sequence.generate_state(1)[0]))

    def noise(self, place: int, like: Tensor) -> NoiseStream:
        """Make the noise of this batch for one place, in the type and on the device of a tensor."""
        return NoiseStream(self.generator(place, like.device), like)

    def next_batch(self) -> None:
        """Move on: the next generators differ from all before."""
        self.batches += 1
