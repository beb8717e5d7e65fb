"""The one definition of an angle."""

import math

import pytest
import torch

from bioprop.functional.angles import angle_degrees, flatten_all, norm_ratio


@pytest.mark.parametrize(
    ("first", "second", "degrees"),
    [
        ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 0.0),
        ([1.0, 0.0], [0.0, 5.0], 90.0),
        ([1.0, 2.0], [-3.0, -6.0], 180.0),
        ([1.0, 0.0], [1.0, 1.0], 45.0),
        ([1.0, 0.0], [-1.0, math.sqrt(3.0)], 120.0),
    ],
)
def test_known_angles(first: list[float], second: list[float], degrees: float) -> None:
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (first, second))
    assert angle_degrees(a, b).item() == pytest.approx(degrees, abs=1e-6)


@pytest.mark.parametrize("degrees", [1e-7, 1e-5, 1e-3, 1.0, 180.0 - 1e-5])
def test_tiny_angles_keep_their_digits(degrees: float) -> None:
    turned = math.radians(degrees)
    a = torch.tensor([1.0, 0.0], dtype=torch.float64)
    b = torch.tensor([math.cos(turned), math.sin(turned)], dtype=torch.float64)
    assert angle_degrees(a, b).item() == pytest.approx(degrees, abs=1e-9)


def test_the_angle_does_not_depend_on_scale_shape_or_order() -> None:
    a, b = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    expected = angle_degrees(a, b).item()
    assert angle_degrees(1e-20 * a.double(), 1e20 * b.double()).item() == pytest.approx(expected, rel=1e-12)
    assert angle_degrees(a.flatten(), b.view(2, 12)).item() == pytest.approx(expected, rel=1e-12)
    assert angle_degrees(b, a).item() == pytest.approx(expected, rel=1e-12)
    assert angle_degrees(-a, b).item() == pytest.approx(180.0 - expected, rel=1e-12)


def test_the_angle_is_a_float64_scalar_without_gradient() -> None:
    angle = angle_degrees(torch.randn(3, requires_grad=True), torch.randn(3))
    assert (angle.dtype, angle.shape, angle.requires_grad) == (torch.float64, (), False)


def test_a_zero_tensor_has_no_angle() -> None:
    assert angle_degrees(torch.zeros(3), torch.ones(3)).isnan()


def test_norm_ratio() -> None:
    assert norm_ratio(torch.tensor([[3.0, 4.0]]), torch.tensor([0.0, 2.0])).item() == pytest.approx(2.5, rel=1e-12)


def test_flatten_all_keeps_order_and_promotes() -> None:
    flat = flatten_all([torch.tensor([[1.0, 2.0]]), torch.tensor(3.0)])
    assert flat.tolist() == [1.0, 2.0, 3.0]
    assert flat.dtype == torch.float64
