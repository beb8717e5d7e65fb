"""Differences of two nearly equal values, computed without subtracting them.

Where a target lies close to its activation, ``f(a + d) - f(a)`` in float32 keeps only the digits by which the two
differ. Each function below works with ``d`` alone as far as its formula allows.
"""

import torch
from torch import Tensor

from bioprop.functional.activations import find_activation

#: Added to standard deviations before dividing by them (Shibuya et al., 2023).
STD_FLOOR = 1e-12


def tanh_difference(values: Tensor, step: Tensor) -> Tensor:
    """``tanh(a + d) - tanh(a) = tanh(d) (1 - tanh(a) tanh(a + d))``, relative to its size as exact as ``d`` is."""
    return torch.tanh(step) * (1.0 - torch.tanh(values) * torch.tanh(values + step))


def activation_difference(name: str, values: Tensor, step: Tensor) -> Tensor:
    """``rho(a + d) - rho(a)`` for the activation of that name, all in one shape."""
    if name == "tanh":
        return tanh_difference(values, step)
    if name == "identity":
        return step
    rho = find_activation(name).rho
    return rho(values + step) - rho(values)


def standardize(values: Tensor) -> Tensor:
    """``(x - mean) / (std + 1e-12)`` over the batch, for each unit alone (Shibuya et al., AAAI 2023).

    Args:
        values: ``x``, ``[batch, units]`` with at least 2 samples; ``std`` is that of a sample (divided by batch - 1).
    """
    return (values - values.mean(0)) / (values.std(0) + STD_FLOOR)


def standardize_difference(values: Tensor, step: Tensor) -> Tensor:
    """``standardize(x + d) - standardize(x)``.

    With ``s`` for the standard deviation, ``s(x + d)^2 - s(x)^2 = 2 cov(x, d) + s(d)^2`` gives its change without
    subtracting two of them.

    Args:
        values: ``x``, ``[batch, units]`` with at least 2 samples.
        step: ``d``, in the same shape.
    """
    centred, centred_step = values - values.mean(0), step - step.mean(0)
    before, after = values.std(0), (values + step).std(0)
    of_squares = (centred_step * (2.0 * centred + centred_step)).sum(0) / (len(values) - 1)
    change = of_squares / (before + after + STD_FLOOR)
    return (centred_step - centred * change / (before + STD_FLOOR)) / (after + STD_FLOOR)
