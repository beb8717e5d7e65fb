"""Steps of feedback weights that need no learning rate of their own for each stage; means of gradients for a step."""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor

from bioprop.feedback.losses import FeedbackGradient, FeedbackObjective

#: Share of the mean curvature that is added to every unit's, so that a silent unit takes no giant step.
CURVATURE_FLOOR = 0.03


def mean_gradient(gradient_at: FeedbackObjective, draws: Sequence[int]) -> FeedbackGradient:
    """Average a feedback gradient over draws of its noise; its loss and curvature too.

    Args:
        gradient_at: the gradient on fresh noise, by the number of the draw.
        draws: those numbers, at least one, in order.
    """
    gradients = [gradient_at(draw) for draw in draws]
    if len(gradients) == 1:
        return gradients[0]
    curvatures = [gradient.curvature for gradient in gradients if gradient.curvature is not None]
    return FeedbackGradient(
        _mean_by_name([gradient.parameters for gradient in gradients]),
        _mean([gradient.loss for gradient in gradients]),
        _mean_by_name(curvatures) if curvatures else None,
    )


def _mean(values: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, values) / len(values)


def _mean_by_name(values: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _mean([each[name] for each in values]) for name in values[0]}


@torch.no_grad()
def normalized_step(weights: Mapping[str, Tensor], gradient: FeedbackGradient, eta: float | None) -> None:
    """``V_o <- V_o - eta gradient_o / (D_o + 0.03 mean(D))``, in place, for the weights that leave each unit ``o``.

    Ours: a diagonal Newton step with the curvature ``D`` of the feedback loss, so that the same ``eta`` in (0, 1] fits
    every stage, noise and batch. There is no momentum.

    The largest stable ``eta`` depends on the batch all the same: noise on ``units`` units has a sample covariance whose
    largest eigenvalue is about ``(1 + sqrt(units / batch))^2`` times its mean, so the step is stable while ``eta``
    times that is below 2; and around the minimiser the noise in ``V`` is about ``sqrt(fan_in / batch * eta / 2)`` of
    ``V`` on a linear stage. Wide linear stages therefore want a small ``eta`` (0.03 on LeNet's 4096 -> 512 units and
    128 images) or a large batch.

    Args:
        weights: ``V`` by name, ``[units, ...]`` each.
        gradient: of the feedback loss, for all or some of the names, with a curvature for each.
        eta: fraction of the Newton step; None for a curvature that is damped already (`Probing.damped`), with neither
            fraction nor floor.

    Raises:
        ValueError: if the gradient carries no curvatures.
    """
    if gradient.curvature is None:
        raise ValueError("the normalized step needs a feedback loss that estimates its curvature")
    for name, curvature in gradient.curvature.items():
        weight, found = weights[name], gradient.parameters[name]
        if curvature.dim() == 1:  # one for each unit, not for each of its taps
            curvature = curvature.view(-1, *[1] * (weight.dim() - 1))
        if eta is None:
            weight -= found / curvature
        else:
            weight -= eta * found / (curvature + CURVATURE_FLOOR * curvature.mean())
