"""GAIT-prop's targets (Ahmad, van Gerven & Ambrogioni, NeurIPS 2020), in a form that float32 can hold.

For stages ``y_l = f(a_l)``, ``a_l = W_l y_{l-1} + b_l`` with leaky ReLU ``f``, the paper has, from the output L down,

    t_{l-1} = inv_l( (1 - gamma f'(a_l)^2) o y_l + gamma f'(a_l)^2 o t_l ),
    e_l = gamma^{-(L-l)} (y_l - t_l) o f'(a_l).

Literally, ``t_l`` differs from ``y_l`` by a share of ``gamma^{L-l}``, and ``e_l`` blows the rounding of the difference
up by as much: with gamma 1e-3, float32 has no digit left two or three stages below the output. Here the difference is
carried in the units of the output from the start, ``D_l = gamma^{-(L-l)} (t_l - y_l)``, and the inverse is taken of the
difference too. ``D`` does not depend on ``gamma`` at all unless a target lies across the kink of a unit.
"""

from typing import Literal

import torch
from torch import Tensor

Orthogonal = Literal["rows", "columns"]


def leaky_slope(outputs: Tensor, negative_slope: float) -> Tensor:
    """``f'(a)`` given ``y = f(a)``: 1 above 0, else the negative slope, as torch has it."""
    return torch.full_like(outputs, negative_slope).masked_fill(outputs > 0, 1.0)


def inverse_difference(outputs: Tensor, step: Tensor, scale: float, negative_slope: float) -> Tensor:
    """``(f^{-1}(y + scale d) - f^{-1}(y)) / scale`` for leaky ReLU, exactly, however small the scale.

    It is ``d / f'(a)`` unless ``y`` and ``y + scale d`` lie on two sides of 0.

    Args:
        outputs: ``y``.
        step: ``d``, in the same shape.
        scale: above 0.
        negative_slope: of ``f``, above 0.
    """
    slope = leaky_slope(outputs, negative_slope)
    across = (outputs + scale * step > 0) != (outputs > 0)
    slope_there = leaky_slope(-outputs, negative_slope)
    # y is nearer to 0 than scale * d here, so that y / scale is no larger than d
    bent = step / slope_there + outputs / scale * (1.0 / slope_there - 1.0 / slope)
    return torch.where(across, bent, step / slope)


def gait_difference(
    outputs: Tensor, weight: Tensor, difference: Tensor, gamma: float, stages_above: int, negative_slope: float
) -> Tensor:
    """``D_{l-1} = gamma^{-(L-l+1)} (t_{l-1} - y_{l-1})`` given ``D_l``, of the units that the stage reads.

    Args:
        outputs: ``y_l``, ``[batch, width]``.
        weight: ``W_l``, ``[width, width]``.
        difference: ``D_l``, like ``outputs``.
        gamma: share of the way to the target, above 0.
        stages_above: ``L - l``.
        negative_slope: of ``f``.

    Returns:
        ``[batch, width]``.

    Raises:
        torch.linalg.LinAlgError: if the weight has no inverse.
    """
    step = leaky_slope(outputs, negative_slope).square() * difference
    affine = inverse_difference(outputs, step, gamma ** (stages_above + 1), negative_slope)
    below: Tensor = torch.linalg.solve(weight.mT, affine, left=False)
    return below


def orthogonality_gradient(weight: Tensor, orthogonal: Orthogonal = "rows") -> Tensor:
    """Gradient of ``sum ((W W^T) o (1 - I))^2``, which is ``4 ((W W^T) o (1 - I)) W``; for columns, of ``W^T W``.

    The regulariser of Ahmad et al. (2020): it is zero if the rows, or columns, are orthogonal, whatever their lengths.

    Args:
        weight: ``W``, ``[units, inputs]``.
        orthogonal: ``rows``, the form of the paper, or ``columns``, that of the authors' program.
    """
    if orthogonal == "columns":
        return orthogonality_gradient(weight.mT).mT
    products = weight @ weight.mT
    products = products - torch.diag(products.diagonal())
    return 4.0 * products @ weight
