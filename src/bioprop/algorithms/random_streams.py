"""Random numbers that an interrupted run draws again."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

#: Numbers that one generator draws: few enough to share among threads, many enough to be worth its set-up.
CHUNK = 2**18
#: Words of the state of torch's CPU generator (a Mersenne Twister), and where they lie in what `get_state` gives.
TWISTER_WORDS, TWISTER_START = 624, 24


class NoiseStream:
    """Gaussian noise that is a function of (key, iteration) alone, whatever the number of threads.

    Args:
        key: three integers that name the stream; streams of different keys are independent.
        device: where the noise is wanted.
        dtype: of the noise.
        generator: what to draw from, in order, once it is seeded by the key; needed on a GPU, where generators count.
    """

    def __init__(
        self,
        key: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
        generator: torch.Generator | None = None,
    ) -> None:
        self.key, self.device, self.dtype, self._generator = key, device, dtype, generator
        self._seeded = False
        self._buffer = torch.empty(0, device=device, dtype=dtype)

    def draw(self, iteration: int, sigma: float, *shapes: Sequence[int]) -> list[Tensor]:
        """Draw ``N(0, sigma^2)``.

        Args:
            iteration: number of the iteration; with a generator they are asked for in order.
            sigma: standard deviation.
            shapes: of the tensors; those of four dimensions come in ``channels_last`` layout.

        Returns:
            One tensor a shape. The next draw overwrites them.
        """
        counts = [prod(shape) for shape in shapes]
        if self._buffer.numel() != sum(counts):
            self._buffer = torch.empty(sum(counts), device=self.device, dtype=self.dtype)
        if self._generator is None:
            self._fill_on_cpu(iteration, sigma)
        else:
            self._buffer.normal_(0.0, sigma, generator=self.generator())
        return [_shaped(part, shape) for part, shape in zip(torch.split(self._buffer, counts), shapes, strict=True)]

    def generator(self) -> torch.Generator:
        """Return the generator it was given, seeded by the key.

        Raises:
            ValueError: if it was given none.
        """
        if self._generator is None:
            raise ValueError("on a CPU every chunk of noise has a generator of its own")
        if not self._seeded:
            (seed,) = np.random.Philox(key=self.key[0], counter=[0, 0, *self.key[1:]]).random_raw(1)
            self._generator.manual_seed(int(seed) >> 1)
            self._seeded = True
        return self._generator

    def _fill_on_cpu(self, iteration: int, sigma: float) -> None:
        # torch fills contiguous memory fastest, but on one thread: every chunk has a generator of its own
        chunks = torch.split(self._buffer, CHUNK)

        def fill(number: int) -> None:
            generator = keyed_generator(self.key, iteration, number)
            chunks[number].normal_(0.0, sigma, generator=generator)

        threads = torch.get_num_threads()
        if threads == 1 or len(chunks) == 1:
            for number in range(len(chunks)):
                fill(number)
        else:
            list(_workers(threads).map(fill, range(len(chunks))))


def keyed_generator(key: tuple[int, int, int], iteration: int, chunk: int) -> torch.Generator:
    """A CPU generator whose whole state is a block of the counter-based Philox (Salmon et al., 2011).

    ``manual_seed`` keeps 32 bits of a seed only: some of the hundreds of millions of streams of a long run would be
    the same.
    """
    words = np.random.Philox(key=key[0], counter=[0, iteration << 32 | chunk, *key[1:]]).random_raw(TWISTER_WORDS // 2)
    state = _blank_state().clone()
    state.numpy()[TWISTER_START : TWISTER_START + 8 * TWISTER_WORDS].view(np.uint64)[:] = words.view(np.uint32)
    generator = torch.Generator()
    generator.set_state(state)
    return generator


@cache
def _blank_state() -> Tensor:
    """State of a generator that has drawn nothing yet."""
    return torch.Generator().manual_seed(1).get_state()


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="noise")


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

    def generator(self, place: int, device: torch.device) -> torch.Generator:
        """Make the generator of this batch for one place (a stage or layer, by its number)."""
        sequence = np.random.SeedSequence([int(self.seed), int(self.batches), place])
        return torch.Generator(device).manual_seed(int(sequence.generate_state(1)[0]))

    def noise(self, place: int, like: Tensor, rank: int = 0) -> NoiseStream:
        """Make the noise of this batch for one place, in the type and on the device of a tensor.

        Args:
            place: a stage or layer, by its number.
            like: of the type and on the device wanted.
            rank: of the process whose images the noise is for: each draws its own.
        """
        key = int(self.seed), int(self.batches), rank << 32 | place
        if like.device.type == "cpu":
            return NoiseStream(key, like.device, like.dtype)
        # a recorded CUDA graph goes on drawing from the generator it was recorded with
        generator = self._generators.setdefault((place, like.device), torch.Generator(like.device))
        return NoiseStream(key, like.device, like.dtype, generator=generator)

    def next_batch(self) -> None:
        """Move on: the next generators differ from all before."""
        self.batches += 1
