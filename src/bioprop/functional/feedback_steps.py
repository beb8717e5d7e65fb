"""Steps of feedback weights that need no learning rate of their own for each stage."""

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
