"""A training step of the DRL family written once more, from ALGORITHMS.md and with torch autograd alone.

Nothing of `bioprop` is used: weights are plain tensors, targets are targets (not differences), every loss is formed as
its formula stands. Noise is replayed from a recording.
"""

from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.algorithms.plain import unpool

Weights = list[Tensor]


class Settings(NamedTuple):
    """Hyperparameters; lists for the hidden stages."""

    beta: float
    sigma: list[float]
    decay: list[float]
    feedback_lr: list[float]
    lr: float
    iterations: int


class PlainReconstruction:
    """Stages conv 5x5 + tanh + max-pool 3/2/1 (weights of four dimensions) or linear + tanh; the last without tanh.

    Args:
        method: ``drl``, ``linear``, ``rhl`` or ``control``.
        forward: (weight, bias) of every stage.
        feedback: (weight, bias if any) for every hidden stage.
        hidden: (weight, bias) of the random hidden layer, for ``rhl``.
        settings: hyperparameters.
    """

    def __init__(
        self, method: str, forward: list[Weights], feedback: list[Weights], hidden: Weights, settings: Settings
    ) -> None:
        self.method, self.forward_weights, self.feedback, self.hidden = method, forward, feedback, hidden
        self.settings = settings
        for tensor in chain(*forward, *feedback):
            tensor.requires_grad_()
        self.optimizer = torch.optim.Adam(chain(*forward), lr=settings.lr)
        self.feedback_optimizers = [
            torch.optim.Adam(weights, lr=lr) for weights, lr in zip(feedback, settings.feedback_lr, strict=True)
        ]

    def training_step(self, images: Tensor, labels: Tensor, noise: Iterator[Tensor]) -> None:
        for _ in range(self.settings.iterations):
            self.feedback_iteration(images, noise)
        self.optimizer.zero_grad()
        self.local_loss(images, labels).backward()
        self.optimizer.step()

    # -- forward -----------------------------------------------------------------------------------------------------

    def stage(self, n: int, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """``F^n`` for n = 0 .. N-1."""
        weight, bias = self.forward_weights[n]
        if weight.dim() == 4:
            return F.max_pool2d(torch.tanh(F.conv2d(inputs, weight, bias, padding=2)), 3, 2, 1, return_indices=True)
        affine = inputs.flatten(1) @ weight.t() + bias
        return (affine if n == len(self.forward_weights) - 1 else torch.tanh(affine)), None

    @torch.no_grad()
    def run(self, images: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Outputs and switches of all stages."""
        states, switches = [], []
        for n in range(len(self.forward_weights)):
            images, chosen = self.stage(n, images)
            states.append(images)
            switches.append(chosen)
        return states, switches

    @torch.no_grad()
    def run_above(self, n: int, state: Tensor) -> Tensor:
        for above in range(n + 1, len(self.forward_weights)):
            state, _ = self.stage(above, state)
        return state

    # -- feedback ----------------------------------------------------------------------------------------------------

    def direct(self, n: int, output: Tensor, like: Tensor) -> Tensor:
        """``g_n(z)``."""
        if self.method == "rhl":
            weight, bias = self.feedback[n]
            hidden = torch.tanh(output @ self.hidden[0].t() + self.hidden[1])
            return torch.tanh(hidden @ weight.t() + bias).view_as(like)
        weight, *bias = self.feedback[n]
        return (output @ weight.t() + sum(bias)).view_as(like)

    def decode(self, n: int, value: Tensor, like: Tensor, switches: Tensor | None, frozen: bool) -> Tensor:
        """``G`` of stage n + 1, from its output to its input."""
        weight, bias = (tensor.detach() if frozen else tensor for tensor in self.feedback[n])
        if switches is None:
            return torch.tanh(value @ weight + bias).view_as(like)
        maps = unpool(value, switches, (like.shape[2], like.shape[3]), adding=True)
        return torch.tanh(F.conv_transpose2d(maps, weight, bias, padding=2))

    def decoded(self, n: int, output: Tensor, states: list[Tensor], switches: list[Tensor | None]) -> Tensor:
        """Send a value of the output back to stage n, layer by layer, with the difference correction of each.

        Only the last layer's feedback weights get a gradient.
        """
        value = output
        for below in range(len(states) - 2, n - 1, -1):
            arguments = (states[below], switches[below + 1], below > n)
            corrected = self.decode(below, states[below + 1], *arguments)
            value = self.decode(below, value, *arguments) + states[below] - corrected
        return value

    def target(self, n: int, output: Tensor, states: list[Tensor], switches: list[Tensor | None]) -> Tensor:
        """``g^diff_n``."""
        if self.method == "drl":
            return self.decoded(n, output, states, switches)
        return self.direct(n, output, states[n]) + states[n] - self.direct(n, states[-1], states[n])

    def feedback_iteration(self, images: Tensor, noise: Iterator[Tensor]) -> None:
        states, switches = self.run(images)
        losses = []
        for n in range(len(states) - 1):
            sigma, decay = self.settings.sigma[n], self.settings.decay[n]
            noisy = states[n] + sigma * next(noise)
            output = self.run_above(n, noisy)
            if self.method == "control":
                loss = ((self.direct(n, output, noisy) - noisy) ** 2).sum() / len(images)
            else:
                loss = ((self.target(n, output, states, switches) - noisy) ** 2).sum() / len(images) / sigma**2
            losses.append(loss + decay * sum((tensor**2).sum() for tensor in self.feedback[n]))
        for optimizer in self.feedback_optimizers:
            optimizer.zero_grad()
        sum(losses).backward()
        for optimizer in self.feedback_optimizers:
            optimizer.step()

    # -- targets -----------------------------------------------------------------------------------------------------

    def local_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """``sum_n mean_batch 1/2 |F^n(s^{n-1}) - t^n|^2`` with detached inputs and targets."""
        states, switches = self.run(images)
        onehot = torch.eye(states[-1].shape[1], dtype=images.dtype)[labels]
        targets = [states[-1] - self.settings.beta * (states[-1].softmax(1) - onehot)]
        with torch.no_grad():
            targets = [self.target(n, targets[-1], states, switches) for n in range(len(states) - 1)] + targets
        loss = images.new_zeros(())
        for n, (inputs, target) in enumerate(zip([images, *states[:-1]], targets, strict=True)):
            loss = loss + 0.5 * ((self.stage(n, inputs)[0] - target) ** 2).sum() / len(images)
        return loss
