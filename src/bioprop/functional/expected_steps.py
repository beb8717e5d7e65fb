"""Gradient of the expected feedback loss, and steps along it."""

from itertools import pairwise

import torch
from torch import Tensor

from bioprop.functional.expected_feedback import ExpectedLoss
from bioprop.functional.feedback_losses import FeedbackGradient


@torch.no_grad()
def expected_gradient(expected: ExpectedLoss, feedback: Tensor) -> FeedbackGradient:
    """``(2/B) (mean_term + V D - A)``, and the loss that it is the gradient of.

    A choice: over the iterations on one batch ``mean_term`` is held as it was at ``V_0``, where the gradient is exact.
    The means are of the order of ``sigma^2``, so what is left out is of the order of ``sigma^4 (V - V_0)`` (of
    ``sigma^2``, as all the rest, for units that sit within their noise of a kink); and all else is elementwise. In the
    loss, too, the mean part is linear: ``(1/B) (-2 <V, A> + <V, V D> + <2 V - V_0, mean_term>)``.

    Args:
        expected: of the batch.
        feedback: feedback weight ``V``.
    """
    V = feedback.detach()
    decay, pull = V * expected.D, expected.mean_term - expected.A
    loss = (V * (decay + 2 * pull)).sum() - expected.mean_loss
    gradient = (decay + pull).mul_(2 / expected.batch)
    return FeedbackGradient({"weight": gradient}, loss / expected.batch, expected.curvature)


@torch.no_grad()
def expected_steps(
    feedback: Tensor,
    expected: ExpectedLoss,
    rate: float | Tensor,
    iterations: int,
    momentum: float = 0.0,
    velocity: Tensor | None = None,
) -> Tensor:
    """Take all iterations of a batch at once, in place: what as many `expected_gradient` and steps of SGD would do.

    The gradient is linear in ``V``, with one factor for all weights of a unit and tap. After ``k`` steps therefore
    ``V - V_0 = x_k g_0 + y_k M_0``, with ``g_0`` the first gradient, ``M_0`` the velocity at the start and an ``x_k``
    and ``y_k`` for each unit and tap that follow the recursion ``M <- momentum M + g``, ``V <- V - rate M`` themselves.

    Args:
        feedback: feedback weight, ``V_0`` of ``expected``.
        expected: of the batch.
        rate: learning rate, or one for each unit, ``[units]`` (`normalized_step`: ``eta / (D_o + 0.03 mean(D))``).
        iterations: number of steps, above 0.
        momentum: in [0, 1).
        velocity: the momentum buffer, in the shape of ``V``; None starts from zeros and keeps nothing.

    Returns:
        The loss before each step, ``[iterations]``.
    """
    first = expected_gradient(expected, feedback)
    g, h = first.weight, expected.D * (2 / expected.batch)
    M = torch.zeros_like(g) if velocity is None else velocity
    if isinstance(rate, Tensor):
        rate = rate.view(-1, *[1] * (g.dim() - 1))
    # (x_k, y_k) for all k, and the p_k, q_k of the velocity p_k g_0 + q_k M_0: small, so that calls are what they cost
    course = h.new_zeros(iterations + 1, 2, *h.shape)
    velocities = torch.stack([torch.zeros_like(h), torch.ones_like(h)])
    for here, after in pairwise(course):
        velocities.mul_(momentum).addcmul_(h, here)
        velocities[0].add_(1.0)
        torch.sub(here, velocities * rate, out=after)
    x, y = course[:-1].unbind(1)
    gg, gM, MM = ((a * b).sum(1, keepdim=True) for a, b in ((g, g), (g, M), (M, M)))
    terms = x * gg + y * gM + 0.5 * h * (x * x * gg + 2 * x * y * gM + y * y * MM)
    (x, y), (p, q) = course[-1], velocities
    feedback.addcmul_(x, g).addcmul_(y, M)
    if velocity is not None:
        velocity.mul_(q).addcmul_(p, g)
    return first.loss + terms.flatten(1).sum(1)
