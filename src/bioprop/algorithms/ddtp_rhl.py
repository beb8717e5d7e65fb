"""DDTP-RHL: difference targets through a shared random hidden layer."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bioprop.algorithms.direct_difference_targets import DirectDifferenceTargets
from bioprop.functional.activations import ActivationName
from bioprop.networks.direct_feedback import RandomHiddenLayer, ReadOut
from bioprop.networks.network import Network
from bioprop.ranges import count


class DDTPRHL(DirectDifferenceTargets):
    """Direct difference target propagation with a random hidden layer (Meulemans et al., NeurIPS 2020).

    ``g_n(z) = rho(Q_n phi(z) + c_n)``: the output first spreads over ``phi(z) = tanh(A z + a)``, a wide layer that is
    fixed as drawn and shared by all stages, and each hidden stage reads that out with weights of its own. Targets are
    ``t^n = s^n + g_n(t^N) - g_n(s^N)``; ``Q_n`` and ``c_n`` descend the difference reconstruction loss
    ``1/sigma^2 mean_batch |g_n(f_{n->N}(s^n + sigma eps)) - g_n(s^N) - sigma eps|^2 + decay |Q_n|^2``. Unlike a linear
    map, ``g_n`` can have another slope for another output, so that the Jacobian it undoes may be the sample's own.

    In the authors' program the last hidden stage reads the output itself; here it reads the hidden layer like the
    others. Hyperparameters, schedule and further deviations: see `DifferenceReconstruction`.

    Args:
        network: the forward network, any chain of stages.
        hidden_units: width of the random layer, at least 1.
        readout_activation: ``rho``; tanh for networks of tanh, identity for read-outs that are linear.
        feedback_lr: learning rate of the feedback weights, which want less than others', as their inputs are many.
        settings: the other arguments of `DifferenceReconstruction`.

    Raises:
        UserError: if a hyperparameter is out of its range, or a list has the wrong length.
    """

    def __init__(
        self,
        network: Network,
        hidden_units: int = 1024,
        readout_activation: ActivationName = "tanh",
        feedback_lr: float | tuple[float, ...] = 1e-4,
        **settings: Any,
    ) -> None:
        self._hidden_units, self._readout_activation = count("hidden_units", hidden_units, 1), readout_activation
        super().__init__(network, feedback_lr=feedback_lr, **settings)
        self.hidden = RandomHiddenLayer(network.stages()[-1][1].output_shape[0], self._hidden_units)

    def make_feedback(self) -> Mapping[str, ReadOut]:
        """One read-out of the hidden layer for each hidden stage."""
        return {
            name: ReadOut(self._hidden_units, stage.output_shape, self._readout_activation, bias=True)
            for name, stage in self.network.stages()[:-1]
        }

    def features(self, outputs: Tensor) -> Tensor:
        """The random hidden layer, ``[batch, hidden_units]``."""
        hidden: Tensor = self.hidden(outputs)
        return hidden

    def feature_step(self, outputs: Tensor, step: Tensor) -> Tensor:
        """``phi(outputs + step) - phi(outputs)``."""
        return self.hidden.difference(outputs, step)
