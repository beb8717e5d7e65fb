"""What Gaussian noise does on average to one unit: moments behind the feedback activation, and mean slopes.

Everything is elementwise, and in closed form but for tanh, whose integrals are taken by Gauss-Hermite quadrature. Its
errors are largest for slopes: below 1e-9 for noise of size 0.5, 3e-5 for 1, 5e-3 for 2.
"""

from functools import lru_cache
from math import factorial, pi, sqrt
from typing import NamedTuple

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor

from bioprop.functional.activations import ACTIVATIONS, MirrorName, feedback_activation

NODES = 48


class Moments(NamedTuple):
    """Mean ``mu`` and variance ``v`` of ``phi(y + sigma z) - phi(y)``, ``z ~ N(0, 1)``, in the shape of ``y``."""

    mean: Tensor
    variance: Tensor


class Knots(NamedTuple):
    """A feedback activation ``phi(x) = slope x + offset + sum_j P_j(max(t_j - x, 0))`` made of polynomials.

    Attributes:
        slope: that of ``phi`` far to the right.
        offset: constant.
        parts: each knot ``t_j`` with the coefficients of ``P_j``, lowest order first; ``P_j(0) = 0``. From right to
            left, two at most.
    """

    slope: float
    offset: float
    parts: tuple[tuple[float, tuple[float, ...]], ...]

    def square(self) -> "Knots":
        """The square of the sum over knots, in the same form."""
        (right, first), *left = self.parts
        P = Polynomial(first)
        squares = [(right, P * P)]
        for knot, second in left:  # below it the sum is P + Q, so Q^2 + 2 P Q joins P^2
            Q = Polynomial(second)
            squares.append((knot, Q * Q + 2 * P(Polynomial([right - knot, 1.0])) * Q))
        return Knots(0.0, 0.0, tuple((knot, tuple(map(float, square.coef))) for knot, square in squares))


# ELU's feedback activation is 0 + x + w^2/2 left of 0 (w = -x), less u^2/2 left of -1 (u = -1 - x). That of tanh is
# 2/3 - w^2 + w^3/3 left of 1 (w = 1 - x), less u^2 + u^3/3 left of -1.
_ELU_FEEDBACK = Knots(1.0, 0.0, ((0.0, (0.0, 0.0, 0.5)), (-1.0, (0.0, 0.0, -0.5))))
_TANH_FEEDBACK = Knots(0.0, 2 / 3, ((1.0, (0.0, 0.0, -1.0, 1 / 3)), (-1.0, (0.0, 0.0, -1.0, -1 / 3))))
_RELU = Knots(1.0, 0.0, ((0.0, (0.0, 1.0)),))
_LEAKY_RELU = Knots(1.0, 0.0, ((0.0, (0.0, 0.99)),))
_POLYNOMIAL = {
    ("elu", "exact"): _ELU_FEEDBACK,
    ("tanh", "exact"): _TANH_FEEDBACK,
    ("relu", "exact"): _RELU,
    ("relu", "paper"): _RELU,
    ("leaky_relu", "exact"): _LEAKY_RELU,
    ("leaky_relu", "paper"): _LEAKY_RELU,
}


def feature_moments(activation: str, mirror: MirrorName, y: Tensor, sigma: float) -> Moments:
    """Mean and variance of the change that noise makes to a feature, ``phi(y + sigma z) - phi(y)``.

    Args:
        activation: name of the forward activation ``rho``.
        mirror: form of the feedback activation ``phi`` (`bioprop.functional.activations`).
        y: outputs of the stage, any shape.
        sigma: standard deviation of the noise, above 0.

    Raises:
        UserError: if the activation or the form of mirror is not known.
    """
    phi = feedback_activation(activation, mirror)
    if activation == "identity":
        return Moments(torch.zeros_like(y), torch.full_like(y, sigma**2))
    if (activation, mirror) in _POLYNOMIAL:
        return _polynomial_moments(_POLYNOMIAL[activation, mirror], phi(y), y, sigma)
    if activation == "elu":
        return _elu_moments(y, sigma)
    clean, first, second = phi(y), torch.zeros_like(y), torch.zeros_like(y)
    for node, weight in _nodes():
        change = phi(y + sigma * node) - clean
        first.add_(change, alpha=weight)
        second.addcmul_(change, change, value=weight)
    return Moments(first, (second - first.square()).clamp_min_(0.0))


def slope(activation: str, a: Tensor) -> Tensor:
    """``rho'(a)``, elementwise; 0 at the kink of ReLU."""
    if activation == "identity":
        return torch.ones_like(a)
    if activation == "elu":
        return a.clamp_max(0.0).exp_()
    if activation == "tanh":
        return 1.0 - torch.tanh(a).square_()
    right = a.gt(0.0).to(a.dtype)
    return right if activation == "relu" else 0.01 + 0.99 * right


def through_slope(activation: str, mirror: MirrorName, a: Tensor) -> Tensor:
    """``(phi o rho)'(a)``: ``rho'(a)^2`` where ``phi'(rho(a)) = rho'(a)``, by ``exact``; else ``rho'(rho(a)) rho'(a)``.

    Elementwise, away from kinks.
    """
    inner = slope(activation, a)
    return inner * (inner if mirror == "exact" else slope(activation, ACTIVATIONS[activation].rho(a)))


