"""Moments under noise against integrals taken on a dense grid, with activations written once more."""

import math

import pytest
import torch
from torch import Tensor

from bioprop.errors import UserError
from bioprop.functional.gaussian_moments import feature_moments, mean_slope, through_slope
from tests.functional.plain_ldrl import PLAIN

# inside the ranges of the activations, at their kinks, close to them and where noise alone leads
POINTS = torch.tensor([-1.3, -1.0, -0.99, -0.7, -0.3, -0.01, 0.0, 0.02, 0.3, 0.99, 1.0, 1.5, 30.0], dtype=torch.float64)
NODES = torch.linspace(-9.0, 9.0, 60_001, dtype=torch.float64)
WEIGHTS = torch.softmax(-(NODES**2) / 2, 0)
every_activation = pytest.mark.parametrize(("activation", "form"), PLAIN)
every_size = pytest.mark.parametrize("sigma", [0.08, 0.4, 1.0])


def integrated_moments(activation: str, form: str, sigma: float) -> tuple[Tensor, Tensor]:
    phi = PLAIN[activation, form][1]
    change = phi(POINTS[:, None] + sigma * NODES) - phi(POINTS)[:, None]
    mean = change @ WEIGHTS
    return mean, (change - mean[:, None]).square() @ WEIGHTS


@every_activation
@every_size
def test_moments_of_a_feature(activation: str, form: str, sigma: float) -> None:
    found = feature_moments(activation, form, POINTS, sigma)
    mean, variance = integrated_moments(activation, form, sigma)
    torch.testing.assert_close(found.mean, mean, rtol=0, atol=1e-7 * sigma)
    torch.testing.assert_close(found.variance, variance, rtol=0, atol=1e-7 * sigma**2)


@every_activation
def test_moments_hold_in_single_precision(activation: str, form: str) -> None:
    """Where ``phi`` is a line, nothing large cancels: 30 is 375 times the noise."""
    sigma, inside = 0.08, POINTS >= -1.0
    found = feature_moments(activation, form, POINTS.float(), sigma)
    mean, variance = integrated_moments(activation, form, sigma)
    torch.testing.assert_close(found.mean.double()[inside], mean[inside], rtol=0, atol=3e-5 * sigma)
    torch.testing.assert_close(found.variance.double()[inside], variance[inside], rtol=0, atol=3e-4 * sigma**2)
    assert found.variance.min() >= 0


@every_activation
@every_size
def test_mean_slope_by_steins_lemma(activation: str, form: str, sigma: float) -> None:
    """``E[f'(c + s z)] = E[z f(c + s z)] / s``, which needs no derivative."""
    rho, phi = PLAIN[activation, form]
    f = phi(rho(POINTS[:, None] + sigma * NODES))
    expected = ((f - f[:, :1]) * NODES) @ WEIGHTS / sigma
    found = mean_slope(activation, form, POINTS, torch.tensor(sigma, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 if (activation, sigma) == ("tanh", 1.0) else 2e-7)


@every_activation
def test_slope_through_both_activations(activation: str, form: str) -> None:
    (rho, phi), step, smooth = PLAIN[activation, form], 1e-6, POINTS[POINTS != 0.0]
    expected = (phi(rho(smooth + step)) - phi(rho(smooth - step))) / (2 * step)
    torch.testing.assert_close(through_slope(activation, form, smooth), expected, rtol=1e-6, atol=1e-8)


@every_activation
def test_mean_slope_far_from_the_kink_and_under_large_noise(activation: str, form: str) -> None:
    """No overflow in single precision: slopes stay within [0, 1], and are those without noise where noise is small."""
    c, std = torch.tensor([-200.0, -20.0, 20.0, 200.0]), torch.tensor([[1e-20], [0.1], [12.0]])
    slopes = mean_slope(activation, form, c.expand(3, 4), std)
    assert slopes.min() >= 0
    assert slopes.max() <= 1 + 1e-5
    torch.testing.assert_close(slopes[:2], through_slope(activation, form, c).expand(2, 4), rtol=1e-4, atol=1e-7)


def test_mean_slope_takes_a_size_for_each_unit() -> None:
    c, std = torch.zeros(5, 2, dtype=torch.float64), torch.tensor([0.1, 1.0], dtype=torch.float64)
    expected = [0.5 + math.exp(2 * s**2) * 0.5 * math.erfc(2 * s / math.sqrt(2)) for s in (0.1, 1.0)]
    found = mean_slope("elu", "exact", c, std)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).expand(5, 2))


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(UserError, match="'swish' is not known"):
        feature_moments("swish", "exact", POINTS, 0.1)
