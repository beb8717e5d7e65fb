"""Backpropagation: the baseline of every comparison."""

from typing import Any

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor

from bioprop.algorithms.base import Algorithm, Gradients
from bioprop.functional.gradients import backprop_gradients
from bioprop.networks.network import AnyModule


class Backprop(Algorithm):
    """Backpropagation of the mean loss (Rumelhart, Hinton & Williams, 1986).

    Args:
        network: the forward network: any torch module from images to logits.
        optimizer: makes the optimizer of the weights.
        settings: the other arguments of `Algorithm`.
    """

    recordable = True

    def __init__(
        self,
        network: AnyModule,
        optimizer: OptimizerCallable = lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4),
        **settings: Any,
    ) -> None:
        super().__init__(network, optimizer, **settings)

    def _gradients(self, images: Tensor, labels: Tensor) -> Gradients:
        return Gradients(*backprop_gradients(self.network, images, labels, self.output_loss.mean))
