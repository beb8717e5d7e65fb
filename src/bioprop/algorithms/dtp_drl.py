"""DTP-DRL: layer-wise difference targets, with feedback trained through all stages above."""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import cast

from torch import Tensor

from bioprop.algorithms.difference_reconstruction import DifferenceReconstruction, ReconstructionObjective
from bioprop.errors import UserError
from bioprop.feedback.losses import FeedbackGradient
from bioprop.feedback.reconstruction import difference_reconstruction_gradient
from bioprop.networks.outer_mirrors import OuterMirror, activation_of, build_outer_mirror
from bioprop.networks.stages import StagePass


class DTPDRL(DifferenceReconstruction):
    """Difference target propagation with the difference reconstruction loss (Meulemans et al., NeurIPS 2020).

    Targets as in DTP: ``t^{n-1} = s^{n-1} + G^n(t^n) - G^n(s^n)`` with ``G^n(y) = rho(Q_n y + c_n)``, ``rho`` being the
    activation of stage n-1 (tanh in a tanh network, as published). The noisy output ``f_{n-1->N}(s^{n-1} + sigma eps)``
    is sent back in the same way, as if it were a target, through every ``G`` from N down to n, and ``G^n`` descends
    ``1/sigma^2 mean_batch |what arrives - (s^{n-1} + sigma eps)|^2 + decay |Q_n|^2``. Only ``G^n`` gets a gradient from
    this loss; those above it serve as they are. The composed feedback, not each ``G`` alone, thereby learns to undo all
    stages above, which makes the targets Gauss-Newton's.

    Any chain of linear and conv stages; ``G`` of a conv stage is the transposed convolution of the unpooled maps, with
    the switches of the clean pass. `symmetrize_feedback` copies the forward weights into ``Q_n``, and `feedback_angles`
    are between the two. Hyperparameters, schedule and deviations from the authors' program: see
    `DifferenceReconstruction`. Feedback operators are counted by the stages n >= 2 they lead back through.
    """

    def make_feedback(self) -> Mapping[str, OuterMirror]:
        """One layer-wise operator for each stage but the first, drawn by Xavier's normal rule."""
        feedback: dict[str, OuterMirror] = {}
        for (_, below), (name, stage) in pairwise(self.network.stages()):
            try:
                feedback[name] = build_outer_mirror(stage, activation_of(below))
            except UserError as error:
                raise UserError(f"{error}, or use DDTPLinear, which takes stages of any kind") from error
            feedback[name].draw_by_xavier()
        return feedback

    def feedback_objectives(self, passes: Sequence[StagePass]) -> list[ReconstructionObjective]:
        """The difference reconstruction loss of every operator, through all those above it."""
        return [partial(self._objective, index, name, passes) for index, name in enumerate(self.feedback)]

    def _objective(
        self, index: int, name: str, passes: Sequence[StagePass], noisy_output: Tensor, noise: Tensor
    ) -> FeedbackGradient:
        mirror, clean = self.mirrors()[index], passes[index + 1]
        step = self._send_back(passes, noisy_output - passes[-1].output.detach(), down_to=index + 1)[-1]
        state = clean.output.detach()
        decode = partial(mirror, switches=clean.switches)
        parameters = dict(mirror.named_parameters())
        sigma, decay = self.noise[name], self.feedback_decay[name]
        return difference_reconstruction_gradient(decode, parameters, state + step, state, noise, sigma, decay)

    def _send_back(self, passes: Sequence[StagePass], output: Tensor, down_to: int = 0) -> list[Tensor]:
        """Send ``t^N - s^N`` back as ``t^n - s^n``, from the output to the stage at this index, counted from 0."""
        differences = [output]
        for mirror, clean in list(zip(self.mirrors(), passes[1:], strict=True))[down_to:][::-1]:
            differences.append(mirror.difference(clean.output.detach(), differences[-1], clean.switches))
        return differences

    def mirrors(self) -> list[OuterMirror]:
        """Return the feedback operators, from the input to the output."""
        return cast(list[OuterMirror], list(self.feedback.values()))
