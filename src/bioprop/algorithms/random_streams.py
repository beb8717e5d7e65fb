"""Random numbers that an interrupted run draws again."""

import numpy as np
import torch
from torch import Tensor, nn


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

    def next_batch(self) -> None:
        """Move on: the next generators differ from all before."""
        self.batches += 1
