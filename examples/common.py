"""What the pages share: the digits, a perceptron, the loop over batches, and the angle to the gradient of BP."""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

#: Units of each stage of the perceptron, from the 8x8 pixels to the classes.
WIDTHS = (64, 64, 64, 64, 10)


class Method(Protocol):
    """A learning rule and the weights that it trains, from the input to the output; no page has biases."""

    weights: list[Tensor]

    def logits(self, images: Tensor) -> Tensor:
        """Return ``[batch, classes]``."""

    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return what the optimizer is handed for each weight, in units of the gradient of BP; change nothing."""

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train on one batch."""


class Result(NamedTuple):
    """Test accuracy in percent, and for each hidden stage the angle between update and gradient of BP in degrees."""

    accuracy: float
    angles: list[float]


def draw(*shape: int) -> Tensor:
    """Draw a weight ``[units, ...]``, uniform in +-1/sqrt(fan_in)."""
    return (2 * torch.rand(shape) - 1) / math.sqrt(math.prod(shape[1:]))


def run_perceptron(images: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """Return ``s^0 .. s^N`` of a perceptron: tanh at the hidden stages, nothing at the output."""
    states = [images.flatten(1)]
    for weight in weights[:-1]:
        states.append(torch.tanh(states[-1] @ weight.t()))
    return [*states, states[-1] @ weights[-1].t()]


def output_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each sample's cross-entropy: ``softmax(s^N) - onehot(y)``."""
    return logits.softmax(1) - F.one_hot(labels, logits.shape[1])


def angle(first: Tensor, second: Tensor) -> float:
    """Degrees between two tensors."""
    return math.degrees(math.acos(F.cosine_similarity(first.flatten(), second.flatten(), 0).clamp(-1, 1)))


def train(
    method: Method, epochs: int, batch_size: int = 64, loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
) -> Result:
    """Train on 1,438 digits of 8x8 pixels and test on 359; print the result."""
    digits, dtype = load_digits(), method.weights[0].dtype
    images = torch.tensor(digits.images, dtype=dtype).unsqueeze(1)
    images, labels = (images - images.mean()) / images.std(), torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    held, rest = order[:359], order[359:]
    for _ in range(epochs):
        for rows in rest[torch.randperm(len(rest))].split(batch_size)[: len(rest) // batch_size]:
            method.step(images[rows], labels[rows])
    accuracy = 100 * (method.logits(images[held]).argmax(1) == labels[held]).double().mean().item()
    shown = images[rest[:256]], labels[rest[:256]]
    exact = torch.autograd.grad(loss(method.logits(shown[0]), shown[1]), method.weights)
    angles = [angle(*pair) for pair in zip(method.gradients(*shown), exact, strict=True)][:-1]
    degrees = ", ".join(f"{each:.1f}" for each in angles)
    print(f"test accuracy {accuracy:.1f} %, angle to BP of each hidden stage {degrees} degrees")  # noqa: T201
    return Result(accuracy, angles)


def step_weights(optimizer: torch.optim.Optimizer, weights: list[Tensor], gradients: list[Tensor]) -> None:
    """Hand gradients over to an optimizer of the same weights."""
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient
    optimizer.step()
