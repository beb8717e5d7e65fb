"""DTP: difference target propagation; feedback weights learn to invert the forward pass (Lee et al., ECML 2015).

Stages ``s^n = tanh(W^n s^{n-1})``, n = 1..N, the last one linear. Feedback ``G^n(z) = tanh(V^{nT} z)``, n = 2..N-1. On
every batch:

1. Feedback, for each n: draw ``eps ~ N(0, sigma^2)`` and descend in V the error of reconstruction around s^{n-1},
       mean_batch |s^{n-1} + eps - G^n(F^n(s^{n-1} + eps))|^2.
2. Targets: the last hidden stage has its own from the gradient, ``t^{N-1} = s^{N-1} - beta dL/ds^{N-1}``; below,
   ``t^{n-1} = s^{n-1} + G^n(t^n) - G^n(s^n)``. The difference takes the error of reconstruction out again: without it
   (``t^{n-1} = G^n(t^n)``: target propagation) the targets lead nowhere where G is no exact inverse.
3. Forward: one step on ``sum_n mean_batch 1/2 |F^n(s^{n-1}) - t^n|^2``, every s^{n-1} and t^n held constant; the output
   stage takes the gradient of the loss itself.

An inverse is not a transpose: the update is not the gradient, and with many stages the angle between them is large.

    python -m examples.dtp
"""

from collections.abc import Callable

import torch
from torch import Tensor

from examples.common import WIDTHS, Result, draw, output_error, run_perceptron, step_weights, train


class DTP:
    """Weights, feedback weights and settings. ``V`` has the layout of W, ``[units, inputs]``."""

    def __init__(
        self,
        widths: tuple[int, ...] = WIDTHS,
        beta: float = 0.5,
        noise: float = 0.1,
        iterations: int = 1,
        feedback_lr: float = 1e-2,
        lr: float = 1e-3,
        difference: bool = True,
        normals: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> None:
        shapes = list(zip(widths[1:], widths[:-1], strict=True))
        self.weights = [draw(*shape).requires_grad_() for shape in shapes]
        self.feedback = {n: draw(*shapes[n]).requires_grad_() for n in range(1, len(shapes) - 1)}
        self.beta, self.noise, self.iterations, self.difference = beta, noise, iterations, difference
        self.normals = normals
        self.optimizer = torch.optim.Adam(self.weights, lr=lr)
        self.feedback_optimizer = torch.optim.SGD(self.feedback.values(), lr=feedback_lr, momentum=0.9)

    def logits(self, images: Tensor) -> Tensor:
        """Return ``s^N``."""
        return run_perceptron(images, self.weights)[-1]

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train the feedback weights, then the forward weights."""
        self.train_feedback(images)
        step_weights(self.optimizer, self.weights, self.gradients(images, labels))

    def train_feedback(self, images: Tensor) -> None:
        """Phase 1. ``self.weights[n]`` and ``self.feedback[n]`` lead from ``states[n]`` and back to it."""
        with torch.no_grad():
            states = run_perceptron(images, self.weights)
        for n, V in self.feedback.items():
            for _ in range(self.iterations):
                noisy = states[n] + self.noise * self.normals(states[n])
                output = torch.tanh(noisy @ self.weights[n].detach().t())
                loss = (noisy - torch.tanh(output @ V)).square().sum() / len(images)
                self.feedback_optimizer.zero_grad()  # the other stages stay as they are
                (V.grad,) = torch.autograd.grad(loss, V)
                self.feedback_optimizer.step()

    @torch.no_grad()
    def targets(self, states: list[Tensor], labels: Tensor) -> list[Tensor]:
        """Phase 2: return ``t^1 .. t^{N-1}``."""
        error = output_error(states[-1], labels) @ self.weights[-1]
        targets = [states[-2] - self.beta * error]
        for n in reversed(self.feedback):
            back = torch.tanh(targets[0] @ self.feedback[n])
            if self.difference:
                back = states[n] + back - torch.tanh(states[n + 1] @ self.feedback[n])
            targets.insert(0, back)
        return targets

    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Phase 3: the gradient of the local losses over beta, and that of the loss for the output stage."""
        with torch.no_grad():
            states = run_perceptron(images, self.weights)
        stages = zip(states, self.weights, self.targets(states, labels), strict=False)
        losses = [0.5 * (torch.tanh(s @ W.t()) - t).square().sum() / len(images) for s, W, t in stages]
        hidden = [gradient / self.beta for gradient in torch.autograd.grad(losses, self.weights[:-1])]
        return [*hidden, output_error(states[-1], labels).t() @ states[-2] / len(images)]


def main(epochs: int = 10) -> Result:
    """Train, and print the result."""
    torch.manual_seed(0)
    return train(DTP(), epochs)


if __name__ == "__main__":
    main()
