"""Direct feedback: shapes, equations, drawing, and differences that keep their digits."""

import pytest
import torch
from torch import Tensor

from bioprop.networks.direct_feedback import RandomHiddenLayer, ReadOut


def double_normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_read_out_is_its_equation() -> None:
    read_out = ReadOut(5, (2, 3, 4), "tanh", bias=True).double()
    torch.nn.init.normal_(read_out.bias)
    z, d = double_normal(6, 5), double_normal(6, 5)
    expected = torch.tanh(z @ read_out.weight.t() + read_out.bias)
    torch.testing.assert_close(read_out(z), expected.view(6, 2, 3, 4))
    torch.testing.assert_close(read_out.difference(z, d), read_out(z + d) - read_out(z))


def test_a_linear_read_out_keeps_the_digits_of_a_small_step() -> None:
    """In float32, subtracting two mapped values would keep half of them."""
    read_out, step = ReadOut(5, (7,), bias=True), 1e-5 * torch.randn(6, 5)
    exact = step.double() @ read_out.weight.double().t()
    found = read_out.difference(torch.randn(6, 5), step).double()
    assert (found - exact).norm() < 1e-6 * exact.norm()


def test_weights_are_drawn_by_xaviers_rule_and_biases_are_zero() -> None:
    read_out = ReadOut(300, (20, 5, 5), "tanh", bias=True)
    assert read_out.weight.shape == (500, 300)
    assert float(read_out.weight.detach().std()) == pytest.approx((2 / 800) ** 0.5, rel=0.02)
    assert read_out.bias.abs().max() == 0
    assert ReadOut(3, (4,)).bias is None


def test_the_random_hidden_layer_is_fixed_and_keeps_the_digits_of_a_small_step() -> None:
    hidden = RandomHiddenLayer(5, 1000)
    assert not any(parameter.requires_grad for parameter in hidden.parameters())
    assert float(hidden.linear.weight.abs().max()) == pytest.approx(5**-0.5, rel=0.01)
    z, d = torch.randn(6, 5), 1e-5 * torch.randn(6, 5)
    found = hidden.difference(z, d).double()
    hidden.double()
    exact = hidden(z.double() + d.double()) - hidden(z.double())
    assert (found - exact).norm() < 1e-6 * exact.norm()
    torch.testing.assert_close(hidden(z.double()), torch.tanh(hidden.linear(z.double())))
