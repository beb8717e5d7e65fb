"""L-DRL: feedback weights learn to carry the gradient, layer by layer (Ernoult et al., ICML 2022).

Stages ``s^n = F^n(s^{n-1})``, n = 1..N, with weights W; feedback operators ``G^n`` from the space of s^n to that of
s^{n-1}, n = 2..N, with weights V of their own. On every batch:

1. Feedback, for each n >= 2 and some iterations: draw ``eps ~ N(0, sigma^2)`` like s^{n-1}, take a second noise ``eta``
   like s^n, and descend in V
       mean_batch[ -2 <eps, G(F(s^{n-1} + eps)) - G(s^n)> + |G(s^n + eta) - G(s^n)|^2 ].
   To first order this is ``sigma^2 (|J_G - J_F^T|^2 - |J_F|^2)`` in the Jacobians: least where ``J_G = J_F^T``.
2. Targets: ``t^N = s^N - beta dL/ds^N``, then ``t^{n-1} = s^{n-1} + G^n(t^n) - G^n(s^n)`` for n = N..2.
3. Forward: one step on ``sum_n mean_batch 1/2 |F^n(s^{n-1}) - t^n|^2``, every s^{n-1} and t^n held constant.
   Where ``J_G = J_F^T``, its gradient over beta tends to that of BP as beta -> 0.

The published ``eta`` is a draw of its own (`ldrl_published.py`). Here it is an echo: what G itself answers to eps,
``eta = J_G(s^n)^T eps``, held constant. The mean gradient is the same to first order, and its noise vanishes where
``J_G = J_F^T``: two iterations do what takes the published rule dozens. G never reads W, but the echo needs V upwards,
which no local rule has. The step on V is normalised least mean squares (Widrow & Hoff, 1960): nothing is to be tuned.

    python -m examples.ldrl
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.common import Result, draw, output_error, step_weights, train


def stage(s: Tensor, W: Tensor) -> tuple[Tensor, Tensor | None]:
    """``F(s)`` and the switches of its pooling: conv -> ELU -> max-pool, or the linear output stage."""
    if W.dim() == 2:
        return s.flatten(1) @ W.t(), None
    return F.max_pool2d(F.elu(F.conv2d(s, W, padding=1)), 2, return_indices=True)


def mirror(y: Tensor, switches: Tensor | None, V: Tensor, shape: torch.Size) -> Tensor:
    """``G(y)``, in the shape of the stage's input: phi -> unpool -> transposed layer; with V = W, ``J_G = J_F^T``."""
    if switches is None:
        return (y @ V).view(shape)
    below = y.clamp(-1, 0)
    phi = y.clamp_min(0) + below + below**2 / 2  # its slope at y = elu(a) is that of ELU at a: 1 + y below zero
    return F.conv_transpose2d(F.max_unpool2d(phi, switches, (2, 2)), V, padding=1)


class LDRL:
    """Weights, feedback weights and settings; ``noise`` is a share of the root mean square of a stage's inputs."""

    def __init__(
        self,
        channels: tuple[int, int] = (16, 32),
        beta: float = 0.05,
        noise: float = 0.01,
        iterations: int = 2,
        lr: float = 0.02,
        normals: Callable[[Tensor], Tensor] = torch.randn_like,
    ) -> None:
        shapes = [(channels[0], 1, 3, 3), (channels[1], channels[0], 3, 3), (10, channels[1] * 4)]
        self.weights = [draw(*shape).requires_grad_() for shape in shapes]
        self.feedback = [draw(*shape) for shape in shapes]  # the first is never used: G^1 would lead to the images
        self.beta, self.noise, self.iterations, self.normals = beta, noise, iterations, normals
        self.optimizer = torch.optim.SGD(self.weights, lr=lr, momentum=0.9)

    def logits(self, images: Tensor) -> Tensor:
        """Return ``s^N``."""
        for W in self.weights:
            images, _ = stage(images, W)
        return images

    @torch.no_grad()
    def run(self, images: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
        """Return ``s^0 .. s^N`` and the switches of stages 1..N."""
        states, switches = [images], []
        for W in self.weights:
            output, chosen = stage(states[-1], W)
            states.append(output)
            switches.append(chosen)
        return states, switches

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Train the feedback weights, then the forward weights."""
        self.train_feedback(images)
        step_weights(self.optimizer, self.weights, self.gradients(images, labels))

    def train_feedback(self, images: Tensor) -> None:
        """Phase 1."""
        states, switches = self.run(images)
        for n in range(1, len(self.weights)):
            s, y, V = states[n], states[n + 1], self.feedback[n]
            sigma = self.noise * s.square().mean().sqrt()
            slope = torch.where(y > 0, 1.0, 1.0 + y) if y.dim() == 4 else torch.ones_like(y)
            # of the loss, for each unit; and that of one sample along its own noise, so that no step overshoots
            curvature = slope.square().transpose(0, 1).flatten(1).sum(1) / len(s)
            curvature = 2 * sigma**2 * (curvature + V[0].numel() / len(s)).view(-1, *[1] * (V.dim() - 1))
            for _ in range(self.iterations):
                V -= self.feedback_gradient(n, s, y, switches[n], sigma * self.normals(s)) / curvature

    def feedback_gradient(self, n: int, s: Tensor, y: Tensor, switches: Tensor | None, eps: Tensor) -> Tensor:
        """Gradient of ``-2 <eps, G(F(s + eps)) - G(y + eta)>`` in V, with the echo for eta."""
        noisy, V, leaf = stage(s + eps, self.weights[n])[0].detach(), self.feedback[n].clone(), y.clone()
        V.requires_grad_()
        leaf.requires_grad_()
        (eta,) = torch.autograd.grad(mirror(leaf, switches, V, s.shape), leaf, eps)
        change = mirror(noisy, switches, V, s.shape) - mirror(y + eta, switches, V, s.shape)
        return torch.autograd.grad(-2 * (eps * change).sum() / len(s), V)[0]

    def gradients(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """Phases 2 and 3: the gradient of the local losses over beta."""
        states, switches = self.run(images)
        targets = [states[-1] - self.beta * output_error(states[-1], labels)]
        for n in range(len(self.weights) - 1, 0, -1):
            at_target, at_output = (
                mirror(y, switches[n], self.feedback[n], states[n].shape) for y in (targets[0], states[n + 1])
            )
            targets.insert(0, states[n] + at_target - at_output)
        stages = zip(states[:-1], self.weights, targets, strict=True)
        losses = [0.5 * (stage(s, W)[0] - t).square().sum() / len(images) for s, W, t in stages]
        return [gradient / self.beta for gradient in torch.autograd.grad(losses, self.weights)]


def main(epochs: int = 10) -> Result:
    """Train, and print the result."""
    torch.manual_seed(0)
    return train(LDRL(), epochs)


if __name__ == "__main__":
    main()
