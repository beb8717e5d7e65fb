"""GAIT-prop: exact inverses and a small step of the target give the gradient (Ahmad et al., NeurIPS 2020).

Stages ``y_l = f(W_l y_{l-1})``, l = 1..L, with square W and leaky ReLU f of slope 0.1, so that each has an inverse; the
first units of the last stage are the outputs. There are no feedback weights. On every batch, with
``t_L = y_L - dL/dy_L`` (the label itself for the squared error) and a small gamma:

    t_{l-1} = inv_l( (1 - gamma f'(a_l)^2) o y_l + gamma f'(a_l)^2 o t_l )
    dW_l = mean_batch gamma^{-(L-l)} ((y_l - t_l) o f'(a_l)) y_{l-1}^T

With orthogonal W the inverse is the transpose, and for gamma -> 0 dW is the gradient of BP exactly. A regulariser,
``lambda sum ((W W^T) o (1 - I))^2``, keeps W near orthogonal. ``gamma^{-(L-l)}`` multiplies rounding by as much: this
page is as the paper has it and needs float64; the package carries the scaled difference ``t - y`` from the start.

    python -m examples.gait
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.common import Result, step_weights, train

SLOPE, CLASSES = 0.1, 10


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """``mean_batch 1/2 |y_L - onehot|^2``."""
    return 0.5 * (outputs - F.one_hot(labels, CLASSES)).square().sum() / len(labels)


class GAITProp:
    """Square weights, orthogonal at first, and settings."""

    def __init__(
        self, units: int = 64, stages: int = 4, gamma: float = 1e-3, orthogonality: float = 0.1, lr: float = 1e-3
    ) -> None:
        self.weights = [
            nn.init.orthogonal_(torch.empty(units, units, dtype=torch.float64)).requires_grad_() for _ in range(stages)
        ]
        self.gamma, self.orthogonality = gamma, orthogonality
        self.optimizer = torch.optim.Adam(self.weights, lr=lr, betas=(0.9, 0.99))

    def run(self, images: Tensor) -> list[Tensor]:
        """Return ``y_0 .. y_L``."""
        outputs = [images.flatten(1)]
        for W in self.weights:
            outputs.append(F.leaky_relu(outputs[-1] @ W.t(), SLOPE))
        return outputs

    def logits(self, images: Tensor) -> Tensor:
        """Return the first units of ``y_L``."""
        return self.run(images)[-1][:, :CLASSES]

    @torch.no_grad()
    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return ``dW_1 .. dW_L``."""
        outputs = self.run(images)
        target = outputs[-1].clone()
        target[:, :CLASSES] = F.one_hot(labels, CLASSES).to(target)  # spare units stay as they are
        found: list[Tensor] = []
        for above, W in enumerate(reversed(self.weights)):
            y, below = outputs[-1 - above], outputs[-2 - above]
            # in float64 throughout: a slope rounded to float32 is enough to spoil the lower stages
            slope = 1 - (1 - SLOPE) * (y <= 0).to(y)
            error = self.gamma**-above * (y - target) * slope
            found.insert(0, error.t() @ below / len(images))
            near = (1 - self.gamma * slope**2) * y + self.gamma * slope**2 * target
            target = torch.linalg.solve(W, F.leaky_relu(near, 1 / SLOPE).t()).t()
        return found

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train the weights by ``dW`` and the gradient of the regulariser."""
        gradients = self.gradients(images, labels)
        for gradient, W in zip(gradients, self.weights, strict=True):
            products = (W @ W.t()).detach()
            gradient += self.orthogonality * 4 * (products - products.diag().diag()) @ W.detach()
        step_weights(self.optimizer, self.weights, gradients)


def main(epochs: int = 10) -> Result:
    """Train, and print the result."""
    torch.manual_seed(0)
    return train(GAITProp(), epochs, loss=squared_error)


if __name__ == "__main__":
    main()
