"""What methods with a feedback operator a stage share: the operators, and the targets that come down through them."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.functional.angles import angle_degrees, flatten_all
from bioprop.functional.gradients import input_gradient
from bioprop.networks.mirrors import Mirror
from bioprop.networks.network import Network
from bioprop.networks.stages import Stage, StagePass


class MirroredFeedback(TargetAlgorithm):
    """Difference targets through a feedback operator ``G^n`` a stage; subclasses build the operators.

    Hidden targets are ``t^{n-1} = s^{n-1} + G^n(t^n) - G^n(s^n)`` (Lee et al., 2015).

    Attributes:
        feedback: the operators by name of stage. ``G^1`` would reach the input: nothing needs it.
    """

    @abstractmethod  # there is nothing to train, nor to name on the command line, without operators
    def __init__(
        self, network: Network, beta: float, optimizer: OptimizerCallable, scheduler: LRSchedulerCallable | None
    ) -> None:
        super().__init__(network, beta, optimizer, scheduler)
        self.feedback = nn.ModuleDict()

    def mirrored_stages(self) -> list[tuple[str, Stage, Mirror]]:
        """Return name, stage and feedback operator of every stage that has one, from the input to the output."""
        return [
            (name, stage, cast(Mirror, self.feedback[name]))
            for name, stage in self.network.stages()
            if name in self.feedback
        ]

    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        """Return ``t^n - s^n`` for every stage, from the input to the output, given the output's.

        Args:
            passes: the clean pass of every stage.
            output: ``t^N - s^N``, ``[batch, classes]``.
        """
        differences = [output]
        for (name, stage), clean in zip(self.network.stages()[:0:-1], passes[:0:-1], strict=True):
            if name in self.feedback:
                differences.append(self.difference_below(name, clean, differences[-1]))
            else:
                differences.append(input_gradient(stage, clean.inputs, differences[-1]))
        return differences[::-1]

    def difference_below(self, name: str, clean: StagePass, difference: Tensor) -> Tensor:
        """Return ``t^{n-1} - s^{n-1} = G^n(t^n) - G^n(s^n)``.

        Args:
            name: of stage n, which has a feedback operator.
            clean: its clean pass.
            difference: ``t^n - s^n``, like the stage's output.
        """
        mirror = cast(Mirror, self.feedback[name])
        return mirror.difference(clean.output.detach(), difference, clean.switches)

    @torch.no_grad()
    def symmetrize_feedback(self) -> None:
        """Copy every forward weight into its feedback weight, ``G^n = (F^n)^T``: a copy, never the same tensor."""
        for _, stage, mirror in self.mirrored_stages():
            for forward, feedback in mirror.pairs(stage):
                feedback.copy_(forward)

    def feedback_angles(self) -> dict[str, float]:
        """Return degrees between each stage's forward and feedback weights, by name of stage."""
        pairs = {name: zip(*mirror.pairs(stage), strict=True) for name, stage, mirror in self.mirrored_stages()}
        return {name: float(angle_degrees(*(flatten_all(side) for side in sides))) for name, sides in pairs.items()}
