"""What lies between the products of a conv stage's feedback training: activation, pooling, and their ways back.

All on ``[channels, height, width, batch]`` maps, and made to be compiled. No function calls for what another computes:
a compiler would compute it once more for every place that it is read from.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from bioprop.functional.batch_last_pooling import pool_batch_last, unpool_batch_last
from bioprop.functional.pooling import Pool, Size

#: ``phi(y_n)`` and switches of the noisy pass; and of that with the opposite noise, if it is asked for.
NoisyFeatures = list[tuple[Tensor, Tensor]]


class StageMaps(NamedTuple):
    """What follows a convolution, and its mirror's way back to the convolution's maps.

    Attributes:
        map_size: height and width of the convolution's maps.
        rho: activation of ``F``; never decreases.
        phi: activation of ``G``.
        pool: max-pooling, if any.
        pool_last: pool after the activation, as one that maps many values to one needs.
        overwrite: how unpooling treats overlapping windows, see `unpool_batch_last`.
    """

    map_size: Size
    rho: Callable[[Tensor], Tensor]
    phi: Callable[[Tensor], Tensor]
    pool: Pool | None
    pool_last: bool
    overwrite: bool

    @property
    def output_size(self) -> Size:
        """Height and width of the output map."""
        return self.map_size if self.pool is None else self.pool.output_size(*self.map_size)

    @property
    def border(self) -> int:
        """Width of what pooling adds around the convolution's maps, in pixels."""
        return 0 if self.pool is None else self.pool.padding

    def activate(self, affine: Tensor) -> tuple[Tensor, Tensor]:
        """Output and switches (zeros without pooling) out of the convolution's maps.

        Args:
            affine: ``[channels, height, width, batch]`` with a border of -inf.
        """
        if self.pool is None:
            output = self.rho(affine)
            return output, torch.zeros_like(output)
        bordered = self.pool._replace(padding=0)
        if self.pool_last:
            return pool_batch_last(torch.where(affine == -torch.inf, affine, self.rho(affine)), bordered)
        pooled, switches = pool_batch_last(affine, bordered)
        return self.rho(pooled), switches

    def unpool(self, pooled: Tensor, switches: Tensor) -> Tensor:
        """Put values back to their places."""
        if self.pool is None:
            return pooled
        return unpool_batch_last(pooled, switches, self.pool, self.map_size, self.overwrite)


class CleanMaps(NamedTuple):
    """What a batch leaves unchanged, ``[channels, height, width, batch]``; see `closed_forms.CleanPass`.

    The first has the border of `StageMaps.activate`.
    """

    affine: Tensor
    output: Tensor
    switches: Tensor
    phi: Tensor
    features: Tensor


def clean_outputs(affine: Tensor, stage: StageMaps) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, switches and ``phi`` of the output, out of ``W x + b`` with its border."""
    output, switches = stage.activate(affine)
    return output, switches, stage.phi(output)


def unpool(values: Tensor, switches: Tensor, stage: StageMaps) -> Tensor:
    """Put values back to their places, ``[channels, height, width, batch]``."""
    return stage.unpool(values, switches)


def noisy_features(change: Tensor, clean: CleanMaps, stage: StageMaps, antithetic: bool) -> NoisyFeatures:
    """``phi(y_n)`` and switches of the noisy pass; and of that with the opposite noise.

    Args:
        change: ``W eps``, with the border of ``clean.affine``.
        clean: of the batch.
        stage: what follows the convolution.
        antithetic: with the opposite noise too.
    """
    changes = [change, -change] if antithetic else [change]
    noisy = [stage.activate(clean.affine + each) for each in changes]
    return [(stage.phi(output), switches) for output, switches in noisy]


def first_difference(noisy: NoisyFeatures, clean: CleanMaps, stage: StageMaps, clean_switches: bool) -> Tensor:
    """``D1 = U_n phi(y_n) - U_c phi(y)``, or half its difference to that of the opposite noise.

    Args:
        noisy: by `noisy_features`.
        clean: of the batch.
        stage: what follows the convolution.
        clean_switches: unpool the noisy output by the clean pass's switches.
    """
    if clean_switches:
        maps = [stage.unpool(phi - clean.phi, clean.switches) for phi, _ in noisy]
    else:
        maps = [stage.unpool(phi, switches) - clean.features for phi, switches in noisy]
    return maps[0] if len(maps) == 1 else 0.5 * (maps[0] - maps[1])


def second_step(noise: Tensor, clean: CleanMaps, stage: StageMaps) -> tuple[Tensor, Tensor]:
    """``phi(y + eta) - phi(y)``, which `unpool` makes ``D2`` of, and the sum of its squares over each channel."""
    step = stage.phi(clean.output + noise) - clean.phi
    return step, step.square().sum((1, 2, 3))
