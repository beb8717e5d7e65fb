"""DDTP-linear: feedback straight from the output learns a pseudo-inverse (Meulemans et al., NeurIPS 2020).

Stages ``s^n = tanh(W^n s^{n-1})``, n = 1..N, the last one linear. A matrix ``Q^n`` leads from the output to each hidden
stage n. On every batch:

1. Feedback, for each hidden n: draw ``eps ~ N(0, 1)``, run the stages above n on ``s^n + sigma eps``, which gives z,
   and descend in Q the difference reconstruction loss (DRL)
       1/sigma^2 mean_batch |Q^n (z - s^N) - sigma eps|^2 + decay |Q^n|^2.
   Its minimiser is ``J^T (J J^T + decay I)^-1`` with ``J = ds^N/ds^n``, both means over the samples: a damped
   pseudo-inverse, where L-DRL (`ldrl.py`) has the transpose.
2. Targets: ``t^N = s^N - beta dL/ds^N`` and ``t^n = s^n + Q^n (t^N - s^N)``. They aim at a Gauss-Newton step of the
   activations, not at the gradient.
3. Forward: one step on ``sum_n mean_batch 1/2 |F^n(s^{n-1}) - t^n|^2``, every s^{n-1} and t^n held constant.

Others of the family: DTP-DRL sends targets from stage to stage, trained by the same loss; DDTP-RHL puts a fixed random
hidden layer before ``Q``; DDTP-control reconstructs ``s^n + sigma eps`` itself from z, without the difference.

    python -m examples.ddtp
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from examples.common import WIDTHS, Result, draw, output_error, run_perceptron, step_weights, train


class DDTPLinear:
    """Weights, feedback matrices ``Q^n`` ``[units, classes]`` and settings."""

    def __init__(
        self,
        widths: tuple[int, ...] = WIDTHS,
        beta: float = 0.06,
        noise: float = 0.1,
        decay: float = 1e-4,
        feedback_lr: float = 1e-3,
        lr: float = 1e-3,
        normals: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> None:
        self.weights = [draw(*shape).requires_grad_() for shape in zip(widths[1:], widths[:-1], strict=True)]
        self.feedback = [
            nn.init.xavier_normal_(torch.empty(units, widths[-1])).requires_grad_() for units in widths[1:-1]
        ]
        self.beta, self.noise, self.decay, self.normals = beta, noise, decay, normals
        self.optimizer = torch.optim.Adam(self.weights, lr=lr)
        self.feedback_optimizer = torch.optim.Adam(self.feedback, lr=feedback_lr)

    def logits(self, images: Tensor) -> Tensor:
        """Return ``s^N``."""
        return run_perceptron(images, self.weights)[-1]

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train the feedback weights, then the forward weights."""
        self.train_feedback(images)
        step_weights(self.optimizer, self.weights, self.gradients(images, labels))

    def train_feedback(self, images: Tensor) -> None:
        """Phase 1: one step for all hidden stages."""
        with torch.no_grad():
            states = run_perceptron(images, self.weights)
        loss = torch.zeros(())
        for n, Q in enumerate(self.feedback, start=1):
            noise = self.noise * self.normals(states[n])
            with torch.no_grad():
                noisy = run_perceptron(states[n] + noise, self.weights[n:])[-1]
            residual = (noisy - states[-1]) @ Q.t() - noise
            loss = loss + residual.square().sum() / len(images) / self.noise**2 + self.decay * Q.square().sum()
        step_weights(self.feedback_optimizer, self.feedback, list(torch.autograd.grad(loss, self.feedback)))

    @torch.no_grad()
    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Phases 2 and 3: the gradient of the local losses over beta, by hand: their errors are ``s^n - t^n``."""
        states = run_perceptron(images, self.weights)
        step = -self.beta * output_error(states[-1], labels)  # t^N - s^N
        errors = [-(step @ Q.t()) * (1 - s**2) for Q, s in zip(self.feedback, states[1:-1], strict=True)]
        scale = self.beta * len(images)
        return [error.t() @ below / scale for error, below in zip([*errors, -step], states, strict=False)]


def main(epochs: int = 10) -> Result:
    """Train, and print the result."""
    torch.manual_seed(0)
    return train(DDTPLinear(), epochs)


if __name__ == "__main__":
    main()
