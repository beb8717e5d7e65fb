"""Steps along the expected gradient: against autograd, and all at once against one after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.expected_feedback import ExpectedLoss
from bioprop.functional.expected_steps import expected_gradient, expected_steps
from bioprop.functional.feedback_steps import CURVATURE_FLOOR, normalized_step
from bioprop.functional.pool_windows import ConvGeometry
from tests.functional.test_expected_feedback import ONE_PIXEL, UNPOOLED, VGG_LIKE, make_stage, prepare

GEOMETRIES = {"conv": VGG_LIKE, "linear": ONE_PIXEL}
every_kind = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)


def make_case(geometry: ConvGeometry) -> tuple[ExpectedLoss, Tensor]:
    stage = make_stage(geometry, "exact")
    return prepare(stage), stage.feedback


@every_kind
def test_the_gradient_is_that_of_the_loss(geometry: ConvGeometry) -> None:
    expected, feedback = make_case(geometry)
    V = (feedback + torch.randn_like(feedback)).requires_grad_()
    energy = V.square() * expected.D - 2 * V * expected.A + (2 * V - feedback) * expected.mean_term
    loss = energy.sum() / expected.batch
    (gradient,) = torch.autograd.grad(loss, V)
    found = expected_gradient(expected, V)
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.weight, gradient)
    assert not found.weight.requires_grad


def test_the_mean_term_is_a_gradient_too() -> None:
    """Without pooling, of ``|convT(mu; V)|^2 / 2`` with means that are ``E[ELU(y + sigma z)] - ELU(y)`` on a grid."""
    stage = make_stage(UNPOOLED["stride 2"], "paper")
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    y = stage.run(stage.inputs)[0]
    mean = F.elu(y[..., None] + 0.5 * z) @ torch.softmax(-(z**2) / 2, 0) - F.elu(y)
    V = stage.feedback.clone().requires_grad_()
    energy = stage.back(mean, V).square().sum() / 2
    (expected,) = torch.autograd.grad(energy, V)
    found = prepare(stage, sigma=0.5)
    torch.testing.assert_close(found.mean_term, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.mean_loss, 2 * energy.detach(), rtol=1e-6, atol=1e-8)


def test_holding_the_mean_term_leaves_out_the_fourth_order_of_the_noise() -> None:
    """Away from ``V_0``, half the noise leaves a sixteenth of the error."""
    stage = make_stage(UNPOOLED["stride 1"], "paper", "tanh")
    V = stage.feedback + torch.randn_like(stage.feedback)
    errors = [
        (
            expected_gradient(prepare(stage, sigma=sigma), V).weight
            - expected_gradient(prepare(stage._replace(feedback=V), sigma=sigma), V).weight
        ).norm()
        for sigma in (0.1, 0.05)
    ]
    assert errors[0] / errors[1] == pytest.approx(16, rel=0.05)


@every_kind
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_all_at_once(geometry: ConvGeometry, momentum: float) -> None:
    expected, feedback = make_case(geometry)
    start, rate, parameter = torch.randn_like(feedback), 0.02, torch.nn.Parameter(feedback.clone())
    optimizer = torch.optim.SGD([parameter], lr=rate, momentum=momentum)
    if momentum:
        optimizer.state[parameter]["momentum_buffer"] = start.clone()
    losses = []
    for _ in range(7):
        found = expected_gradient(expected, parameter)
        losses.append(found.loss)
        parameter.grad = found.weight
        optimizer.step()

    V, velocity = feedback.clone(), start.clone() if momentum else None
    course = expected_steps(V, expected, rate, 7, momentum, velocity)
    torch.testing.assert_close(V, parameter.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(course, torch.stack(losses), rtol=1e-12, atol=1e-13)
    if velocity is not None:
        expected_velocity = optimizer.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(velocity, expected_velocity, rtol=1e-12, atol=1e-13)


@every_kind
def test_a_new_momentum_starts_from_zero(geometry: ConvGeometry) -> None:
    expected, feedback = make_case(geometry)
    V, other = feedback.clone(), feedback.clone()
    expected_steps(V, expected, 0.02, 5, 0.9, torch.zeros_like(V))
    expected_steps(other, expected, 0.02, 5, 0.9)
    assert torch.equal(V, other)


@every_kind
def test_normalized_steps_all_at_once(geometry: ConvGeometry) -> None:
    expected, feedback = make_case(geometry)
    stepped, V = feedback.clone(), feedback.clone()
    for _ in range(6):
        normalized_step(stepped, expected_gradient(expected, stepped), 0.3)
    floor = CURVATURE_FLOOR * expected.curvature.mean()
    course = expected_steps(V, expected, 0.3 / (expected.curvature + floor), 6)
    torch.testing.assert_close(V, stepped, rtol=1e-12, atol=1e-13)
    assert (course.diff() < 0).all()
