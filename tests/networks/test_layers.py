"""The products of layers against torch's own layers and their derivatives."""

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bioprop.functional.precision import bfloat16_products
from bioprop.networks.layers import ConvLayer, LinearLayer
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

    def layer(self) -> ConvLayer:
        channels, inputs, kernel, _ = self.weight
        return ConvLayer(inputs, channels, kernel, self.stride, self.padding)

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


def three_products(
    layer: ConvLayer | LinearLayer, weight: Tensor, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, ...]:
    return (
        layer.product(inputs, weight),
        layer.transposed_product(outputs, weight, inputs.shape[2:]),
        layer.weight_gradient(inputs, outputs),
    )


@few(80)
@given(geometry=geometries, layout=layouts)
def test_convolutions_products_are_torchs(geometry: Geometry, layout: torch.memory_format) -> None:
    drawn = [each.to(memory_format=layout) for each in geometry.draw()]
    found = three_products(geometry.layer(), *drawn)
    for ours, wanted in zip(found, geometry.expected(*drawn), strict=True):
        torch.testing.assert_close(ours, wanted, **EXACT)


@few(40)
@given(geometry=geometries)
def test_the_three_products_are_adjoint(geometry: Geometry) -> None:
    """``<d, W x> = <W^T d, x> = <W, wgrad(x, d)>``."""
    weight, inputs, outputs = geometry.draw()
    forward, back, gradient = three_products(geometry.layer(), weight, inputs, outputs)
    value = (outputs * forward).sum()
    torch.testing.assert_close((back * inputs).sum(), value, **EXACT)
    torch.testing.assert_close((gradient * weight).sum(), value, **EXACT)


@few(20)
@given(rows=st.integers(1, 9), ins=st.integers(1, 9), outs=st.integers(1, 9))
def test_linear_products_are_torchs(rows: int, ins: int, outs: int) -> None:
    weight, inputs, outputs = (
        torch.randn(shape, dtype=torch.float64) for shape in ((outs, ins), (rows, ins), (rows, outs))
    )
    found = three_products(LinearLayer(ins, outs), weight, inputs, outputs)
    expected = inputs @ weight.t(), outputs @ weight, outputs.t() @ inputs
    for ours, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, wanted, **EXACT)


def test_linear_products_flatten_images() -> None:
    images = torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
    layer, outputs = LinearLayer(30, 6), torch.randn(4, 6)
    assert torch.equal(layer.product(images, layer.weight), layer.product(images.flatten(1), layer.weight))
    assert torch.equal(layer.weight_gradient(images, outputs), layer.weight_gradient(images.flatten(1), outputs))


@few(40)
@given(geometry=geometries)
def test_bfloat16_stays_within_its_accuracy_and_hands_out_float32(geometry: Geometry) -> None:
    drawn = geometry.draw(torch.float32)
    with bfloat16_products():
        found = three_products(geometry.layer(), *drawn)
    assert {each.dtype for each in found} == {torch.float32}
    # eight bits of each factor, relative to the sum of the factors' magnitudes
    for ours, wanted, scale in zip(
        found, geometry.expected(*drawn), geometry.expected(*(each.abs() for each in drawn)), strict=True
    ):
        assert ((ours - wanted).abs() <= 2**-6 * scale + 1e-6).all()


def test_bfloat16_rounds() -> None:
    """The option is no other name of float32."""
    weight, inputs, outputs = torch.randn(8, 9), torch.randn(7, 9), torch.randn(7, 8)
    with bfloat16_products():
        found = three_products(LinearLayer(9, 8), weight, inputs, outputs)
    for ours, wanted in zip(found, three_products(LinearLayer(9, 8), weight, inputs, outputs), strict=True):
        assert 1e-4 < (ours - wanted).norm() / wanted.norm() < 1e-2
    assert found[2].dtype is torch.float32
