"""L-DRL's closed form for convolutions, computed by tiles: see `winograd` for the tiles, `closed_forms` for the form.

Two transforms serve two products each: that of the noise, which is convolved and is one side of a weight gradient; and
that of ``D2``, likewise. ``V^T D2`` is needed as one side of a weight gradient only, so that it never becomes a map.
Maps are ``[channels, height, width, batch]``.
"""

from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.activations import identity
from bioprop.functional.closed_forms import inner
from bioprop.functional.compiled import compiled
from bioprop.functional.feedback_losses import FeedbackGradient
from bioprop.functional.pooling import Size
from bioprop.functional.stage_maps import (
    CleanMaps,
    NoisyFeatures,
    StageMaps,
    clean_outputs,
    first_difference,
    noisy_features,
    second_step,
    unpool,
)
from bioprop.functional.winograd import (
    Winograd,
    input_tiles,
    join_kernels,
    join_tiles,
    kernel_tiles,
    output_tiles,
    padded_side,
    retile,
    tile_correlations,
    tile_count,
    tile_products,
)

#: Bytes of all tiles of a block of samples: a few times that stays near a processor's last cache.
BLOCK_BYTES = 20 * 2**20

Tiles = list[Tensor]


class TiledLayer(NamedTuple):
    """A convolution of stride 1 with what follows it.

    Attributes:
        tiling: of the kernel.
        padding: zeros on every side, in pixels; at most ``taps - 1``.
        input_size: height and width of the input map.
        maps: what follows, and the mirror's way back.
    """

    tiling: Winograd
    padding: int
    input_size: Size
    maps: StageMaps


class TiledFeedback:
    """Gradient of the L-DRL loss on one batch, by tiles.

    Args:
        layer: stage and mirror.
        weight: ``W``, ``[out, in, taps, taps]``.
        affine: ``W x + b``, ``[batch, out, *map_size]``.
        compile: make one pass each of transforms and point-wise work.
    """

    def __init__(self, layer: TiledLayer, weight: Tensor, affine: Tensor, compile: bool) -> None:
        (out, in_), taps, maps, batch = weight.shape[:2], layer.tiling.taps, layer.maps, len(affine)
        self._layer, self._passes = layer, _passes(layer, (out, in_, batch), compile)
        self._weight = self._passes.forward_kernels(weight, layer.tiling)
        tiles = max(prod(map(tile_count, size)) for size in (maps.map_size, layer.input_size))
        samples = _block(batch, layer.tiling.side**2 * max(out, in_) * tiles * weight.element_size())
        blocks = torch.split(affine.permute(1, 2, 3, 0), samples, 3)
        self._clean = [self._prepare(block) for block in blocks]
        self._batch, self._channels = batch, (out, in_)
        # maps with their border: the same memory for every block and iteration
        self._inputs = _Padded(weight, in_, layer.input_size, layer.padding, maps.map_size, taps, samples)
        self._outputs = _Padded(weight, out, maps.map_size, taps - 1 - layer.padding, layer.input_size, taps, samples)
        self._change = torch.zeros_like(self._clean[0].affine)

    def noise_shapes(self) -> list[tuple[int, int]]:
        """Shapes of the noise at input and output of every block, ``[channels, positions * samples]``."""
        (out, in_), layer = self._channels, self._layer
        sizes = (in_, layer.input_size), (out, layer.maps.output_size)
        return [(channels, prod(size) * clean.output.shape[3]) for clean in self._clean for channels, size in sizes]

    def gradient(
        self,
        feedback: Tensor,
        noise: Sequence[Tensor],
        sigma: float,
        clean_switches: bool = False,
        antithetic: bool = False,
    ) -> FeedbackGradient:
        """Gradient, loss and curvature as `closed_forms.ldrl_closed_form` has them.

        Args:
            feedback: ``V``.
            noise: in the order and form of `noise_shapes`.
            sigma: standard deviation of all noise.
            clean_switches: unpool the noisy output by the clean pass's switches.
            antithetic: average the first term over the noise and its negative.
        """
        tiling, maps, passes = self._layer.tiling, self._layer.maps, self._passes
        back_weight = passes.feedback_kernels(feedback, tiling)
        firsts: list[Tiles] = []
        seconds: list[Tiles] = []
        squares: list[Tensor] = []
        for clean, eps, eta in zip(self._clean, noise[::2], noise[1::2], strict=True):
            self._inputs.interior.copy_(eps.view(self._inputs.interior.shape))
            tiles = passes.input_tiles(self._inputs.maps, tiling)
            passes.join(self._change, tile_products(self._weight, tiles), self._layer)
            noisy = passes.noisy_features(self._change, clean, maps, antithetic)
            first = passes.first_tiles(noisy, clean, self._layer, clean_switches)
            firsts.append(tile_correlations(first, tiles))
            del first, tiles
            step, step_squares = passes.second_step(eta.view_as(clean.output), clean, maps)
            squares.append(step_squares)
            passes.second_maps(self._outputs.interior, step, clean, maps)
            tiles = passes.output_tiles(self._outputs.maps, tiling)
            second = passes.retile(tile_products(back_weight, tiles), self._layer.input_size, tiling)
            seconds.append(tile_correlations(tiles, second))
            del second, tiles
        first_sum, second_sum = passes.weight_gradients(_total(firsts), _total(seconds), tiling)
        # |V^T D2|^2 = <V, wgrad(V^T D2, D2)>
        second_term = inner(feedback, second_sum)
        gradient = second_sum.sub_(first_sum)
        loss = (2.0 * inner(feedback, gradient) - second_term) / self._batch
        if maps.phi is identity:
            curvature = feedback.new_full((len(feedback),), 2.0 * sigma**2 * prod(maps.output_size))
        else:
            curvature = torch.stack(squares).sum(0).mul_(2.0 / self._batch)
        return FeedbackGradient({"weight": gradient.mul_(2.0 / self._batch)}, loss, curvature)

    def _prepare(self, affine: Tensor) -> CleanMaps:
        maps = self._layer.maps
        bordered = F.pad(affine, (0, 0, *[maps.border] * 4), value=-torch.inf).contiguous()
        output, switches, phi = self._passes.clean_outputs(bordered, maps)
        return CleanMaps(bordered, output, switches, phi, self._passes.unpool(phi, switches, maps))


