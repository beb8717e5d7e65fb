"""Max-pooling that hands out its switches, and its two ways back.

Switches are values, never hidden state: ``[batch, channels, pooled height, pooled width]`` integers, each the flat
position (row * width + column) of a window's maximum in the map before pooling.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.activations import FLAT

Size = tuple[int, int]


class Pool(NamedTuple):
    """Geometry of a max-pooling, in pixels, the same in both directions."""

    kernel_size: int
    stride: int
    padding: int = 0

    @property
    def overlaps(self) -> bool:
        """Return whether a position can lie in more than one window."""
        return self.kernel_size > self.stride

    @property
    def overlap(self) -> float:
        """The mean number of windows that a position lies in, at least 1."""
        return max(1.0, (self.kernel_size / self.stride) ** 2)

    def output_size(self, height: int, width: int) -> Size:
        """Height and width after pooling a map of ``height`` by ``width``."""
        reach = self.kernel_size - 2 * self.padding
        return (height - reach) // self.stride + 1, (width - reach) // self.stride + 1

    def activate(self, maps: Tensor, rho: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Compute ``pool(rho(maps))`` and its switches.

        The activations never decrease, so the maximum may be taken first, which leaves them fewer values to work on.

        Args:
            maps: ``[batch, channels, height, width]``.
            rho: one of the activations of `bioprop.functional.activations`.
        """
        # where the activation maps many values to one, the switch must be that of the first of its maxima
        maps = rho(maps) if rho in FLAT else maps
        pooled, switches = F.max_pool2d(maps, *self, return_indices=True)
        if maps.requires_grad and not maps.is_cpu and torch.are_deterministic_algorithms_enabled():
            # the same values, whose gradient is added up in a defined order
            pooled = maps.flatten(2).gather(2, switches.flatten(2)).view_as(switches)
        return rho(pooled), switches


def unpool_adding(pooled: Tensor, switches: Tensor, pool: Pool, size: Sequence[int]) -> Tensor:
    """``P^T pooled``: the transpose of the pooling that chose ``switches``; overlapping windows add up (``exact``).

    Always in the same order: on a GPU torch's own kernel adds atomically.
    """
    if pooled.is_cpu:
        channels_last = pooled.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        like = torch.empty(*pooled.shape[:2], *size, dtype=pooled.dtype, memory_format=layout)
        pair = [[number] * 2 for number in pool]
        back: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(pooled, like, *pair, [1, 1], False, switches)
        return back
    if not pool.overlaps and not torch.are_deterministic_algorithms_enabled():
        return torch._C._nn.max_unpool2d(pooled, switches, size)
    return fold_windows(pooled, switches, pool, size)


def fold_windows(pooled: Tensor, switches: Tensor, pool: Pool, size: Sequence[int]) -> Tensor:
    """`unpool_adding` as a sum over windows, each of which holds its value where its switch points."""
    rows, columns = (
        torch.arange(side, dtype=torch.int32, device=pooled.device) * pool.stride - pool.padding
        for side in pooled.shape[2:]
    )
    taps = torch.arange(pool.kernel_size, dtype=torch.int32, device=pooled.device)
    within = switches.to(torch.int32) - (rows[:, None] * size[1] + columns)
    hit = within.unsqueeze(2) == (taps[:, None] * size[1] + taps).view(-1, 1, 1)
    windows = torch.where(hit, pooled.unsqueeze(2), 0.0)  # [batch, channels, taps, pooled height, pooled width]
    return F.fold(windows.flatten(3).flatten(1, 2), size, pool.kernel_size, 1, pool.padding, pool.stride)  # type: ignore[arg-type]


class Places(NamedTuple):
    """Where pooled values go back to: switches, and which of them stay where windows overlap (None: all)."""

    switches: Tensor
    kept: Tensor | None

    def block(self, samples: slice) -> "Places":
        """Return the part that belongs to some samples of the batch."""
        return Places(self.switches[samples], None if self.kept is None else self.kept[samples])


def locate(switches: Tensor, pool: Pool, overwriting: bool) -> Places:
    """Say where `unpool` puts pooled values.

    Args:
        switches: of the pass that pooled.
        pool: its geometry.
        overwriting: whether the last of overlapping windows stays, in reading order, instead of their sum: the
            unpooling of Zeiler & Fergus (2014) as Ernoult et al. (2022) use it (``paper``). It is not the transpose of
            pooling, since a unit that won two windows gets one of the two values only. torch's own ``max_unpool2d``
            leaves it to the threads which window is the last.
    """
    return Places(switches, last_windows(switches, pool) if overwriting and pool.overlaps else None)


def unpool(pooled: Tensor, places: Places, pool: Pool, size: Sequence[int]) -> Tensor:
    """Put values back to their places in maps of a size; values that are not kept are dropped, the others add up."""
    return unpool_adding(pooled if places.kept is None else pooled * places.kept, places.switches, pool, size)


def pick(maps: Tensor, places: Places) -> Tensor:
    """Read off what lies at the places of pooled values: the transpose of `unpool`.

    Args:
        maps: ``[batch, channels, height, width]``.
        places: of the pooled values, ``[batch, channels, pooled height, pooled width]``.
    """
    # channels innermost, as the maps lie in memory: nothing is copied but what is read
    rows, switches = maps.permute(0, 2, 3, 1).flatten(1, 2), places.switches.permute(0, 2, 3, 1)
    picked = rows.gather(1, switches.flatten(1, 2)).view(switches.shape).permute(0, 3, 1, 2)
    return picked if places.kept is None else picked * places.kept


def last_windows(switches: Tensor, pool: Pool) -> Tensor:
    """Return whether each window is the last, in reading order, that chose its position: bool, like ``switches``."""
    reach = (pool.kernel_size - 1) // pool.stride
    height, width = switches.shape[2:]
    neighbours = F.pad(switches, (reach, reach, 0, reach), value=-1)
    last = torch.ones_like(switches, dtype=torch.bool)
    for down in range(reach + 1):
        for right in range(-reach if down else 1, reach + 1):
            other = neighbours[:, :, down : down + height, reach + right : reach + right + width]
            last &= other != switches
    return last
