"""FW-DTP: difference targets through feedback weights that are never trained."""

from itertools import pairwise
from typing import Any, cast

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.errors import UserError
from bioprop.functional.differences import standardize_difference
from bioprop.functional.fixed_weights import SCALES, FixedWeightName, draw_fixed_weight
from bioprop.networks.mirrors import Mirror
from bioprop.networks.network import Network
from bioprop.networks.outer_mirrors import build_outer_mirror
from bioprop.networks.stages import StagePass
from bioprop.networks.standardized import StandardizedStage
from bioprop.ranges import check_range, number


class FixedWeightDTP(TargetAlgorithm):
    """Fixed-weight difference target propagation (Shibuya, Inoue, Kawakami & Sato, AAAI 2023).

    Targets are DTP's, ``t^{n-1} = s^{n-1} + G^n(t^n) - G^n(s^n)``, through ``G^n(z) = tanh(z B_n^T)`` with ``B_n`` as
    it was drawn: there is no phase 1. On conv stages (ours) ``B_n^T`` is a transposed convolution of the unpooled maps.

    Where the network standardises a stage over the batch (``MLP(standardize=true)``), so does the feedback to it, in
    two places: ``G^n = BN(tanh(z B_n^T))``, and ``t^{n-1} = BN(s^{n-1} + G^n(t^n) - G^n(s^n))``. The authors' command
    for MNIST standardises the output too (``standardize=all``). Their local losses are without 1/2: a learning rate of
    theirs is twice as large here where the size of a gradient matters, and ``beta`` times that (`TargetAlgorithm`).

    With the small weights of the default, targets lie closer to the activations by about two orders of magnitude for
    each stage. Standardisation undoes that. Without it only an optimizer that does not mind the size of a gradient
    moves the lower stages, and Adam not below its ``eps``: ``orthogonal`` feedback is the better choice there.

    Args:
        network: the forward network; the published one is an MLP of tanh stages.
        beta: step of the output target along the gradient, above 0.
        feedback_init: how ``B_n`` is drawn: ``uniform``, ``gaussian``, ``orthogonal``, ``sparse``.
        feedback_scale: bound of ``uniform`` and ``sparse``, standard deviation of ``gaussian``, factor of
            ``orthogonal``, above 0; None for what is published: 1e-3, and 1 for ``orthogonal``.
        sparsity: share of the weights that ``sparse`` sets to zero, from 0 to 1.
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `Algorithm`.

    Raises:
        UserError: if a hyperparameter is out of its range, or a stage has no mirror.
    """

    recordable = True

    def __init__(
        self,
        network: Network,
        beta: float = 0.04,
        feedback_init: FixedWeightName = "uniform",
        feedback_scale: float | None = None,
        sparsity: float = 0.9,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-3),
        **settings: Any,
    ) -> None:
        super().__init__(network, beta, optimizer, **settings)
        scale = SCALES.get(feedback_init, 1.0) if feedback_scale is None else number("feedback_scale", feedback_scale)
        self.sparsity = number("sparsity", sparsity)
        check_range("feedback_scale", [scale], 0.0, low_allowed=False)
        check_range("sparsity", [self.sparsity], 0.0)
        if self.sparsity >= 1.0:
            raise UserError(f"sparsity is {sparsity}, but some feedback weights must not be zero: stay below 1")
        self._standardized = set()  # the stages whose feedback ends in a standardised stage
        for (_, below), (name, stage) in pairwise(network.stages()):
            mirror = build_outer_mirror(stage.layer if isinstance(stage, StandardizedStage) else stage, "tanh")
            mirror.bias = None
            draw_fixed_weight(mirror.weight, feedback_init, scale, self.sparsity)
            self.feedback[name] = mirror.requires_grad_(False)
            if isinstance(below, StandardizedStage):
                self._standardized.add(name)

    def difference_below(self, name: str, clean: StagePass, difference: Tensor) -> Tensor:
        """Return ``t^{n-1} - s^{n-1}``, standardised where the stage below is."""
        step = super().difference_below(name, clean, difference)
        if name not in self._standardized:
            return step
        output = cast(Mirror, self.feedback[name])(clean.output.detach(), clean.switches)
        return standardize_difference(clean.inputs, standardize_difference(output, step))
