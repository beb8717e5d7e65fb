"""DDTP-linear: difference targets through one linear map from the output to each hidden stage."""

from collections.abc import Mapping

from bioprop.algorithms.direct_difference_targets import DirectDifferenceTargets
from bioprop.networks.direct_feedback import ReadOut


class DDTPLinear(DirectDifferenceTargets):
    """Direct difference target propagation with linear feedback (Meulemans et al., NeurIPS 2020).

    Hidden targets are ``t^n = s^n + Q_n (t^N - s^N)``. On every batch and for each hidden stage: draw noise ``eps``,
    run the stages above on ``s^n + sigma eps``, and descend the difference reconstruction loss
    ``1/sigma^2 mean_batch |Q_n (f_{n->N}(s^n + sigma eps) - s^N) - sigma eps|^2 + decay |Q_n|^2`` in ``Q_n``.

    Its minimiser is a pseudo-inverse of the Jacobian ``J = ds^N/ds^n`` damped by ``decay``, so that targets lie along
    the Gauss-Newton direction ``J^T (J J^T + decay I)^-1 e``, not along the gradient's ``J^T e``. As ``Q_n`` is one
    matrix for all samples, so is the Jacobian it undoes, some mean of theirs.

    The maps have no bias, which would cancel everywhere. Hyperparameters, schedule and deviations from the authors'
    program: see `DifferenceReconstruction`. Feedback operators are counted by the hidden stages they lead to.
    """

    def make_feedback(self) -> Mapping[str, ReadOut]:
        """One linear map for each hidden stage, from the output to its activations."""
        *hidden, (_, output) = self.network.stages()
        return {name: ReadOut(output.output_shape[0], stage.output_shape) for name, stage in hidden}
