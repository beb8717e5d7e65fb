"""TP: target propagation, without the difference correction."""

from typing import Any, cast

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from bioprop.algorithms.dtp import DTP
from bioprop.networks.mirrors import Mirror
from bioprop.networks.network import Network
from bioprop.networks.stages import StagePass


class TargetPropagation(DTP):
    """Target propagation (Bengio, 2014; named so and compared by Lee, Zhang, Fischer & Bengio, ECML 2015).

    Feedback is trained as in `DTP`, to reconstruct. Targets are what it makes of the target above,
    ``t^{n-1} = G^n(t^n)``: if ``G^n`` is the inverse of ``F^n``, then ``F^n(t^{n-1}) = t^n``. If it is not, the target
    carries the whole error of reconstruction, which ``beta`` does not scale. Training therefore needs feedback that
    reconstructs well, a ``beta`` so large that the step at the output does not drown in that error, and an optimizer
    that does not mind the size of a gradient (Adam). The output stage can hardly be inverted, having fewer units than
    it reads: ``penultimate_target="gradient"`` goes around it.

    Args:
        network: the forward network.
        beta: step of the output target along the gradient, above 0. Where errors of reconstruction prevail, updates of
            hidden stages grow as ``1 / beta`` in units of the BP gradient.
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `DTP`.

    Raises:
        UserError: if a hyperparameter is out of its range, a list has the wrong length, or a stage has no mirror.
    """

    recordable = True

    def __init__(
        self,
        network: Network,
        beta: float = 10.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-4),
        **settings: Any,
    ) -> None:
        super().__init__(network, beta=beta, optimizer=optimizer, **settings)

    def difference_below(self, name: str, clean: StagePass, difference: Tensor) -> Tensor:
        """Return ``t^{n-1} - s^{n-1} = G^n(t^n) - s^{n-1}``."""
        mirror = cast(Mirror, self.feedback[name])
        target: Tensor = mirror(clean.output.detach() + difference, clean.switches)
        return target - clean.inputs
