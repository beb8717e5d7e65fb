"""Max-pooling that hands out its switches, and its two ways back.

Switches are values, never hidden state: ``[batch, channels, pooled height, pooled width]`` integers, each the flat
position (row * width + column) of a window's maximum in the map before pooling.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


class Pool(NamedTuple):
    """Geometry of a max-pooling, in pixels, the same in both directions."""

    kernel_size: int
    stride: int
    padding: int = 0

    @property
    def overlaps(self) -> bool:
        """Whether a position can lie in more than one window."""
        return self.kernel_size > self.stride

    def output_size(self, height: int, width: int) -> Size:
        """Height and width after pooling a map of ``height`` by ``width``."""
        reach = self.kernel_size - 2 * self.padding
        return (height - reach) // self.stride + 1, (width - reach) // self.stride + 1


def max_pool(maps: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Pool ``[batch, channels, height, width]`` and return (pooled maps, switches)."""
    pooled, switches = F.max_pool2d(maps, *pool, return_indices=True)
    return pooled, switches


def unpool_adding(pooled: Tensor, switches: Tensor, pool: Pool, size: Size) -> Tensor:
    """``P^T pooled``: the transpose of the pooling that chose ``switches``; overlapping windows add up (``exact``)."""
    if not pool.overlaps:
        return torch._C._nn.max_unpool2d(pooled, switches, size)
    if pooled.device.type != "cpu":  # torch's own kernel adds in no defined order on GPUs
        return gather_windows(pooled, switch_taps(switches, pool, size), pool, size)
    layout = torch.channels_last if pooled.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
    like = torch.empty(*pooled.shape[:2], *size, dtype=pooled.dtype, memory_format=layout)
    pair = [[number] * 2 for number in pool]
    back: Tensor = torch.ops.aten.max_pool2d_with_indices_backward(pooled, like, *pair, [1, 1], False, switches)
    return back


class Places(NamedTuple):
    """Where pooled values go back to: switches, and which of them stay where windows overlap (None: all)."""

    switches: Tensor
    kept: Tensor | None

    def block(self, samples: slice) -> "Places":
        """Return the part that belongs to some samples of the batch."""
        return Places(self.switches[samples], None if self.kept is None else self.kept[samples])


def unpool_overwriting(pooled: Tensor, switches: Tensor, pool: Pool, size: Size) -> Tensor:
    """Put each value back where its switch points; where windows overlap, the last one stays (``paper``).

    The unpooling of Zeiler & Fergus (2014) as Ernoult et al. (2022) use it. Not the transpose of pooling when windows
    overlap, since a unit that won two windows gets one of the two values only.

    torch's own ``max_unpool2d`` leaves it to the threads which window is the last; here it is the last in reading
    order, on every device.
    """
    return unpool(pooled, overwriting_places(switches, pool), pool, size)


def overwriting_places(switches: Tensor, pool: Pool) -> Places:
    """Places for `unpool` to overwrite rather than add."""
    return Places(switches, last_windows(switches, pool) if pool.overlaps else None)


def unpool(pooled: Tensor, places: Places, pool: Pool, size: Size) -> Tensor:
    """Put values back to their places in maps of a size; values that are not kept are dropped, the others add up."""
    return unpool_adding(pooled if places.kept is None else pooled * places.kept, places.switches, pool, size)


def last_windows(switches: Tensor, pool: Pool) -> Tensor:
    """Whether each window is the last, in reading order, of those that chose its position: bool, like ``switches``."""
    reach = (pool.kernel_size - 1) // pool.stride
    height, width = switches.shape[2:]
    neighbours = F.pad(switches, (reach, reach, 0, reach), value=-1)
    last = torch.ones_like(switches, dtype=torch.bool)
    for down in range(reach + 1):
        for right in range(-reach if down else 1, reach + 1):
            other = neighbours[:, :, down : down + height, reach + right : reach + right + width]
            last &= other != switches
    return last


def switch_taps(switches: Tensor, pool: Pool, size: Size) -> Tensor:
    """Place of each switch within its window, ``row * kernel_size + column``: integers, like ``switches``."""
    rows, columns = (torch.arange(count, device=switches.device) * pool.stride for count in switches.shape[2:])
    row = switches // size[1] - rows[:, None] + pool.padding
    column = switches % size[1] - columns + pool.padding
    return row * pool.kernel_size + column


def gather_windows(values: Tensor, taps: Tensor, pool: Pool, size: Size) -> Tensor:
    """`unpool_adding` without a scatter: every position sums over the windows it lies in, in a fixed order.

    Made of comparisons and sums alone, which a compiler fuses with what comes before and after.

    Args:
        values: of each window, ``[batch, channels, pooled height, pooled width]``.
        taps: place of each window's switch within it, by `switch_taps`; of any type that holds small integers.
        pool: the pooling.
        size: height and width of the map before pooling.
    """
    kernel, stride, reach = pool.kernel_size, pool.stride, (pool.kernel_size - 1 + pool.padding) // pool.stride + 1
    counts = [-(-side // stride) for side in size]
    margins = (reach, reach + counts[1] - values.shape[3], reach, reach + counts[0] - values.shape[2])
    if any(margins):
        values, taps = F.pad(values, margins), F.pad(taps, margins, value=-1)
    # positions are sorted by where they lie within a stride: all of one sort are in the same taps of their windows
    rows = []
    for row in range(stride):
        columns = []
        for column in range(stride):
            total: Tensor | None = None
            for down, tap_row in _windows_over(row, pool):
                for right, tap_column in _windows_over(column, pool):
                    top, left = reach + down, reach + right
                    window = (..., slice(top, top + counts[0]), slice(left, left + counts[1]))
                    hit = taps[window] == tap_row * kernel + tap_column
                    term = torch.where(hit, values[window], 0.0)
                    total = term if total is None else total + term
            if total is None:  # no window reads this position
                total = torch.zeros_like(values[..., : counts[0], : counts[1]])
            columns.append(total)
        rows.append(torch.stack(columns, dim=4))
    # [batch, channels, height / stride, stride, width / stride, stride]
    maps = torch.stack(rows, dim=3).flatten(4, 5).flatten(2, 3)
    return maps[..., : size[0], : size[1]]


def _windows_over(place: int, pool: Pool) -> list[tuple[int, int]]:
    """Which windows lie over a position ``stride * i + place``: their numbers less ``i``, and its tap in each."""
    kernel, stride, padding = pool
    offsets = range(-kernel - padding, kernel + padding + 1)
    taps = ((offset, place + padding - stride * offset) for offset in offsets)
    return [(offset, tap) for offset, tap in taps if 0 <= tap < kernel]
