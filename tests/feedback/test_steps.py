"""Steps of feedback weights, and means of their gradients."""

import pytest
import torch

from bioprop.feedback.losses import FeedbackGradient
from bioprop.feedback.training import mean_gradient, normalized_step


def step(weight: torch.Tensor, gradient: torch.Tensor, curvature: torch.Tensor, eta: float) -> None:
    found = FeedbackGradient({"weight": gradient}, torch.tensor(0.0), {"weight": curvature})
    normalized_step({"weight": weight}, found, eta)


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 5, 5)], ids=["linear", "conv"])
def test_each_units_weights_step_by_their_own_curvature(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    gradient, curvature = torch.randn_like(weight), torch.tensor([0.0, 1.0, 8.0], dtype=torch.float64)
    expected = torch.stack([weight[unit] - 0.25 * gradient[unit] / (curvature[unit] + 0.03 * 3.0) for unit in range(3)])
    step(weight, gradient, curvature, eta=0.25)
    torch.testing.assert_close(weight, expected, rtol=1e-13, atol=0)


def test_a_full_step_on_a_quadratic_lands_near_its_minimum() -> None:
    """The loss ``sum_o D_o |V_o - W_o|^2 / 2``: one Newton step is exact but for the floor's 3 percent."""
    target, curvature = torch.randn(4, 6, dtype=torch.float64), torch.full((4,), 5.0, dtype=torch.float64)
    weight = torch.zeros_like(target)
    gradient = curvature[:, None] * (weight - target)
    step(weight, gradient, curvature, eta=1.0)
    torch.testing.assert_close(weight, target / 1.03, rtol=1e-12, atol=0)


def test_a_parameter_is_stepped_in_place() -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    step(parameter, torch.ones(2, 2), torch.ones(2), eta=0.5)
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), 1 - 0.5 / 1.03))
    assert parameter.requires_grad
    assert parameter.grad is None


def test_a_loss_without_curvature_is_refused() -> None:
    with pytest.raises(ValueError, match="curvature"):
        normalized_step(
            {"weight": torch.ones(2)}, FeedbackGradient({"weight": torch.ones(2)}, torch.tensor(0.0), None), 0.1
        )


def test_each_of_several_weights_steps_by_its_own_curvature() -> None:
    weights = {"first": torch.randn(3, 4), "second": torch.randn(2, 3, 1, 1), "bias": torch.randn(3)}
    gradients = {name: torch.randn_like(weights[name]) for name in ("first", "second")}
    curvatures = {"first": torch.tensor([1.0, 2.0, 3.0]), "second": torch.tensor([4.0, 5.0])}
    expected = {name: weight.clone() for name, weight in weights.items()}
    for name, curvature in curvatures.items():
        step(expected[name], gradients[name], curvature, eta=0.3)
    normalized_step(weights, FeedbackGradient(gradients, torch.tensor(0.0), curvatures), eta=0.3)
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


@pytest.mark.parametrize("curved", [True, False], ids=["with curvature", "without"])
def test_gradients_are_averaged_over_draws(curved: bool) -> None:
    def gradient_at(draw: int) -> FeedbackGradient:
        asked.append(draw)
        values = {"weight": torch.full((2, 3), float(draw)), "bias": torch.full((3,), 2.0 * draw)}
        return FeedbackGradient(
            values, torch.tensor(draw + 1.0), {"weight": torch.full((2,), draw / 2)} if curved else None
        )

    asked: list[int] = []
    mean = mean_gradient(gradient_at, range(4, 8))
    assert asked == [4, 5, 6, 7]
    assert torch.equal(mean.parameters["weight"], torch.full((2, 3), 5.5))
    assert torch.equal(mean.parameters["bias"], torch.full((3,), 11.0))
    assert mean.loss.item() == 6.5
    assert mean.curvature is None if not curved else torch.equal(mean.curvature["weight"], torch.full((2,), 2.75))
