"""Whole training steps outside of Lightning."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from bioprop.algorithms import Algorithm


class Learner(NamedTuple):
    """Something that trains.

    Attributes:
        step: one whole training step on images and labels.
        weights: tensors that it moves.
    """

    step: Callable[[Tensor, Tensor], None]
    weights: list[nn.Parameter]


def algorithm_learner(algorithm: Algorithm) -> Learner:
    """Wrap the step of one of our algorithms: learn, hand the gradients over, step the forward weights."""
    (optimizer, *_), _ = algorithm.configure_optimizers()

    def step(images: Tensor, labels: Tensor) -> None:
        _, gradients = algorithm._learn(images, labels)
        forward = algorithm._average(gradients)
        for name, parameter in algorithm.network.named_parameters():
            parameter.grad = forward[name]
        optimizer.step()
        optimizer.zero_grad()

    return Learner(step, list(algorithm.parameters()))
