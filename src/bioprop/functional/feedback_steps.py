"""Steps of feedback weights that need no learning rate of their own for each stage; means of gradients for a step."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from bioprop.functional.feedback_losses import FeedbackGradient, FeedbackObjective

#: Share of the mean curvature that is added to every unit's, so that a silent unit takes no giant step.
CURVATURE_FLOOR = 0.03


def mean_gradient(gradient_at: FeedbackObjective, draws: Sequence[int]) -> FeedbackGradient:
    """Average a feedback gradient over draws of its noise; its loss and curvature too.

    Args:
        gradient_at: the gradient on fresh noise, by the number of the draw.
        draws: those numbers, at least one, in order.
    """
    total, count = reduce(_add, map(gradient_at, draws)), len(draws)
    return FeedbackGradient(
        {name: gradient / count for name, gradient in total.parameters.items()},
        total.loss / count,
        None if total.curvature is None else total.curvature / count,
    )


def _add(one: FeedbackGradient, other: FeedbackGradient) -> FeedbackGradient:
    return FeedbackGradient(
        {name: gradient + other.parameters[name] for name, gradient in one.parameters.items()},
        one.loss + other.loss,
        None if one.curvature is None or other.curvature is None else one.curvature + other.curvature,
    )


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
    if gradient.curvature is None:
        raise ValueError("the normalized step needs a feedback loss that estimates its curvature")
    curvature = gradient.curvature + CURVATURE_FLOOR * gradient.curvature.mean()
    weight -= eta * gradient.weight / curvature.view(-1, *[1] * (weight.dim() - 1))
