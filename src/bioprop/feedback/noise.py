"""The noise of feedback training: its direction, its samples and the step that may follow; streams of random numbers.

Feedback training with an echo, or with the second noise integrated out (`bioprop.feedback.losses`), is
linear regression: the unknown is the forward weight, its inputs are patches of noise. All that follows is known of
that, from the sizes alone. A layer's ``r = fan_in / (batch x positions)`` compares the directions that a unit's weight
has with the samples that one batch of noise is for it (every pool window is one).

- **White noise** asks about all directions. The best step for it is ``gradient / (D + damping)``, with ``D`` the unit's
  curvature (`ldrl.curvature_of_units`) and for ``damping`` the curvature that a single sample has along its own
  patch: normalised least mean squares (Widrow & Hoff, 1960). The squared error falls by the factor ``r / (1 + r)``. It
  never grows on average, however few samples there are, and a dead unit is divided by the damping alone. Where ``r`` is
  small the noise of the whole batch is more than is needed: as many images are taken as make it `ENOUGH`.
- **Noise along the activities.** Where ``r`` is large, white noise leaves most directions unseen. But a forward weight
  only ever moves along the activities that come in, and an echo may have any distribution, since it vanishes with the
  error whatever the noise. So every second iteration asks about those directions: its noise is an orthonormal basis of
  the span of the batch's own activities. The step is bounded by what orthonormal rows can do together, and is exact on
  a linear stage whose slopes are 1. The bound grows with the positions, at all of which one pattern may appear. So
  noise is along the activities where ``r`` is above `ENOUGH` for each position, and white again elsewhere.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from bioprop.functional.pooling import Pool

SecondNoise = Literal["independent", "expected", "echo"]

#: Size of the noise that `noise: auto` stands for, in units of the root mean square of the stage's inputs.
NOISE_SHARE = 0.01
#: Least root mean square that this is a share of: smaller noise would drown in the rounding of float32.
LEAST_SCALE = 1e-3
#: Share of the activities' total variance that is added to each sample's, so that their basis can be formed in float32.
BASIS_RIDGE = 1e-5
#: Directions that a unit's weight has for each sample of white noise, at the most.
ENOUGH = 0.5
#: Iterations of a batch that `iterations: auto` stands for with an echo; the least that it stands for without.
ECHO_ITERATIONS, EXPECTED_ITERATIONS = 2, 4
#: How much more than least mean squares the step is damped there: the first term's noise stays at the minimiser.
EXPECTED_DAMPING = 10.0
#: Images that white noise is put on come in multiples of this, which 2, 4 and 8 processes share evenly.
IMAGES_MULTIPLE = 8


class Peers(NamedTuple):
    """Processes that average their gradients: what they do together is what one of them would do alone.

    Attributes:
        size: how many they are.
        rank: number of this one.
        mean: average tensors over all of them.
        gather: put together a batch of which each has ``rows[rank::size]``.
    """

    size: int
    rank: int
    mean: Callable[[Sequence[Tensor]], Sequence[Tensor]]
    gather: Callable[[Tensor], Tensor]


ALONE = Peers(1, 0, lambda tensors: tensors, lambda rows: rows)


class Probing:
    """The noise of one layer on one batch: its size, its directions, its images, and the damping of the step.

    Args:
        inputs: of the layer, ``[batch, ...]``: this process's images.
        fan_in: weights of one unit.
        positions: of a unit's output map, after pooling; 1 for a linear layer.
        overlap: how many pool windows a position lies in on average.
        area: how many positions before pooling there are for each window.
        echo: whether the second noise is an echo; else it is integrated out.
        noise: standard deviation, in units of the activations; None for `NOISE_SHARE` of theirs.
        whole: whether an echo's white noise is on the whole batch, too, instead of on as many images as are needed.
        samples: draws of the noise that the gradient of an iteration is the mean of.
        peers: who else has rows of the batch.

    Attributes:
        ratio: ``r``, of the rows of all.
        images: that there is white noise on, the first ones of this process.
        sigma: standard deviation of the noise.
    """

    def __init__(
        self,
        inputs: Tensor,
        fan_in: int,
        positions: int,
        overlap: float = 1.0,
        area: float = 1.0,
        echo: bool = True,
        noise: float | None = None,
        whole: bool = False,
        samples: int = 1,
        peers: Peers = ALONE,
    ) -> None:
        batch = len(inputs)
        self.ratio = fan_in / (batch * peers.size * positions)
        self.images = batch
        if echo and not whole:
            needed = IMAGES_MULTIPLE * math.ceil(fan_in / (ENOUGH * positions * IMAGES_MULTIPLE))
            self.images = min(batch, math.ceil(needed / peers.size))
        self.sigma: float | Tensor = NOISE_SHARE * scale_of(inputs, peers) if noise is None else noise
        self._inputs, self._samples, self._peers = inputs, samples, peers
        self._turns = echo and self.ratio > ENOUGH * positions
        one_patch = fan_in * overlap / (self.images * samples * peers.size)
        self._white_damping = 2.0 * one_patch * (1.0 if echo else EXPECTED_DAMPING)
        # two rows that are orthogonal as images may be one pattern at two positions, and windows may choose both
        crowded = positions * max(1.0, 0.5 * area)
        self._activity_damping = 2.0 * inputs[0].numel() * crowded / (batch * peers.size)

    def is_along(self, draw: int) -> bool:
        """Return whether a draw of the noise, by its number within the batch, is along the activities."""
        return self._turns and draw // self._samples % 2 == 1

    def shape(self, draw: int) -> tuple[int, ...] | None:
        """Shape of the standard normals that a draw is made of; None where it needs none."""
        return None if self.is_along(draw) else (self.images, *self._inputs.shape[1:])

    def noise(self, normals: Tensor | None) -> Tensor:
        """Make the noise ``eps`` of a draw: on the first `images` of the batch, or on all of it along the activities.

        Args:
            normals: of `shape`, overwritten; None for noise along the activities.
        """
        if normals is None:
            basis = along_activities(self._peers.gather(self._inputs), self.sigma)
            return basis[self._peers.rank :: self._peers.size]
        return normals.mul_(self.sigma)

    def draw(self, stream: "NoiseStream", draw: int) -> Tensor:
        """Draw the noise ``eps`` of one draw from a stream."""
        shape = self.shape(draw)
        return self.noise(None if shape is None else stream.draw(1.0, shape)[0])

    def damping(self, draw: int) -> float | Tensor:
        """Curvature along the patch of one sample of white noise; along the activities the most that it can be."""
        share = self._activity_damping if self.is_along(draw) else self._white_damping
        return self.sigma**2 * share

    def damped(self, curvature: Tensor, draw: int) -> Tensor:
        """Compute the divisor of the step after a draw.

        Args:
            curvature: of the units, or of their taps.
            draw: number of the draw within the batch.
        """
        return curvature * (not self.is_along(draw)) + self.damping(draw)

    def step(self, stream: "NoiseStream", draw: int, curvature: Tensor) -> tuple[Tensor, Tensor]:
        """Return `draw` and `damped`: the noise of one draw, and the divisor of the step after it."""
        return self.draw(stream, draw), self.damped(curvature, draw)


class Rule(NamedTuple):
    """The rule that the feedback of one stage is trained by: the settings of `LDRL`, with None for ``auto``.

    Attributes:
        second_noise: ``echo``, ``expected`` or ``independent``.
        clean_switches: unpool the noisy output by the clean pass's switches, instead of by its own.
        noise: standard deviation.
        whole: whether an echo's noise is on the whole batch.
        by_layers: whether stages of several layers are trained layer by layer.
        samples: draws of the noise that the gradient of an iteration is the mean of.
        peers: processes that average their gradients.
    """

    second_noise: SecondNoise
    clean_switches: bool
    noise: float | None
    whole: bool
    by_layers: bool
    samples: int
    peers: Peers

    @property
    def sigma(self) -> float:
        """The standard deviation of noise that cannot be left to ``auto``."""
        assert self.noise is not None  # `LDRL` refuses independent noise without it
        return self.noise

    def probing(self, inputs: Tensor, weight: Tensor, output: Tensor, map_size: int, pool: Pool | None) -> Probing:
        """Return the noise of one layer on one batch.

        Args:
            inputs: of the layer, ``[batch, ...]``.
            weight: its feedback weight, ``[units, ...]``.
            output: of the layer after pooling, ``[batch, units, ...]``.
            map_size: the number of positions before pooling.
            pool: the pooling, or None.
        """
        echo, fan_in, positions = self.second_noise == "echo", weight[0].numel(), output[0, 0].numel()
        overlap = 1.0 if pool is None else pool.overlap
        settings = echo, self.noise, self.whole, self.samples, self.peers
        return Probing(inputs, fan_in, positions, overlap, map_size / positions, *settings)


def expected_iterations(ratio: float) -> int:
    """The number of iterations a batch that ``auto`` stands for where the second noise is integrated out.

    Without an echo a weight is learned as the mean over noise, of which a batch has one sample for ``r`` directions: a
    step is damped by as much, and as many are taken, or feedback would follow the later the wider the stage is.

    Args:
        ratio: ``r``, the largest of the stage's layers.
    """
    return max(EXPECTED_ITERATIONS, math.ceil(ratio))


def along_activities(inputs: Tensor, sigma: float | Tensor) -> Tensor:
    """An orthonormal basis of the span of a batch's activities, each row of length ``sigma sqrt(features)``.

    Rows of ``L^-1 X`` with ``L L^T = X X^T + ridge``. Directions in which the activities hardly vary come out shorter.

    Args:
        inputs: ``X``, ``[batch, ...]``.
        sigma: root mean square of white noise of the same size.

    Returns:
        Like ``inputs``.
    """
    rows = inputs.flatten(1)
    gram = rows @ rows.t()
    ridge = (BASIS_RIDGE * gram.diagonal().sum()).clamp_min(torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(ridge)
    factor, _ = torch.linalg.cholesky_ex(gram)  # without the check that would make the host wait for a GPU
    basis: Tensor = torch.linalg.solve_triangular(factor, rows, upper=False)
    basis = basis.mul_(sigma * math.sqrt(rows.shape[1])).reshape(inputs.shape)
    return basis.contiguous(memory_format=torch.channels_last) if basis.dim() == 4 else basis


def scale_of(values: Tensor, peers: Peers = ALONE) -> Tensor:
    """Root mean square of activations, or `LEAST_SCALE` where it is smaller: a dead stage needs noise, too."""
    (mean_square,) = peers.mean([values.square().mean()])
    return mean_square.sqrt().clamp_min(LEAST_SCALE)


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
        return [_shaped(self._values(math.prod(shape), sigma), shape) for shape in shapes]

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
    """Generators that are a function of a seed, the number of batches seen and a number, all saved in checkpoints.

    The seed is drawn from the global generator at construction, so it follows from the seed of the run; the number of
    batches counts through all epochs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seed", torch.randint(2**31, (1,)))
        self.register_buffer("batches", torch.zeros(1, dtype=torch.int64))
        self.seed: Tensor
        self.batches: Tensor
        #: Generators of a recorded step, by number, in the place of those of this batch.
        self.given: Mapping[int, torch.Generator] | None = None
        self._watched: list[dict[int, int]] = []

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Stay on the CPU: reading a counter from a GPU would make the host wait for it."""
        return self

    def generator(self, number: int, device: torch.device, rank: int = 0) -> torch.Generator:
        """Make the generator of one number for this batch.

        Args:
            number: a stage or layer, by its number.
            device: where the numbers are wanted.
            rank: of the process whose images they are for: each draws its own.
        """
        for asked in self._watched:
            asked[number] = rank
        if self.given is not None:
            return self.given[number]
        return torch.Generator(device).manual_seed(self.seed_of(number, rank))

    def seed_of(self, number: int, rank: int = 0) -> int:
        """Return the seed of a generator of this batch."""
        entropy = [int(self.seed), int(self.batches), number, *([rank] if rank else [])]
        (seed,) = np.random.SeedSequence(entropy).generate_state(1)
        return int(seed)

    @contextmanager
    def watched(self) -> Iterator[dict[int, int]]:
        """Collect the ranks that generators are asked for with, by number."""
        self._watched.append({})
        try:
            yield self._watched[-1]
        finally:
            self._watched.pop()

    @contextmanager
    def given_by(self, generators: Mapping[int, torch.Generator]) -> Iterator[None]:
        """Hand out these generators; whoever seeds them also counts the batches."""
        self.given = generators
        try:
            yield
        finally:
            self.given = None

    def noise(self, number: int, like: Tensor, rank: int = 0) -> NoiseStream:
        """Make the noise of this batch for one number, in the type and on the device of a tensor; see `generator`."""
        return NoiseStream(self.generator(number, like.device, rank), like.dtype)

    def next_batch(self) -> None:
        """Move on: the next generators differ from all before."""
        if self.given is None:
            self.batches += 1
