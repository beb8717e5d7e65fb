"""Feedback from the output straight to a hidden stage, and the feedback of difference target propagation as published.

Unlike the mirrors, these put the activation behind the weights: ``g(y) = rho(Q y + c)``, as Lee et al. (2015) and
Meulemans et al. (2020) have it, so that ``g`` keeps to the range of the activations it reconstructs.
"""

from math import prod
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.activations import ActivationName, forward_activation, identity
from bioprop.networks.mirrors import LayerMirror, build_mirror
from bioprop.networks.stages import LayerStage, Stage


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
        self.shape, self._rho = tuple(shape), forward_activation(activation)
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


class Decoder(nn.Module):
    """``g(y) = rho(Q y + c)`` from the output of a stage back to its input, the layer-wise feedback as published.

    On a conv stage ``Q`` is the transposed convolution of the unpooled maps, by the true transpose of the pooling.
    ``Q`` is drawn by Xavier's normal rule, ``c`` is zero at first.

    Args:
        stage: the stage to go back through.
        below: the stage that made its input, whose activation is ``rho``; the identity if it is not of one layer.

    Raises:
        UserError: if the kind of stage has no such feedback.
    """

    def __init__(self, stage: Stage, below: Stage) -> None:
        super().__init__()
        if not isinstance(stage, LayerStage):
            raise UserError(
                f"a {type(stage).__name__} has no layer to send targets back through: DTPDRL needs linear or conv "
                "stages, DDTPLinear takes any"
            )
        mirror = cast(LayerMirror, build_mirror(stage, "exact"))
        mirror.phi, mirror.is_linear = identity, True  # the activation comes behind the weights
        self.mirror = mirror
        self._rho = forward_activation(below.activation if isinstance(below, LayerStage) else "identity")
        nn.init.xavier_normal_(mirror.weight)
        if mirror.bias is not None:
            nn.init.zeros_(mirror.bias)

    @property
    def weight(self) -> Tensor:
        """``Q``, in the layout of the stage's forward weight, of which it is the counterpart."""
        return self.mirror.weight

    def forward(self, outputs: Tensor, switches: Tensor | None) -> Tensor:
        """Map ``[batch, *output_shape]`` of the stage to ``[batch, *input_shape]``, unpooling by ``switches``."""
        mapped: Tensor = self._rho(self.mirror(outputs, switches))
        return mapped

    def difference(self, outputs: Tensor, step: Tensor, switches: Tensor | None) -> Tensor:
        """Compute ``g(outputs + step) - g(outputs)``."""
        difference: Tensor = self(outputs + step, switches) - self(outputs, switches)
        return difference
