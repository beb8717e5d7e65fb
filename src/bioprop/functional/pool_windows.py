"""The windows of a pooled convolution: which pixels they share, and how the noise of the image correlates in them.

A position in a window is a *place*, counted row by row; a position in the kernel is a *tap*. A stage without pooling
has windows of one place. All of it follows from the sizes alone, and separates into rows and columns.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.pooling import Pool

#: What a stage without pooling is pooled by.
NO_POOL = Pool(1, 1, 0)


class ConvGeometry(NamedTuple):
    """Sizes of a convolution and of the pooling behind it, in pixels; the same in both directions but for the image.

    A linear layer is the convolution of one pixel with a kernel of one tap: ``ConvGeometry((1, 1), 1)``.
    """

    input_size: tuple[int, int]
    kernel_size: int
    stride: int = 1
    padding: int = 0
    pool: Pool = NO_POOL

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width between convolution and pooling."""
        height, width = ((side + 2 * self.padding - self.kernel_size) // self.stride + 1 for side in self.input_size)
        return height, width

    @property
    def pooled_size(self) -> tuple[int, int]:
        """Height and width after pooling: the windows in each direction."""
        return self.pool.output_size(*self.map_size)

    @property
    def output_padding(self) -> list[int]:
        """Rows and columns at the far border of the image that the convolution never reads."""
        sides = zip(self.input_size, self.map_size, strict=True)
        return [side - ((out - 1) * self.stride - 2 * self.padding + self.kernel_size) for side, out in sides]


class WindowClasses(NamedTuple):
    """The windows of one direction, sorted by which of their taps fall on the image: few classes, many windows.

    Attributes:
        of_window: class of each window, ``[windows]``.
        members: 1 where a window belongs to a class, ``[classes, windows]``.
        shared: 1 where tap ``t`` at place ``j`` and tap ``u`` at place ``k`` meet the same pixel of the image,
            ``[classes, j, k, t, u]``.
    """

    of_window: Tensor
    members: Tensor
    shared: Tensor


@lru_cache(maxsize=256)
def window_classes(geometry: ConvGeometry, axis: int, dtype: torch.dtype, device: torch.device) -> WindowClasses:
    """Classes of the windows along rows (``axis`` 0) or columns (1)."""
    size, pool = geometry.input_size[axis], geometry.pool
    places = np.arange(geometry.pooled_size[axis])[:, None] * pool.stride - pool.padding + np.arange(pool.kernel_size)
    pixels = places[..., None] * geometry.stride - geometry.padding + np.arange(geometry.kernel_size)
    exists = (places >= 0) & (places < geometry.map_size[axis])
    seen = exists[..., None] & (pixels >= 0) & (pixels < size)  # [windows, places, taps]
    both = seen[:, :, None, :, None] & seen[:, None, :, None, :]
    shared = both & (pixels[:, :, None, :, None] == pixels[:, None, :, None, :])
    kinds, of_window = np.unique(shared.reshape(len(shared), -1), axis=0, return_inverse=True)
    members = np.arange(len(kinds))[:, None] == of_window.reshape(-1)
    return WindowClasses(
        torch.from_numpy(of_window.reshape(-1)).to(device),
        torch.from_numpy(members).to(device, dtype),
        torch.from_numpy(kinds.reshape(len(kinds), *shared.shape[1:])).to(device, dtype),
    )


@lru_cache(maxsize=256)
def _switch_values(geometry: ConvGeometry, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Switch that stands for each place of each window, -1 where pooling meets padding: ``[h, w, 1, places, 1]``."""
    pool, (height, width) = geometry.pool, geometry.map_size
    rows, columns = (
        np.arange(windows)[:, None] * pool.stride - pool.padding + np.arange(pool.kernel_size)
        for windows in geometry.pooled_size
    )
    row, column = rows[:, None, :, None], columns[None, :, None, :]
    exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    values = np.where(exists, row * width + column, -1)
    return torch.from_numpy(values.reshape(*geometry.pooled_size, 1, -1, 1)).to(device, dtype)


def choose_places(switches: Tensor, geometry: ConvGeometry, dtype: torch.dtype) -> Tensor:
    """1 at the place a switch points to, else 0: ``[batch, channels, h, w] -> [h, w, batch, places, channels]``."""
    values = _switch_values(geometry, dtype, switches.device)
    switches = switches.permute(2, 3, 0, 1).to(dtype).unsqueeze(3)
    return switches.expand(-1, -1, -1, values.shape[3], -1).contiguous().eq_(values)  # in place: floats, far faster


def by_class(values: Tensor, rows: WindowClasses, columns: WindowClasses) -> Tensor:
    """Sum ``[h, w, ...]`` over the windows of each class: ``[rows, columns, ...]``."""
    summed: Tensor = torch.tensordot(rows.members.to(values.dtype), values, ([1], [0]))
    summed = torch.tensordot(columns.members.to(values.dtype), summed, ([1], [1]))
    return summed.transpose(0, 1)


def of_windows(values: Tensor, rows: WindowClasses, columns: WindowClasses) -> Tensor:
    """Hand each window the value of its class: ``[rows, columns, ...] -> [h, w, ...]``."""
    return values[rows.of_window][:, columns.of_window]


def cut_windows(maps: Tensor, pool: Pool) -> Tensor:
    """Copy the windows out of ``maps``, ``[batch, channels, height, width] -> [h, w, batch, places, channels]``.

    Where pooling meets its padding there is -inf. The result never shares memory with ``maps``.
    """
    if pool.padding:
        maps = F.pad(maps, [pool.padding] * 4, value=-torch.inf)
    windows = maps.permute(0, 2, 3, 1)
    for axis in (1, 2):
        windows = windows.unfold(axis, pool.kernel_size, pool.stride)
    batch, height, width, channels = windows.shape[:4]
    windows = windows.permute(1, 2, 0, 4, 5, 3).clone(memory_format=torch.contiguous_format)
    return windows.view(height, width, batch, pool.kernel_size**2, channels)


def join_windows(values: Tensor, chosen: Tensor, geometry: ConvGeometry) -> Tensor:
    """Put the value of each window to its chosen place; overlapping windows add up.

    Args:
        values: ``[h, w, batch, 1, channels]``.
        chosen: 1 at one place of each window, else 0, ``[h, w, batch, places, channels]``.
        geometry: sizes.

    Returns:
        The maps before pooling, ``[batch, channels, height, width]``, channels last in memory.
    """
    (height, width), pool = geometry.map_size, geometry.pool
    h, w, batch, _, channels = chosen.shape
    reach = [
        max(side + pool.padding, (windows - 1) * pool.stride + pool.kernel_size)
        for side, windows in ((height, h), (width, w))
    ]
    maps = values.new_zeros(batch, *reach, channels)
    values = values.squeeze(3).permute(2, 0, 1, 3)
    for place, here in enumerate(chosen.unbind(3)):
        row, column = divmod(place, pool.kernel_size)
        rows = slice(row, row + (h - 1) * pool.stride + 1, pool.stride)
        columns = slice(column, column + (w - 1) * pool.stride + 1, pool.stride)
        maps[:, rows, columns].addcmul_(here.permute(2, 0, 1, 3), values)
    inner = maps[:, pool.padding : pool.padding + height, pool.padding : pool.padding + width]
    return inner.contiguous().permute(0, 3, 1, 2)
