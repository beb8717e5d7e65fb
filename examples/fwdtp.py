"""FW-DTP: difference target propagation with feedback weights that are never trained (Shibuya et al., AAAI 2023).

Stages ``s^n = tanh(W^n s^{n-1})``, the last one linear; ``G^n(z) = tanh(B^n z)``, n = 2..N, with ``B^n`` as drawn. On
every batch: ``t^N = s^N - beta dL/ds^N``, ``t^{n-1} = s^{n-1} + G^n(t^n) - G^n(s^n)``, and one step on
``sum_n mean_batch 1/2 |F^n(s^{n-1}) - t^n|^2``. Compare `dtp.py`: the training of feedback is gone.

The paper draws uniformly from +-1e-3 and standardises each stage over the batch. Without that, orthogonal B keep the
targets from shrinking on their way down.

    python -m examples.fwdtp
"""

import torch
from torch import Tensor, nn

from examples.common import WIDTHS, Result, draw, output_error, run_perceptron, step_weights, train


class FWDTP:
    """Weights, fixed feedback and settings; ``V = B^T`` has the layout of W, ``[units, inputs]``."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, beta: float = 0.04, lr: float = 1e-3) -> None:
        shapes = list(zip(widths[1:], widths[:-1], strict=True))
        self.weights = [draw(*shape).requires_grad_() for shape in shapes]
        self.feedback = {n: nn.init.orthogonal_(torch.empty(shapes[n])) for n in range(1, len(shapes))}
        self.beta = beta
        self.optimizer = torch.optim.Adam(self.weights, lr=lr)

    def logits(self, images: Tensor) -> Tensor:
        """Return ``s^N``."""
        return run_perceptron(images, self.weights)[-1]

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train the forward weights: there is nothing else."""
        step_weights(self.optimizer, self.weights, self.gradients(images, labels))

    @torch.no_grad()
    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return the gradient of the local losses over beta, by hand: their errors are ``s^n - t^n``."""
        states = run_perceptron(images, self.weights)
        targets = [states[-1] - self.beta * output_error(states[-1], labels)]
        for n in reversed(self.feedback):
            back, V = states[n], self.feedback[n]
            targets.insert(0, back + torch.tanh(targets[0] @ V) - torch.tanh(states[n + 1] @ V))
        errors = [(s - t) * (1 - s**2) for s, t in zip(states[1:-1], targets, strict=False)]
        errors.append(states[-1] - targets[-1])
        scale = self.beta * len(images)
        return [error.t() @ below / scale for error, below in zip(errors, states, strict=False)]


def main(epochs: int = 10) -> Result:
    """Train, and print the result."""
    torch.manual_seed(0)
    return train(FWDTP(), epochs)


if __name__ == "__main__":
    main()