class _Padded:
    """Maps within a border of zeros, as wide as the tiles of a product read.

    Args:
        like: of the type and on the device wanted.
        channels: of the maps.
        size: height and width.
        padding: zeros before the first row and column; behind the last there may be more.
        outputs: height and width of what the product computes.
        taps: of the kernel.
        samples: in a block.
    """

    def __init__(
        self, like: Tensor, channels: int, size: Size, padding: int, outputs: Size, taps: int, samples: int
    ) -> None:
        self.maps = like.new_zeros(channels, *(padded_side(side, taps) for side in outputs), samples)
        self.interior = self.maps[:, padding : padding + size[0], padding : padding + size[1]]


def _block(batch: int, sample_bytes: int) -> int:
    """Samples of a block: the largest part of a batch, in equal parts, whose tiles stay in the cache.

    Equal, since every size is compiled for itself. Where that would make many tiny blocks (of a prime number of
    samples, say), the next larger part.
    """
    most = max(1, min(batch, BLOCK_BYTES // sample_bytes))
    parts = [part for part in range(1, batch + 1) if batch % part == 0]
    fitting = max(part for part in parts if part <= most)
    return fitting if 4 * fitting > most else min(part for part in parts if part > most)


def _total(blocks: Sequence[Tiles]) -> Tiles:
    total = blocks[0]
    for block in blocks[1:]:
        torch._foreach_add_(total, block)
    return total


# -- what is compiled: transforms and point-wise work --------------------------------------------------------------


def _join(change: Tensor, products: Tiles, layer: TiledLayer) -> None:
    """``W eps``, within its border, out of its tiles."""
    border, (height, width) = layer.maps.border, layer.maps.map_size
    inner = change[:, border : border + height, border : border + width]
    inner.copy_(join_tiles(products, layer.maps.map_size, layer.tiling))


def _first_tiles(noisy: NoisyFeatures, clean: CleanMaps, layer: TiledLayer, clean_switches: bool) -> Tiles:
    return output_tiles(first_difference(noisy, clean, layer.maps, clean_switches), layer.tiling)


def _second_maps(maps: Tensor, step: Tensor, clean: CleanMaps, stage: StageMaps) -> None:
    """Set the maps to ``D2``."""
    maps.copy_(stage.unpool(step, clean.switches))


def _feedback_kernels(feedback: Tensor, tiling: Winograd) -> Tiles:
    """Tiles of the kernels that a transposed convolution slides over its maps: turned round, from out to in."""
    return kernel_tiles(feedback.flip(2, 3).transpose(0, 1), tiling)


def _weight_gradients(first: Tiles, second: Tiles, tiling: Winograd) -> tuple[Tensor, Tensor]:
    """Weight gradients of the convolution and of the transposed one, whose kernels are turned round."""
    return join_kernels(first, tiling), join_kernels(second, tiling).flip(2, 3)


class TilePasses(NamedTuple):
    """All functions that make one pass over memory each, compiled or not."""

    clean_outputs: Callable[[Tensor, StageMaps], tuple[Tensor, Tensor, Tensor]] = clean_outputs
    unpool: Callable[[Tensor, Tensor, StageMaps], Tensor] = unpool
    forward_kernels: Callable[[Tensor, Winograd], Tiles] = kernel_tiles
    feedback_kernels: Callable[[Tensor, Winograd], Tiles] = _feedback_kernels
    input_tiles: Callable[[Tensor, Winograd], Tiles] = input_tiles
    output_tiles: Callable[[Tensor, Winograd], Tiles] = input_tiles
    join: Callable[[Tensor, Tiles, TiledLayer], None] = _join
    noisy_features: Callable[[Tensor, CleanMaps, StageMaps, bool], NoisyFeatures] = noisy_features
    first_tiles: Callable[[NoisyFeatures, CleanMaps, TiledLayer, bool], Tiles] = _first_tiles
    second_step: Callable[[Tensor, CleanMaps, StageMaps], tuple[Tensor, Tensor]] = second_step
    second_maps: Callable[[Tensor, Tensor, CleanMaps, StageMaps], None] = _second_maps
    retile: Callable[[Tiles, Size, Winograd], Tiles] = retile
    weight_gradients: Callable[[Tiles, Tiles, Winograd], tuple[Tensor, Tensor]] = _weight_gradients


@cache
def _passes(layer: TiledLayer, sizes: tuple[int, ...], compile: bool) -> TilePasses:
    """The passes of one layer on tensors of certain sizes, each compiled apart from all others."""
    passes: tuple[Callable[..., Any], ...] = TilePasses()
    return TilePasses(*map(compiled, passes)) if compile else TilePasses()
