"""Feedback from the output straight to a hidden stage (Meulemans et al., 2020)."""

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.functional.activations import ActivationName, find_activation


class ReadOut(nn.Module):
    """``g_n(z) = rho(Q phi(z) + c)``, shaped like the activations of a hidden stage.

    ``Q`` is drawn by Xavier's normal rule, ``c`` is zero at first.

    Args:
        features: length of ``phi(z)``: the number of classes, or of units of a hidden layer before this one.
        shape: of one sample of ``s^n``.
        activation: ``rho``.
        bias: whether there is a ``c``.

    Attributes:
        weight: ``Q``, ``[units of s^n, features]``.
        bias: ``c``, ``[units of s^n]``, or None.
    """

    def __init__(
        self, features: int, shape: tuple[int, ...], activation: ActivationName = "identity", bias: bool = False
    ) -> None:
        super().__init__()
        self.shape, self._rho = tuple(shape), find_activation(activation).rho
        self._is_linear = activation == "identity"
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(prod(shape), features)))
        self.bias = nn.Parameter(torch.zeros(prod(shape))) if bias else None

    def forward(self, features: Tensor) -> Tensor:
        """Map ``[batch, features]`` to ``[batch, *shape]``."""
        mapped: Tensor = self._rho(F.linear(features, self.weight, self.bias))
        return mapped.view(-1, *self.shape)

    def difference(self, features: Tensor, step: Tensor) -> Tensor:
        """Compute ``g(features + step) - g(features)``; a linear map is applied once, which keeps more digits."""
        if self._is_linear:
            return F.linear(step, self.weight).view(-1, *self.shape)
        difference: Tensor = self(features + step) - self(features)
        return difference


class RandomHiddenLayer(nn.Module):
    """``phi(z) = tanh(A z + a)``, fixed as drawn: uniform in +-1/sqrt(features), as torch draws linear layers.

    Args:
        features: length of ``z``: the number of classes.
        units: of the layer.
    """

    def __init__(self, features: int, units: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, units).requires_grad_(False)

    def forward(self, outputs: Tensor) -> Tensor:
        """Map ``[batch, features]`` to ``[batch, units]``."""
        return torch.tanh(self.linear(outputs))

    def difference(self, outputs: Tensor, step: Tensor) -> Tensor:
        """Compute ``phi(z + d) - phi(z) = tanh(A d) (1 - phi(z + d) phi(z))``, which keeps the digits of a small d."""
        ends: Tensor = self(outputs + step) * self(outputs)
        return torch.tanh(F.linear(step, self.linear.weight)) * (1.0 - ends)
