"""Direct Kolen-Pollack: direct feedback alignment whose matrices learn."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from bioprop.algorithms.direct_feedback_alignment import DirectFeedbackAlignment
from bioprop.distributed import mean_over_processes
from bioprop.networks.network import Network


class DirectKolenPollack(DirectFeedbackAlignment):
    """Direct feedback alignment with matrices that take the steps of output weights (Webster, Choi & Ahn, 2021).

    In every batch ``B^n`` steps along ``mean_batch e^T s^n``, the gradient that an output weight would have that reads
    stage n. Of the last hidden stage this is the gradient of the output weight itself, so that with equal optimizers
    ``B - W`` shrinks by their weight decay and nothing else moves it (Kolen & Pollack, 1994). The others come to hold
    what a read-out from their stage would. Errors and targets are those of `DirectFeedbackAlignment`.

    Args:
        network: the forward network: a chain of stages.
        feedback_optimizer: makes the optimizer of the matrices; by default that of the authors' program. It takes small
            steps: ``e^T s^n`` sums over as many units as the stage has.
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `DirectFeedbackAlignment`.

    Raises:
        UserError: if the network is not a chain of stages.
    """

    def __init__(
        self,
        network: Network,
        feedback_optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-4, weight_decay=1e-6),
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        **settings: Any,
    ) -> None:
        super().__init__(network, optimizer=optimizer, **settings)
        self._make_feedback_optimizer = feedback_optimizer
        self._feedback_optimizer: torch.optim.Optimizer | None = None
        self._increments: dict[str, Tensor] = {}

    def observe(self, outputs: Sequence[Tensor], error: Tensor) -> None:
        """Form the gradients of the matrices, ``e^T s^n / batch``."""
        pairs = zip(self.backward_weights.items(), outputs, strict=True)
        self._increments = {name: (error.t() @ output.flatten(1)).to(matrix) for (name, matrix), output in pairs}

    def _step_forward_weights(self, gradients: dict[str, Tensor]) -> None:
        super()._step_forward_weights(gradients)
        if self._feedback_optimizer is not None:
            found = mean_over_processes(list(self._increments.values()))
            steps = self._direction(dict(zip(self._increments, found, strict=True)))
            for name, matrix in self.backward_weights.items():
                matrix.grad = steps[name]
            self._feedback_optimizer.step()
            self._feedback_optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        """Add the matrices' optimizer, and a schedule like the forward one's, behind those of the network."""
        made = super().configure_optimizers()
        if not len(self.backward_weights):
            return made
        self._feedback_optimizer = self._make_feedback_optimizer(self.backward_weights.values())
        return self._with_feedback_optimizer(self._feedback_optimizer, *made)
