"""Analytic feedback: the feedback weights that L-DRL's training ends at, set rather than learned."""

from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from bioprop.algorithms.target_algorithm import TargetAlgorithm
from bioprop.networks.mirrors import build_mirror
from bioprop.networks.network import Network
from bioprop.networks.stages import StagePass


class AnalyticFeedback(TargetAlgorithm):
    """Difference targets through the minimiser of the Jacobian matching loss (after Bao et al., 2024).

    That minimiser is ``J_G = J_F^T`` (`LDRL`), so every feedback operator is the exact mirror with a copy of the
    forward weight, ``V = W``, made anew before every batch. It reads ``W``: a control for the methods that learn
    feedback, which shows what perfect feedback gives with targets of size ``beta``. As ``beta -> 0`` it is
    backpropagation. Ours is the form of the operator; of the paper only the abstract could be read.

    Args:
        network: the forward network: a chain of stages that have mirrors.
        beta: step of the output target along the gradient, above 0.
        optimizer: makes the optimizer of the forward weights.
        settings: the other arguments of `Algorithm`.

    Raises:
        UserError: if a hyperparameter is out of its range, or a stage has no mirror.
    """

    recordable = True

    def __init__(
        self,
        network: Network,
        beta: float = 0.05,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=1e-4),
        **settings: Any,
    ) -> None:
        super().__init__(network, beta, optimizer, **settings)
        for name, stage in network.stages()[1:]:
            self.feedback[name] = build_mirror(stage, "exact").requires_grad_(False)
        self.symmetrize_feedback()

    def _train_feedback(self, passes: Sequence[StagePass]) -> dict[str, Tensor]:
        """Phase 1: copy the forward weights."""
        self.symmetrize_feedback()
        return {}
