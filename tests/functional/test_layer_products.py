"""The products of layers against torch's own layers and their derivatives."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bioprop.functional import layer_products
from bioprop.functional.layer_products import (
    ConvProducts,
    LayerProducts,
    LinearProducts,
    matrix_product,
)
from tests.geometries import conv_geometries, few

EXACT = {"rtol": 1e-12, "atol": 1e-12}
Size = tuple[int, int]


class Geometry:
    """A convolution's, with its products."""

    def __init__(self, given: dict[str, Any]) -> None:
        channels, *size = given["input_shape"]
        self.stride, self.padding, kernel = given["stride"], given["padding"], given["kernel_size"]
        self.weight = (given["out_channels"], channels, kernel, kernel)
        self.inputs = (5, channels, *size)
        out = [(side + 2 * self.padding - kernel) // self.stride + 1 for side in size]
        self.outputs = (5, given["out_channels"], *out)

    def products(self, reduced: bool = False) -> ConvProducts:
        unread = tuple((side + 2 * self.padding - self.weight[2]) % self.stride for side in self.inputs[2:])
        return ConvProducts(torch.Size(self.weight), self.stride, self.padding, unread, reduced)

    def draw(self, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.randn(shape, dtype=dtype) for shape in (self.weight, self.inputs, self.outputs))

    def expected(self, weight: Tensor, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``W x``, ``W^T d`` and the weight gradient, by autograd."""
        leaves = [each.clone().requires_grad_() for each in (inputs, weight)]
        product = F.conv2d(*leaves, None, self.stride, self.padding)
        back, gradient = torch.autograd.grad(product, leaves, outputs)
        return product.detach(), back, gradient


geometries = st.builds(Geometry, conv_geometries())
layouts = st.sampled_from([torch.contiguous_format, torch.channels_last])


def three_products(products: LayerProducts, weight: Tensor, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, ...]:
    prepared = products.prepare(weight)
    return (
        products.forward(inputs, prepared),
        products.backward(outputs, prepared),
        products.weight_gradient(inputs, outputs),
    )


@few(80)
@given(geometry=geometries, layout=layouts)
def test_convolutions_products_are_torchs(geometry: Geometry, layout: torch.memory_format) -> None:
    drawn = [each.to(memory_format=layout) for each in geometry.draw()]
    found = three_products(geometry.products(), *drawn)
    for ours, wanted in zip(found, geometry.expected(*drawn), strict=True):
        torch.testing.assert_close(ours, wanted, **EXACT)


@few(40)
@given(geometry=geometries)
def test_the_three_products_are_adjoint(geometry: Geometry) -> None:
    """``<d, W x> = <W^T d, x> = <W, wgrad(x, d)>``."""
    weight, inputs, outputs = geometry.draw()
    forward, back, gradient = three_products(geometry.products(), weight, inputs, outputs)
    value = (outputs * forward).sum()
    torch.testing.assert_close((back * inputs).sum(), value, **EXACT)
    torch.testing.assert_close((gradient * weight).sum(), value, **EXACT)


@few(20)
@given(rows=st.integers(1, 9), ins=st.integers(1, 9), outs=st.integers(1, 9))
def test_linear_products_are_torchs(rows: int, ins: int, outs: int) -> None:
    weight, inputs, outputs = (
        torch.randn(shape, dtype=torch.float64) for shape in ((outs, ins), (rows, ins), (rows, outs))
    )
    found = three_products(LinearProducts(), weight, inputs, outputs)
    expected = inputs @ weight.t(), outputs @ weight, outputs.t() @ inputs
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, **EXACT)


def test_linear_products_flatten_images() -> None:
    images = torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
    assert torch.equal(LinearProducts().shape_inputs(images), images.flatten(1))


def strided(rows: int, columns: int, how: str) -> Tensor:
    if how == "transposed":
        return torch.randn(columns, rows).t()
    if how == "every other column":
        return torch.randn(rows, 2 * columns)[:, ::2]
    if how == "part of rows":
        return torch.randn(rows, columns + 3)[:, 1 : columns + 1]
    return torch.randn(rows, columns)


ways = st.sampled_from(["plain", "transposed", "every other column", "part of rows"])
sides = st.sampled_from([1, 2, 3, 7, 17, 64, 129])


@few(80)
@given(rows=sides, inner=sides, columns=sides, first=ways, second=ways, onednn=st.booleans())
def test_matrix_product_is_torchs(rows: int, inner: int, columns: int, first: str, second: str, onednn: bool) -> None:
    inputs, matrix = strided(rows, inner, first), strided(columns, inner, second)
    with pytest.MonkeyPatch.context() as patch:
        if not onednn:
            patch.setattr(layer_products, "_ONEDNN", None)
        found = matrix_product(inputs, matrix)
    wanted = inputs.double() @ matrix.double().t()
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()
    assert found.dtype is torch.float32


@few(40)
@given(geometry=geometries)
def test_bfloat16_stays_within_its_accuracy_and_hands_out_float32(geometry: Geometry) -> None:
    drawn = geometry.draw(torch.float32)
    found = three_products(geometry.products(reduced=True), *drawn)
    assert found[2].dtype is torch.float32
    # eight bits of each factor, relative to the sum of the factors' magnitudes
    for ours, wanted, scale in zip(
        found, geometry.expected(*drawn), geometry.expected(*(each.abs() for each in drawn)), strict=True
    ):
        assert ((ours - wanted).abs() <= 2**-6 * scale + 1e-6).all()


def test_bfloat16_rounds() -> None:
    """The option is no other name of float32."""
    weight, inputs, outputs = torch.randn(8, 9), torch.randn(7, 9), torch.randn(7, 8)
    found = three_products(LinearProducts(reduced=True), weight, inputs, outputs)
    for ours, wanted in zip(found, three_products(LinearProducts(), weight, inputs, outputs), strict=True):
        assert 1e-4 < (ours - wanted).norm() / wanted.norm() < 1e-2
    assert found[2].dtype is torch.float32
