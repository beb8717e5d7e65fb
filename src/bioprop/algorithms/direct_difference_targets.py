"""Difference targets straight from the output: what DDTP-linear, DDTP-RHL and DDTP-control share."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from bioprop.algorithms.difference_reconstruction import DifferenceReconstruction, ReconstructionObjective
from bioprop.feedback.losses import FeedbackGradient
from bioprop.feedback.reconstruction import difference_reconstruction_gradient
from bioprop.networks.direct_feedback import ReadOut
from bioprop.networks.mirrors import Mirror
from bioprop.networks.stages import Stage, StagePass


class DirectDifferenceTargets(DifferenceReconstruction):
    """Hidden targets ``t^n = s^n + g_n(t^N) - g_n(s^N)``: one feedback map from the output to each hidden stage.

    Nothing is sent from stage to stage, so any chain of stages will do. ``g_n`` stands for all stages above n and is no
    forward weight's counterpart: `symmetrize_feedback` does nothing, and `feedback_angles` is empty.
    """

    @abstractmethod
    def make_feedback(self) -> Mapping[str, ReadOut]:
        """Draw one map for each hidden stage, from `features` of the output to its activations, by name of stage."""

    def features(self, outputs: Tensor) -> Tensor:
        """Compute what the maps of all stages are applied to: the output itself unless a method says otherwise."""
        return outputs

    def feature_step(self, outputs: Tensor, step: Tensor) -> Tensor:
        """``features(outputs + step) - features(outputs)``."""
        return step

    def feedback_objectives(self, passes: Sequence[StagePass]) -> list[ReconstructionObjective]:
        """The difference reconstruction loss of every hidden stage."""
        with torch.no_grad():
            clean = self.features(passes[-1].output)
        return [partial(self._objective, name, clean) for name in self.feedback]

    def _objective(self, name: str, clean: Tensor, noisy_output: Tensor, noise: Tensor) -> FeedbackGradient:
        read_out = cast(ReadOut, self.feedback[name])
        parameters = dict(read_out.named_parameters())
        noisy, sigma, decay = self.features(noisy_output), self.noise[name], self.feedback_decay[name]
        return difference_reconstruction_gradient(read_out, parameters, noisy, clean, noise, sigma, decay)

    def target_differences(self, passes: Sequence[StagePass], output: Tensor) -> list[Tensor]:
        """Return ``t^n - s^n`` for every stage, from the input to the output, given the output's.

        Args:
            passes: the clean pass of every stage.
            output: ``t^N - s^N``, ``[batch, classes]``.
        """
        clean = passes[-1].output.detach()
        features, step = self.features(clean), self.feature_step(clean, output)
        return [*(read_out.difference(features, step) for read_out in self.read_outs()), output]

    def mirrored_stages(self) -> list[tuple[str, Stage, Mirror]]:
        """Return none: no feedback map is the counterpart of a single stage."""
        return []

    def read_outs(self) -> list[ReadOut]:
        """Return the feedback maps, from the input to the output."""
        return cast(list[ReadOut], list(self.feedback.values()))
