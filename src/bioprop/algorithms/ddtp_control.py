"""DDTP-control: DDTP-linear without the difference correction, to show what that is for."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import cast

from torch import Tensor

from bioprop.algorithms.base import Algorithm
from bioprop.algorithms.ddtp_linear import DDTPLinear
from bioprop.algorithms.difference_reconstruction import ReconstructionObjective
from bioprop.feedback.losses import FeedbackGradient
from bioprop.feedback.reconstruction import plain_reconstruction_gradient
from bioprop.networks.direct_feedback import ReadOut
from bioprop.networks.stages import StagePass


class DDTPControl(DDTPLinear):
    """The control of Meulemans et al. (NeurIPS 2020): DDTP-linear trained by plain reconstruction.

    Targets as in DDTP-linear. The feedback loss is
    ``mean_batch |Q_n f_{n->N}(s^n + sigma eps) + c_n - (s^n + sigma eps)|^2 + decay |Q_n|^2``: no difference correction
    and no ``1/sigma^2``. Where the stages above cannot be inverted, ``Q_n`` learns to predict the activations from the
    output over the data, rather than to undo small steps: its targets leave the Gauss-Newton direction.

    The maps have a bias, which this loss trains; it cancels in the targets. Hyperparameters, schedule and deviations
    from the authors' program: see `DifferenceReconstruction`.
    """

    precisions = Algorithm.precisions  # its loss subtracts no passes

    def make_feedback(self) -> Mapping[str, ReadOut]:
        """One linear map with a bias for each hidden stage, from the output to its activations."""
        *hidden, (_, output) = self.network.stages()
        return {name: ReadOut(output.output_shape[0], stage.output_shape, bias=True) for name, stage in hidden}

    def feedback_objectives(self, passes: Sequence[StagePass]) -> list[ReconstructionObjective]:
        """The plain reconstruction loss of every hidden stage."""
        return [
            partial(self._plain_objective, name, above.inputs)
            for name, above in zip(self.feedback, passes[1:], strict=True)
        ]

    def _plain_objective(self, name: str, states: Tensor, noisy_output: Tensor, noise: Tensor) -> FeedbackGradient:
        read_out = cast(ReadOut, self.feedback[name])
        parameters = dict(read_out.named_parameters())
        decay = self.feedback_decay[name]
        return plain_reconstruction_gradient(read_out, parameters, noisy_output, states + noise, decay)