def mean_slope(activation: str, mirror: MirrorName, c: Tensor, std: Tensor) -> Tensor:
    """``E[(phi o rho)'(c + std z)]``, ``z ~ N(0, 1)``: what Stein's lemma asks of a unit without pooling.

    Args:
        activation: name of the forward activation ``rho``.
        mirror: form of the feedback activation ``phi``.
        c: pre-activations, any shape.
        std: their standard deviations, above 0, of a shape that broadcasts.

    Returns:
        In the shape of ``c``; closed, but for ``elu`` in the ``paper`` form (a series, error below 1e-7) and ``tanh``
        (quadrature).
    """
    if activation == "identity":
        return torch.ones_like(c)
    if activation == "tanh":
        total = torch.zeros_like(c)
        for node, weight in _nodes():
            total.add_(through_slope(activation, mirror, c + std * node), alpha=weight)
        return total
    above: Tensor = torch.special.ndtr(c / std)
    if activation == "relu":
        return above
    if activation == "leaky_relu":
        return 1e-4 + (1 - 1e-4) * above
    if mirror == "exact":
        return above + _half_exponential(2, c, std)
    # exp(e^x - 1 + x) = sum_k e^(kx) / (e (k - 1)!) for x < 0
    for rate in range(1, 11):
        above.add_(_half_exponential(rate, c, std), alpha=1 / (np.e * factorial(rate - 1)))
    return above


def _half_exponential(rate: int, c: Tensor, std: Tensor | float) -> Tensor:
    """``E[exp(rate x); x < 0]``, ``x ~ N(c, std^2)``, in logarithms: one factor may overflow where the other is 0."""
    tail: Tensor = torch.special.log_ndtr(-c / std - rate * std)
    return (rate * c + 0.5 * rate**2 * std**2 + tail).exp_()


def _power_integrals(u: Tensor, order: int) -> list[Tensor]:
    """``I_p = E[max(u + z, 0)^p]`` for p = 0..order: ``I_p = u I_{p-1} + (p - 1) I_{p-2}``."""
    integrals = [torch.special.erfc(u * -sqrt(0.5)).mul_(0.5)]
    if order:
        density = (u * u).mul_(-0.5).exp_().mul_(1 / sqrt(2 * pi))
        integrals.append(torch.addcmul(density, u, integrals[0]))
    for p in range(2, order + 1):
        integrals.append((u * integrals[-1]).add_(integrals[-2], alpha=p - 1))
    return integrals


def _polynomial_moments(phi: Knots, clean: Tensor, y: Tensor, sigma: float) -> Moments:
    """Split off the line: ``d = slope sigma z + r(x) - r(y)``, so that nothing large cancels where ``phi`` is a line.

    ``Var d = slope^2 sigma^2 + 2 slope sigma^2 E[r'] + Var r``, by Stein's lemma.
    """
    squares = dict(phi.square().parts)
    mean, steepness, second = torch.zeros_like(y), torch.zeros_like(y), torch.zeros_like(y)
    for knot, coefficients in phi.parts:
        square = squares[knot]
        integrals = _power_integrals((knot - y).div_(sigma), len(square) - 1)
        for p, a in enumerate(coefficients):
            if a:
                mean.add_(integrals[p], alpha=a * sigma**p)
                steepness.add_(integrals[p - 1], alpha=-p * a * sigma ** (p - 1))
        for p, a in enumerate(square):
            if a:
                second.add_(integrals[p], alpha=a * sigma**p)
    second.addcmul_(mean, mean, value=-1.0).add_(steepness, alpha=2 * phi.slope * sigma**2)
    variance = second.add_(phi.slope**2 * sigma**2).clamp_min_(0.0)
    return Moments(mean.add_(y, alpha=phi.slope).add_(phi.offset).sub_(clean), variance)


def _elu_moments(y: Tensor, sigma: float) -> Moments:
    """The same for ELU: left of 0, ``r(x) = e^x - 1 - x``; to the right, 0."""
    u = y / -sigma
    I0, I1, I2 = _power_integrals(u, 2)
    E1, E2 = _half_exponential(1, y, sigma), _half_exponential(2, y, sigma)
    shifted = _power_integrals(u - sigma, 1)[1]  # E[e^x max(-x, 0)] = e^(y + sigma^2/2) sigma I_1(u - sigma)
    cross = (y.clamp_max(10.0) + 0.5 * sigma**2).exp_().mul_(shifted).mul_(sigma).sub_(I1, alpha=sigma)
    mean = E1 - I0
    steepness = mean.clone()  # E[r'] = E[e^x - 1; x < 0]
    mean.add_(I1, alpha=sigma)
    second = (E2 - 2 * E1).add_(I0).add_(cross, alpha=2.0).add_(I2, alpha=sigma**2)
    variance = second.addcmul_(mean, mean, value=-1.0).add_(steepness, alpha=2 * sigma**2).add_(sigma**2)
    below = y.clamp_max(0.0)
    return Moments(mean.sub_(torch.expm1(below).sub_(below)), variance.clamp_min_(0.0))


@lru_cache(maxsize=1)
def _nodes() -> tuple[tuple[float, float], ...]:
    """Nodes and weights of ``E[f(z)]``, ``z ~ N(0, 1)``, those with weights below 1e-14 left out."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(NODES)
    weights = weights / weights.sum()
    return tuple((float(node), float(weight)) for node, weight in zip(nodes, weights, strict=True) if weight > 1e-14)
