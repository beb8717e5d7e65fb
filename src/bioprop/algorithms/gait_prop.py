"""GAIT-prop: targets through exact inverses that give the gradient."""

from collections.abc import Sequence
from typing import Any, cast, get_args

import torch
import torch.nn.functional as F
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.errors import UserError
from bioprop.functional.gait import Orthogonal, gait_difference, orthogonality_gradient
from bioprop.functional.output_losses import OutputLossName
from bioprop.networks.invertible_mlp import InvertibleStage
from bioprop.networks.network import Network
from bioprop.networks.stages import StagePass
from bioprop.ranges import check_range, number


class GAITProp(TargetAlgorithm):
    """Gradient-adjusted incremental target propagation (Ahmad, van Gerven & Ambrogioni, NeurIPS 2020).

    The target of the output is the one-hot label, ``t_L = y_L - dL/dy_L``. Below, each target is the exact inverse of a
    small step towards the target above, ``t_{l-1} = inv_l((1 - gamma f'(a_l)^2) o y_l + gamma f'(a_l)^2 o t_l)``, and
    ``dW_l = -mean_batch gamma^{-(L-l)} ((y_l - t_l) o f'(a_l)) y_{l-1}^T``. With orthogonal ``W_l`` and gamma -> 0 this
    is the BP update exactly. There are no feedback weights: inverses are computed from the forward weights.

    A regulariser, ``lambda sum ((W W^T) o (1 - I))^2`` in the paper, keeps the rows of the weights near orthogonal; the
    authors' program has ``W^T W``, which keeps the columns so. Like weight decay it is part of the step, not of
    `forward_gradients`, which show how far the targets alone are from the gradient. The Adam of the authors' program
    has no correction for its start at zero, torch's has.

    Args:
        network: an `InvertibleMLP`.
        gamma: share of the way to the target above, above 0 and at most 1.
        orthogonality: ``lambda``, the weight of the regulariser, 0 for none.
        orthogonal: what it keeps orthogonal: ``rows`` (the paper's form) or ``columns`` (the program's).
        loss: ``squared_error`` (published) or ``cross_entropy``.
        optimizer: makes the optimizer of the forward weights; the configurations have the paper's second beta, 0.99.
        settings: the other arguments of `Algorithm`.

    Raises:
        UserError: if a stage has no inverse, or a hyperparameter is out of its range.
    """

    def __init__(
        self,
        network: Network,
        gamma: float = 1e-3,
        orthogonality: float = 0.1,
        orthogonal: Orthogonal = "rows",
        loss: OutputLossName = "squared_error",
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-4),
        **settings: Any,
    ) -> None:
        super().__init__(network, 1.0, optimizer, loss=loss, **settings)
        self.gamma, self.orthogonality = number("gamma", gamma), number("orthogonality", orthogonality)
        check_range("gamma", [self.gamma], 0.0, low_allowed=False)
        check_range("orthogonality", [self.orthogonality], 0.0)
        if orthogonal not in get_args(Orthogonal):
            raise UserError(f"orthogonal {orthogonal!r} is not known: choose one of {', '.join(get_args(Orthogonal))}")
        self.orthogonal = orthogonal
        if self.gamma > 1.0:
            raise UserError(f"gamma is {gamma}, but a step beyond the target is none towards it: stay at or below 1")
        for name, stage in network.stages():
            if not isinstance(stage, InvertibleStage):
                raise UserError(
                    f"GAIT-prop needs stages with an inverse, and {name} is a {type(stage).__name__}: choose the "
                    "network InvertibleMLP"
                )

    def _stages(self) -> list[tuple[str, InvertibleStage]]:
        return cast(list[tuple[str, InvertibleStage]], self.network.stages())

    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        """Return ``gamma^{-(L-l)} (t_l - y_l)`` for every stage, from the input to the output, given the output's.

        Raises:
            UserError: if a weight has lost its inverse.
        """
        differences = [output]
        for above, ((name, stage), clean) in enumerate(zip(self._stages()[:0:-1], passes[:0:-1], strict=True)):
            width, slope = len(stage.weight), stage.negative_slope
            # units that are handed to nobody (in the output stage, those beyond the classes) stay as they are
            outputs, difference = (_widen(each, width) for each in (clean.output.detach(), differences[-1]))
            try:
                below = gait_difference(outputs, stage.weight, difference, self.gamma, above, slope)
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                raise UserError(
                    f"the weight of stage {name} has lost its inverse: lower the learning rate of model.optimizer, or "
                    "raise model.orthogonality"
                ) from error
            differences.append(_widen(below, width + stage.spare))
        return differences[::-1]

    def _step_forward_weights(self, gradients: dict[str, Tensor]) -> None:
        step = dict(gradients)
        for name, stage in self._stages():
            weight = f"{name}.linear.weight"
            if self.orthogonality and weight in step:
                pull = orthogonality_gradient(stage.weight.detach(), self.orthogonal)
                step[weight] = step[weight] + self.orthogonality * pull
        super()._step_forward_weights(step)


def _widen(units: Tensor, width: int) -> Tensor:
    return F.pad(units, (0, width - units.shape[1]))
