"""Max-pooling of maps whose innermost dimension is the batch: ``[channels, height, width, batch]``.

Made of slices, comparisons and sums alone, of long vectors: what a compiler makes one pass of. A switch is
the number of the place within its window, from 0 in reading order, as a floating-point number, which compiled code
reads faster than an integer or a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.pooling import Pool


def pool_batch_last(maps: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
    """Pool, and return (pooled maps, switches). The first of equal maxima in reading order is chosen."""
    rows, columns = pool.output_size(*maps.shape[1:3])
    if pool.padding:
        maps = F.pad(maps, (0, 0, *[pool.padding] * 4), value=-torch.inf)
    places = [
        maps[:, _every(row, rows, pool.stride), _every(column, columns, pool.stride)]
        for row in range(pool.kernel_size)
        for column in range(pool.kernel_size)
    ]
    largest, switches = places[0], torch.zeros_like(places[0])
    for number, values in enumerate(places[1:], start=1):
        switches = torch.where(values > largest, float(number), switches)
        largest = torch.maximum(largest, values)
    return largest, switches


def unpool_batch_last(pooled: Tensor, switches: Tensor, pool: Pool, size: tuple[int, int], overwrite: bool) -> Tensor:
    """Put values back where their switches point.

    Args:
        pooled: ``[channels, rows, columns, batch]``.
        switches: by `pool_batch_last`.
        pool: its geometry.
        size: height and width of the map before pooling.
        overwrite: where windows overlap, keep the value of the last in reading order, instead of adding all.

    Returns:
        ``[channels, height, width, batch]``, zero where nothing was chosen.
    """
    stride = pool.stride
    reach = [-(-(side + pool.padding) // stride) for side in size]  # rows and columns of whole strides that cover it
    # a place of a window lies `place // stride` strides on from where the window begins
    most = (pool.kernel_size - 1) // stride
    margins = [max(0, whole - count) for whole, count in zip(reach, pooled.shape[1:3], strict=True)]
    border = (0, 0, most, margins[1], most, margins[0])
    values, chosen = F.pad(pooled, border), F.pad(switches, border, value=-1.0)

    def shifted(padded: Tensor, down: int, right: int) -> Tensor:
        row, column = most - down, most - right
        return padded[:, row : row + reach[0], column : column + reach[1]]

    def position(up: int, left: int) -> Tensor:
        """What lies at one place of every stride, out of the windows over it in reading order."""
        total = torch.zeros_like(shifted(values, 0, 0))
        for row in reversed(range(up, pool.kernel_size, stride)):  # the window above has the later place here
            for column in reversed(range(left, pool.kernel_size, stride)):
                moves = row // stride, column // stride
                hit = shifted(chosen, *moves) == float(row * pool.kernel_size + column)
                value = shifted(values, *moves)
                total = torch.where(hit, value, total) if overwrite else total + torch.where(hit, value, 0.0)
        return total

    strides = torch.stack([torch.stack([position(i, j) for j in range(stride)], 3) for i in range(stride)], 2)
    whole = strides.flatten(3, 4).flatten(1, 2)
    inner = [slice(pool.padding, pool.padding + side) for side in size]
    return whole[:, inner[0], inner[1]]


def _every(start: int, count: int, stride: int) -> slice:
    return slice(start, start + stride * (count - 1) + 1, stride)
