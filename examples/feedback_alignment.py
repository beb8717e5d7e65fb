"""Feedback alignment: backpropagation with another matrix B in place of each W on the way back.

A layer computes ``a = W x``. Of the error ``e = dL/da`` that reaches it, BP makes ``dW = e x^T`` and sends ``W^T e``
down. Here dW is formed likewise, but ``B^T e`` is sent down. The rules differ in what B is:

- ``fa``: fixed and random; W comes to align with it (Lillicrap et al., 2016).
- ``usf``: ``s sign(W)``, s the size of W's entries at the start (Liao et al., 2016; Moskovitz et al., 2018).
- ``frsf``: ``|M| o sign(W)``, M drawn once (Moskovitz et al., 2018).
- ``brsf``: the same, M drawn again for every batch (ibid.).
- ``kolen_pollack``: learned: B takes the same steps as W, and both shrink by the same fraction in every batch, so that
  ``W - B`` shrinks by it (Kolen & Pollack, 1994; Akrout et al., 2019).
- ``weight_mirror``: learned: B moves towards ``mean f(W x) x^T`` over noise x, which is proportional to W row by row;
  its norm is held (Akrout et al., 2019; as a moving average: ours).

    python -m examples.feedback_alignment
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common import WIDTHS, Result, draw, step_weights, train

RULES = ("fa", "usf", "frsf", "brsf", "kolen_pollack", "weight_mirror")


class Asymmetric(torch.autograd.Function):
    """``x W^T`` for x ``[batch, inputs]``, with B in place of W for the error that goes on to x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, B: Tensor) -> Tensor:
        """Compute ``x W^T``."""
        ctx.save_for_backward(x, B)
        return x @ W.t()

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the error of x, the gradient of W, and none for B."""
        x, B = ctx.saved_tensors
        return e @ B, e.t() @ x, None


class FeedbackAlignment:
    """Weights, what B is made of for each layer above the first, and settings."""

    def __init__(
        self,
        rule: str = "fa",
        widths: tuple[int, ...] = WIDTHS,
        lr: float = 0.02,
        decay: float = 1e-3,
        mirror_rate: float = 0.1,
        mirror_samples: int = 128,
    ) -> None:
        self.rule, self.decay, self.mirror_rate, self.mirror_samples = rule, decay, mirror_rate, mirror_samples
        self.weights = [draw(*shape).requires_grad_() for shape in zip(widths[1:], widths[:-1], strict=True)]
        sizes = [W.detach().square().mean().sqrt() for W in self.weights[1:]]
        self.stored = [size * torch.randn_like(W) for size, W in zip(sizes, self.weights[1:], strict=True)]
        if rule == "usf":
            self.stored = sizes
        self.optimizer = torch.optim.SGD(self.weights, lr=lr, momentum=0.9)
        self.feedback_optimizer = torch.optim.SGD(self.stored, lr=lr, momentum=0.9)

    def backward_matrix(self, W: Tensor, stored: Tensor) -> Tensor:
        """Return ``B``, in the layout of W, ``[units, inputs]``."""
        return stored.abs() * W.detach().sign() if self.rule in ("usf", "frsf", "brsf") else stored

    def logits(self, images: Tensor, matrices: list[Tensor] | None = None) -> Tensor:
        """Return ``s^N``; on the way back ``matrices`` stand in for W above the first layer, or W itself if None."""
        state = images.flatten(1) @ self.weights[0].t()
        for W, B in zip(self.weights[1:], matrices or self.weights[1:], strict=True):
            state = Asymmetric.apply(torch.tanh(state), W, B)
        return state

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Renew B where the rule does, then train W, and B by the same steps for ``kolen_pollack``."""
        self.train_feedback()
        gradients = self.gradients(images, labels)
        if self.rule == "kolen_pollack":
            with torch.no_grad():
                for weight in (*self.weights[1:], *self.stored):
                    weight *= 1 - self.decay
            step_weights(self.feedback_optimizer, self.stored, gradients[1:])
        step_weights(self.optimizer, self.weights, gradients)

    @torch.no_grad()
    def train_feedback(self) -> None:
        """Draw magnitudes again for ``brsf``, look at noise for ``weight_mirror``; keep the norm of what is stored."""
        for W, stored in zip(self.weights[1:], self.stored, strict=True):
            norm = stored.norm()
            if self.rule == "brsf":
                stored.normal_()
            elif self.rule == "weight_mirror":
                noise = torch.randn(self.mirror_samples, W.shape[1], dtype=W.dtype)
                seen = F.relu(noise @ W.t()).t() @ noise
                stored.lerp_(seen * norm / seen.norm(), self.mirror_rate)
            stored *= norm / stored.norm()

    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Return what the altered backward pass leaves at W."""
        matrices = [self.backward_matrix(*pair) for pair in zip(self.weights[1:], self.stored, strict=True)]
        return list(torch.autograd.grad(F.cross_entropy(self.logits(images, matrices), labels), self.weights))


def main(epochs: int = 10, rules: tuple[str, ...] = RULES) -> dict[str, Result]:
    """Train by each rule, and print the results."""
    results = {}
    for rule in rules:
        torch.manual_seed(0)
        print(rule, end=": ")  # noqa: T201
        results[rule] = train(FeedbackAlignment(rule), epochs)
    return results


if __name__ == "__main__":
    main()
