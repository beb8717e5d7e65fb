"""Max-pooling that hands out its switches, and its two ways back.

Switches are values, never hidden state: ``[batch, channels, pooled height, pooled width]`` integers, each the flat
position (row * width + column) of a window's maximum in the map before pooling.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Pool(NamedTuple):
    """Geometry of a max-pooling, in pixels, the same in both directions."""

    kernel_size: int
    stride: int
    padding: int = 0

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after pooling a map of ``height`` by ``width``."""
        reach = self.kernel_size - 2 * self.padding
        return (height - reach) // self.stride + 1, (width - reach) // self.stride + 1


def max_pool(maps: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Pool ``[batch, channels, height, width]`` and return (pooled maps, switches)."""
    pooled, switches = F.max_pool2d(maps, *pool, return_indices=True)
    return pooled, switches


def unpool_overwriting(pooled: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
    """Put each value back where its switch points; where windows overlap, the last one stays (``paper``).

    The unpooling of Zeiler & Fergus (2014) as Ernoult et al. (2022) use it. Not the transpose of pooling when windows
    overlap, since a unit that won two windows gets one of the two values only.

    torch's own ``max_unpool2d`` leaves it to the threads which window is the last; here it is the last in reading
    order, on every device.
    """
    values, places = pooled.flatten(2), switches.flatten(2)
    windows = torch.arange(1, values.shape[2] + 1, device=places.device).expand_as(places)
    none = torch.zeros(*values.shape[:2], size[0] * size[1], dtype=torch.int64, device=places.device)
    owner = none.scatter_reduce(2, places, windows, "amax")  # 0: no window chose this position
    maps = torch.where(owner > 0, values.gather(2, (owner - 1).clamp_min(0)), 0.0)
    return maps.view(*pooled.shape[:2], *size)


def unpool_adding(pooled: Tensor, switches: Tensor, size: tuple[int, int]) -> Tensor:
    """``P^T pooled``: the transpose of the pooling that chose ``switches``; overlapping windows add up (``exact``)."""
    batch, channels = pooled.shape[:2]
    maps = pooled.new_zeros(batch, channels, size[0] * size[1])
    return maps.scatter_add(2, switches.flatten(2), pooled.flatten(2)).view(batch, channels, *size)
