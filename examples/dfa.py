"""DFA: direct feedback alignment; the error of the output reaches every stage at once (Nokland, NeurIPS 2016).

Stages ``s^n = tanh(a^n)``, ``a^n = W^n s^{n-1}``, n = 1..N, the last one linear. With ``e = dL/ds^N`` of each sample,

    dW^N = mean_batch e s^{N-1 T},    dW^n = mean_batch (B^n e o tanh'(a^n)) s^{n-1 T}   for n < N,

where ``B^n`` is fixed and random: no error passes from stage to stage, so that all stages can learn at once.
In feedback alignment (`feedback_alignment.py`) the error goes down stage by stage. W comes to align with B here, too.

Direct random target projection (Frenkel, Lefebvre & Bol, 2021) has ``-onehot(y)`` in place of e at the hidden stages:
the part of it that is known before the output is.

    python -m examples.dfa
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common import WIDTHS, Result, draw, output_error, run_perceptron, step_weights, train


class DFA:
    """Weights, and for each hidden stage ``B^T``, ``[classes, units]``."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, lr: float = 0.02, projects_labels: bool = False) -> None:
        self.projects_labels = projects_labels
        self.weights = [draw(*shape).requires_grad_() for shape in zip(widths[1:], widths[:-1], strict=True)]
        self.feedback = [torch.randn(widths[-1], units) * units**-0.5 for units in widths[1:-1]]
        self.optimizer = torch.optim.SGD(self.weights, lr=lr, momentum=0.9)

    def logits(self, images: Tensor) -> Tensor:
        """Return ``s^N``."""
        return run_perceptron(images, self.weights)[-1]

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train the forward weights: there is nothing else."""
        step_weights(self.optimizer, self.weights, self.gradients(images, labels))

    @torch.no_grad()
    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return ``dW^1 .. dW^N``."""
        states = run_perceptron(images, self.weights)
        error = output_error(states[-1], labels) / len(images)
        known = -F.one_hot(labels, error.shape[1]).to(error) / len(images) if self.projects_labels else error
        errors = [known @ B * (1 - s**2) for B, s in zip(self.feedback, states[1:-1], strict=True)]
        return [each.t() @ below for each, below in zip([*errors, error], states, strict=False)]


def main(epochs: int = 10) -> Result:
    """Train, and print the result."""
    torch.manual_seed(0)
    return train(DFA(), epochs)


if __name__ == "__main__":
    main()
