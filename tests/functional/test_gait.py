"""The arithmetic of GAIT-prop."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bioprop.functional.gait import gait_difference, inverse_difference, leaky_slope, orthogonality_gradient

SLOPE = 0.1


def inverse(outputs: Tensor) -> Tensor:
    """``f^{-1}`` of the leaky ReLU."""
    return torch.where(outputs > 0, outputs, outputs / SLOPE)


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def assert_is_the_inverses_difference(rule: Callable[..., Tensor], scale: float) -> None:
    outputs, step = draw(40, 50), draw(40, 50)
    across = (outputs + scale * step > 0) != (outputs > 0)
    assert 0.001 < across.double().mean() < 0.5  # both cases occur
    expected = (inverse(outputs + scale * step) - inverse(outputs)) / scale
    torch.testing.assert_close(rule(outputs, step, scale, SLOPE), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.01])
def test_the_inverses_difference_is_exact_across_the_kink_too(scale: float) -> None:
    assert_is_the_inverses_difference(inverse_difference, scale)


def test_mutated_differences_of_the_inverse_are_noticed() -> None:
    blind: Callable[..., Tensor] = lambda y, d, scale, slope: d / leaky_slope(y, slope)  # noqa: E731
    sloped: Callable[..., Tensor] = lambda y, d, scale, slope: d * leaky_slope(y, slope)  # noqa: E731
    for mutated in (blind, sloped):
        with pytest.raises(AssertionError):
            assert_is_the_inverses_difference(mutated, 0.1)


@pytest.mark.parametrize("scale", [1e-9, 1e-30, 1e-60])
def test_no_scale_is_too_small_for_float32(scale: float) -> None:
    """1e-60 is zero there: what is left is the slope alone."""
    outputs, step = draw(20, 30, dtype=torch.float32), draw(20, 30, dtype=torch.float32)
    torch.testing.assert_close(inverse_difference(outputs, step, scale, SLOPE), step / leaky_slope(outputs, SLOPE))


def test_a_stage_hands_down_the_papers_target() -> None:
    """``t_{l-1} = inv_l((1 - gamma f'^2) y_l + gamma f'^2 t_l)``, literally, two stages below the output."""
    weight, bias, below, gamma = draw(7, 7), draw(7), draw(5, 7), 0.05
    affine = below @ weight.T + bias
    outputs = torch.where(affine > 0, affine, SLOPE * affine)
    difference = draw(5, 7)
    slope = SLOPE + (1 - SLOPE) * (affine > 0).double()
    target = outputs + gamma**2 * difference
    step = (1 - gamma * slope**2) * outputs + gamma * slope**2 * target
    target_below = (inverse(step) - bias) @ torch.linalg.inv(weight).T
    found = gait_difference(outputs, weight, difference, gamma, stages_above=2, negative_slope=SLOPE)
    torch.testing.assert_close(found, (target_below - below) / gamma**3, rtol=1e-6, atol=1e-8)


def assert_is_the_regularisers_gradient(rule: Callable[[Tensor], Tensor]) -> None:
    """``sum ((W W^T) o (1 - I))^2``, by autograd."""
    weight = draw(6, 6).requires_grad_()
    penalty = sum((weight[i] @ weight[j]) ** 2 for i in range(6) for j in range(6) if i != j)
    (expected,) = torch.autograd.grad(penalty, weight)
    torch.testing.assert_close(rule(weight.detach()), expected)


def test_the_regularisers_gradient_is_autograds() -> None:
    assert_is_the_regularisers_gradient(orthogonality_gradient)
    for mutated in (lambda w: -orthogonality_gradient(w), lambda w: 4 * w @ w.T @ w, lambda w: w * 0):
        with pytest.raises(AssertionError):
            assert_is_the_regularisers_gradient(mutated)


def test_the_programs_form_is_that_of_the_columns() -> None:
    """``sum ((W^T W) o (1 - I))^2``, by autograd."""
    weight = draw(6, 6).requires_grad_()
    off = (weight.T @ weight) * (1 - torch.eye(6, dtype=torch.float64))
    (expected,) = torch.autograd.grad(off.square().sum(), weight)
    torch.testing.assert_close(orthogonality_gradient(weight.detach(), "columns"), expected)
    assert (orthogonality_gradient(weight.detach()) - expected).norm() > 0.1 * expected.norm()


def test_orthogonal_rows_of_any_length_are_left_alone() -> None:
    weight = torch.linalg.qr(draw(6, 6)).Q * torch.arange(1.0, 7.0, dtype=torch.float64)[:, None]
    assert orthogonality_gradient(weight).abs().max() < 1e-12
