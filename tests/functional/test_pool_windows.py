"""Windows and their classes against loops over all positions."""

from itertools import product

import pytest
import torch

from bioprop.functional.pool_windows import (
    ConvGeometry,
    by_class,
    choose_places,
    cut_windows,
    join_windows,
    of_windows,
    window_classes,
)
from bioprop.functional.pooling import Pool, max_pool, unpool_adding

GEOMETRIES = [
    ConvGeometry((8, 6), 3, 1, 1, Pool(2, 2)),
    ConvGeometry((2, 3), 3, 1, 1, Pool(2, 2)),
    ConvGeometry((7, 9), 5, 1, 2, Pool(3, 2, 1)),
    ConvGeometry((9, 8), 3, 2, 2, Pool(2, 2, 1)),
    ConvGeometry((7, 8), 2, 1, 0, Pool(2, 3)),
    ConvGeometry((6, 5), 3, 2, 1),
    ConvGeometry((1, 1), 1),
]
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
CPU = torch.device("cpu")


@every_geometry
def test_sizes_are_those_of_the_layers(geometry: ConvGeometry) -> None:
    images = torch.randn(1, 1, *geometry.input_size)
    kernel = torch.randn(1, 1, geometry.kernel_size, geometry.kernel_size)
    maps = torch.nn.functional.conv2d(images, kernel, None, geometry.stride, geometry.padding)
    assert maps.shape[2:] == geometry.map_size
    assert max_pool(maps, geometry.pool)[0].shape[2:] == geometry.pooled_size
    padding = geometry.stride, geometry.padding, geometry.output_padding
    assert torch.nn.functional.conv_transpose2d(maps, kernel, None, *padding).shape == images.shape


@every_geometry
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_windows_hold_what_pooling_sees(geometry: ConvGeometry, memory_format: torch.memory_format) -> None:
    maps = torch.randn(3, 4, *geometry.map_size).to(memory_format=memory_format)
    before = maps.clone()
    windows = cut_windows(maps, geometry.pool)
    pooled, switches = max_pool(maps, geometry.pool)
    torch.testing.assert_close(windows.amax(3).permute(2, 3, 0, 1), pooled, rtol=0, atol=0)
    assert windows.is_contiguous()
    windows.zero_()
    assert torch.equal(maps, before)  # a copy, also where one window is all there is

    chosen = choose_places(switches, geometry, maps.dtype)
    assert torch.equal(chosen.sum(3), torch.ones_like(chosen[:, :, :, 0]))
    joined = join_windows(pooled.permute(2, 3, 0, 1).unsqueeze(3), chosen, geometry)
    torch.testing.assert_close(joined, unpool_adding(pooled, switches, geometry.pool, geometry.map_size))
    assert joined.is_contiguous(memory_format=torch.channels_last)


@every_geometry
@pytest.mark.parametrize("axis", [0, 1])
def test_shared_pixels(geometry: ConvGeometry, axis: int) -> None:
    size, maps, pool = geometry.input_size[axis], geometry.map_size[axis], geometry.pool
    classes = window_classes(geometry, axis, torch.float64, CPU)
    assert len(classes.of_window) == geometry.pooled_size[axis]
    places, taps = range(pool.kernel_size), range(geometry.kernel_size)
    for window, j, k, t, u in product(range(geometry.pooled_size[axis]), places, places, taps, taps):
        at_j, at_k = (window * pool.stride - pool.padding + place for place in (j, k))
        pixel = at_j * geometry.stride - geometry.padding + t
        meets = pixel == at_k * geometry.stride - geometry.padding + u
        expected = meets and 0 <= at_j < maps and 0 <= at_k < maps and 0 <= pixel < size
        assert classes.shared[classes.of_window[window], j, k, t, u] == float(expected)


def test_most_windows_are_of_one_class() -> None:
    """Kernel 3 on 16 pixels, pooled by 2: the first window, the last, and 6 in between."""
    classes = window_classes(GEOMETRIES[0]._replace(input_size=(16, 16)), 0, torch.float64, CPU)
    assert sorted(classes.members.sum(1).tolist()) == [1, 1, 6]


def test_sums_by_class_and_back() -> None:
    rows, columns = (window_classes(GEOMETRIES[0], axis, torch.float64, CPU) for axis in (0, 1))
    values = torch.randn(4, 3, 5, dtype=torch.float64)
    summed = by_class(values, rows, columns)
    expected = torch.zeros_like(summed)
    for h, w in product(range(4), range(3)):
        expected[rows.of_window[h], columns.of_window[w]] += values[h, w]
    torch.testing.assert_close(summed, expected)
    spread = of_windows(summed, rows, columns)
    assert all(
        torch.equal(spread[h, w], summed[rows.of_window[h], columns.of_window[w]])
        for h, w in product(range(4), range(3))
    )
