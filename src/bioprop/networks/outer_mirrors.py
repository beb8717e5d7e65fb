"""Feedback operators with their activation outside, ``G(y) = psi(V^T y + c)``: of Lee (2015), Meulemans (2020) et al.

The mirrors of `bioprop.networks.mirrors` apply the activation first and the weights last, which can match the
transposed Jacobian. These apply it last, so that ``G`` hands out values in the range of the stage below.
"""

from functools import singledispatch

from torch import Tensor, nn

from bioprop.errors import UserError
from bioprop.functional.activations import ACTIVATIONS, find_activation
from bioprop.functional.differences import activation_difference
from bioprop.networks.mirrors import ConvMirror, LayerMirror, LinearMirror
from bioprop.networks.stages import ConvStage, LayerStage, LinearStage, Stage, Switches


class OuterMirror(LayerMirror):
    """``G(y) = psi(V^T P^T y + c)``: transposed pooling ``P^T`` (if any), weights, then the activation ``psi``.

    Args:
        stage: the stage that is mirrored.
        activation: name of ``psi``.
    """

    def __init__(self, stage: LayerStage, activation: str) -> None:
        super().__init__(stage, "exact")
        self.outer = activation
        self.psi = find_activation(activation).rho
        self.activation = ACTIVATIONS["identity"]

    def draw_by_xavier(self) -> None:
        """Draw ``V`` anew by Xavier's normal rule and set ``c`` to zero, as Meulemans et al. (2020) do."""
        nn.init.xavier_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, outputs: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs)``, ``[batch, *output_shape]`` to ``[batch, *input_shape]``."""
        return self.psi(super().forward(outputs, switches))

    def difference(self, outputs: Tensor, step: Tensor, switches: Switches) -> Tensor:
        """Compute ``G(outputs + step) - G(outputs)`` from the difference before the activation."""
        before = super().forward(outputs, switches)
        return activation_difference(self.outer, before, self.project(self.features(step, switches)))


class OuterLinearMirror(OuterMirror, LinearMirror):
    """``psi(V^T y + c)``, shaped back like the stage's input; ``V`` is ``[out_features, in_features]``."""


class OuterConvMirror(OuterMirror, ConvMirror):
    """``psi(convT(P^T y; V) + c)``; ``V`` is ``[out_channels, in_channels, kernel, kernel]``."""


def activation_of(stage: Stage) -> str:
    """Name of the activation whose range a stage's output has; the identity for stages that are not of one layer."""
    return stage.activation if isinstance(stage, LayerStage) else "identity"


@singledispatch
def build_outer_mirror(stage: Stage, activation: str) -> OuterMirror:
    """Build the outer mirror of a stage, chosen by the kind of stage; new kinds ``@build_outer_mirror.register``.

    Raises:
        UserError: if the kind of stage has none.
    """
    kinds = ", ".join(sorted(kind.__name__ for kind in build_outer_mirror.registry if kind is not object))
    raise UserError(
        f"a {type(stage).__name__} has no feedback operator with its activation outside: choose a network of stages "
        f"among {kinds}"
    )


@build_outer_mirror.register
def _(stage: LinearStage, activation: str) -> OuterMirror:
    return OuterLinearMirror(stage, activation)


@build_outer_mirror.register
def _(stage: ConvStage, activation: str) -> OuterMirror:
    return OuterConvMirror(stage, activation)
