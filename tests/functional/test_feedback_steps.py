"""The normalized step of feedback weights."""

import pytest
import torch

from bioprop.functional.feedback_losses import FeedbackGradient
from bioprop.functional.feedback_steps import normalized_step, normalized_steps


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 5, 5)], ids=["linear", "conv"])
def test_each_units_weights_step_by_their_own_curvature(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    gradient, curvature = torch.randn_like(weight), torch.tensor([0.0, 1.0, 8.0], dtype=torch.float64)
    expected = torch.stack([weight[unit] - 0.25 * gradient[unit] / (curvature[unit] + 0.03 * 3.0) for unit in range(3)])
    normalized_step(weight, FeedbackGradient({"weight": gradient}, torch.tensor(0.0), curvature), eta=0.25)
    torch.testing.assert_close(weight, expected, rtol=1e-13, atol=0)


def test_a_full_step_on_a_quadratic_lands_near_its_minimum() -> None:
    """The loss ``sum_o D_o |V_o - W_o|^2 / 2``: one Newton step is exact but for the floor's 3 percent."""
    target, curvature = torch.randn(4, 6, dtype=torch.float64), torch.full((4,), 5.0, dtype=torch.float64)
    weight = torch.zeros_like(target)
    gradient = curvature[:, None] * (weight - target)
    normalized_step(weight, FeedbackGradient({"weight": gradient}, torch.tensor(0.0), curvature), eta=1.0)
    torch.testing.assert_close(weight, target / 1.03, rtol=1e-12, atol=0)


def test_a_parameter_is_stepped_in_place() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    normalized_step(
        parameter, FeedbackGradient({"weight": torch.ones(2, 2)}, torch.tensor(0.0), torch.ones(2)), eta=0.5
    )
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), 1 - 0.5 / 1.03))
    assert parameter.requires_grad
    assert parameter.grad is None


def test_a_loss_without_curvature_is_refused() -> None:
    with pytest.raises(ValueError, match="curvature"):
        normalized_step(torch.ones(2, 2), FeedbackGradient({"weight": torch.ones(2, 2)}, torch.tensor(0.0), None), 0.1)


def test_each_of_several_weights_steps_by_its_own_curvature() -> None:
    weights = {"first": torch.randn(3, 4), "second": torch.randn(2, 3, 1, 1), "bias": torch.randn(3)}
    gradients = {name: torch.randn_like(weights[name]) for name in ("first", "second")}
    curvatures = {"first": torch.tensor([1.0, 2.0, 3.0]), "second": torch.tensor([4.0, 5.0])}
    expected = {name: weight.clone() for name, weight in weights.items()}
    for name, curvature in curvatures.items():
        normalized_step(
            expected[name], FeedbackGradient({"weight": gradients[name]}, torch.tensor(0.0), curvature), eta=0.3
        )
    normalized_steps(weights, FeedbackGradient(gradients, torch.tensor(0.0), curvatures), eta=0.3)
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_a_single_weight_steps_as_alone() -> None:
    weight, gradient = (
        torch.ones(2, 2),
        FeedbackGradient({"weight": torch.ones(2, 2)}, torch.tensor(0.0), torch.ones(2)),
    )
    normalized_steps({"weight": weight, "bias": torch.ones(2)}, gradient, eta=0.5)
    torch.testing.assert_close(weight, torch.full((2, 2), 1 - 0.5 / 1.03))
