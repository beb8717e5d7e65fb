"""Convolutions by tiles against torch's own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.grad import conv2d_weight

from bioprop.functional.winograd import (
    MOST_TAPS,
    OUTPUTS,
    input_tiles,
    join_kernels,
    join_tiles,
    kernel_tiles,
    output_tiles,
    padded_side,
    retile,
    tile_correlations,
    tile_products,
    winograd,
)
from tests.geometries import few

#: As a share of the norm: single elements may be small differences of large ones.
TOLERANCE = 1e-12


@st.composite
def convolutions(draw: st.DrawFn) -> dict[str, Any]:
    """Images, weight and padding of a convolution of stride 1."""
    taps = draw(st.integers(1, MOST_TAPS))
    padding = draw(st.integers(0, taps))
    height, width = (draw(st.integers(max(1, taps - 2 * padding), 11)) for _ in range(2))
    batch, in_, out = (draw(st.integers(1, 4)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    images = torch.randn(batch, in_, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(out, in_, taps, taps, generator=generator, dtype=torch.float64)
    return {"images": images, "weight": weight, "padding": padding}


def batch_last(images: Tensor) -> Tensor:
    return images.permute(1, 2, 3, 0)


def assert_same(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= TOLERANCE * wanted.norm()


def tiles_of(images: Tensor, taps: int, padding: int, size: tuple[int, int]) -> list[Tensor]:
    """Tiles of padded images for a convolution that computes maps of a size."""
    rows, columns = (
        padded_side(outputs, taps) - side - padding for outputs, side in zip(size, images.shape[2:], strict=True)
    )
    return input_tiles(F.pad(batch_last(images), (0, 0, padding, columns, padding, rows)), winograd(taps))


@few(60)
@given(convolutions())
def test_tiles_convolve_as_torch_does(case: dict[str, Any]) -> None:
    images, weight, padding = case["images"], case["weight"], case["padding"]
    expected = F.conv2d(images, weight, padding=padding)
    tiling, size = winograd(weight.shape[-1]), (expected.shape[2], expected.shape[3])
    tiles = tiles_of(images, tiling.taps, padding, size)
    products = tile_products(kernel_tiles(weight, tiling), tiles)
    assert_same(join_tiles(products, size, tiling), batch_last(expected))
    # what an error needs to become a weight gradient, without the map between
    retiled = output_tiles(batch_last(expected), tiling)
    assert_same(torch.stack(retile(products, size, tiling)), torch.stack(retiled))


@few(60)
@given(convolutions())
def test_tiles_give_the_weight_gradient(case: dict[str, Any]) -> None:
    images, weight, padding = case["images"], case["weight"], case["padding"]
    error = torch.randn_like(F.conv2d(images, weight, padding=padding))
    tiling = winograd(weight.shape[-1])
    tiles = tiles_of(images, tiling.taps, padding, (error.shape[2], error.shape[3]))
    found = join_kernels(tile_correlations(output_tiles(batch_last(error), tiling), tiles), tiling)
    expected = conv2d_weight(images, list(weight.shape), error, padding=padding)
    assert_same(found, expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("taps", "error"), [(3, 2e-6), (5, 6e-6)])
def test_float32_rounds_little_more_than_a_convolution(taps: int, error: float) -> None:
    images, weight = torch.randn(8, 64, 16, 16), torch.randn(64, 64, taps, taps)
    exact = F.conv2d(images.double(), weight.double(), padding=taps // 2)
    tiling = winograd(taps)
    tiles = tiles_of(images, taps, taps // 2, (16, 16))
    found = join_tiles(tile_products(kernel_tiles(weight, tiling), tiles), (16, 16), tiling)
    assert (found - batch_last(exact)).norm() < error * exact.norm()


def test_the_arithmetic_is_what_the_method_is_known_for() -> None:
    assert winograd(3).side ** 2 == 36
    assert OUTPUTS**2 * 3**2 == 144
    assert winograd(5).side ** 2 == 64


def test_there_are_no_tiles_for_larger_kernels() -> None:
    with pytest.raises(ValueError, match=f"no tiles for a kernel of {MOST_TAPS + 1} taps, {MOST_TAPS} at most"):
        winograd(MOST_TAPS + 1)
