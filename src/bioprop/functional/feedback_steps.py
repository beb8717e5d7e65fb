"""Steps of feedback weights that need no learning rate of their own for each stage."""

from collections.abc import Mapping

import torch
from torch import Tensor

from bioprop.functional.feedback_losses import FeedbackGradient

#: Share of the mean curvature that is added to every unit's, so that a silent unit takes no giant step.
CURVATURE_FLOOR = 0.03


@torch.no_grad()
def normalized_step(weight: Tensor, gradient: FeedbackGradient, eta: float) -> None:
    """``V_o <- V_o - eta gradient_o / (D_o + 0.03 mean(D))``, in place, for the weights that leave each unit ``o``.

    Ours: a diagonal Newton step with the curvature ``D`` of the feedback loss, so that the same ``eta`` in (0, 1] fits
    every stage, noise and batch. There is no momentum.

    How large ``eta`` may be depends on the batch all the same: noise on ``units`` units has a sample covariance whose
    largest eigenvalue is about ``(1 + sqrt(units / batch))^2`` times its mean, so the step is stable while ``eta``
    times that is below 2; and around the minimiser the noise in ``V`` is about ``sqrt(fan_in / batch * eta / 2)`` of
    ``V`` on a linear stage. Wide linear stages therefore want a small ``eta`` (0.03 on LeNet's 4096 -> 512 units and
    128 images) or a large batch.

    Args:
        weight: ``V``, ``[units, ...]``.
        gradient: of the feedback loss, with its curvature.
        eta: fraction of the Newton step.

    Raises:
        ValueError: if the gradient carries no curvature.
    """
    if not isinstance(gradient.curvature, Tensor):
        raise ValueError("the normalized step needs a feedback loss that estimates its curvature")
    _step(weight, gradient.weight, gradient.curvature, eta)


@torch.no_grad()
def normalized_steps(weights: Mapping[str, Tensor], gradient: FeedbackGradient, eta: float) -> None:
    """`normalized_step` for each of several weights, in place, by the curvature of its own.

    Args:
        weights: by name.
        gradient: of the feedback loss, for all or some of the names, with a curvature for each.
        eta: fraction of the Newton step.

    Raises:
        ValueError: if the gradient carries no curvatures.
    """
    if not isinstance(gradient.curvature, Mapping):
        normalized_step(weights["weight"], gradient, eta)
        return
    for name, curvature in gradient.curvature.items():
        _step(weights[name], gradient.parameters[name], curvature, eta)


def _step(weight: Tensor, gradient: Tensor, curvature: Tensor, eta: float) -> None:
    curvature = curvature + CURVATURE_FLOOR * curvature.mean()
    weight -= eta * gradient / curvature.view(-1, *[1] * (weight.dim() - 1))
