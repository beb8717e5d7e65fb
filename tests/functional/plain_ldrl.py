"""The L-DRL loss of one stage as the formula has it, from its own activations, on plain torch layers with autograd."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.functional.pool_windows import ConvGeometry

Function = Callable[[Tensor], Tensor]


def elu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x.clamp(max=0).exp() - 1)


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def leaky_relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, x / 100)


def identity(x: Tensor) -> Tensor:
    return x


def elu_feedback(y: Tensor) -> Tensor:
    return torch.where(y > 0, y, torch.where(y < -1, -0.5, y + y**2 / 2))


def tanh_feedback(y: Tensor) -> Tensor:
    return torch.where(y.abs() > 1, y.sign() * 2 / 3, y - y**3 / 3)


PLAIN: dict[tuple[str, str], tuple[Function, Function]] = {
    (name, form): (rho, rho if form == "paper" else phi)
    for name, rho, phi in (
        ("elu", elu, elu_feedback),
        ("relu", relu, relu),
        ("leaky_relu", leaky_relu, leaky_relu),
        ("tanh", torch.tanh, tanh_feedback),
        ("identity", identity, identity),
    )
    for form in ("paper", "exact")
}


def by_matrix(layer: Function, inputs: Tensor) -> Tensor:
    """Apply a linear layer as the matrix that it is; in double precision torch's own convolutions are slow."""
    size = inputs[0].numel()
    units = layer(torch.eye(size, dtype=inputs.dtype).view(size, *inputs.shape[1:]))
    return (inputs.flatten(1) @ units.flatten(1)).view(-1, *units.shape[1:])


class PlainStage(NamedTuple):
    """A stage, its mirror's weight and a batch of inputs; linear where the weight has two dimensions."""

    weight: Tensor
    bias: Tensor
    feedback: Tensor
    inputs: Tensor
    activation: str
    form: str
    geometry: ConvGeometry

    def affine(self, inputs: Tensor) -> Tensor:
        if self.weight.dim() == 2:
            return inputs @ self.weight.T + self.bias
        stride, padding = self.geometry.stride, self.geometry.padding
        maps = by_matrix(lambda x: F.conv2d(x, self.weight, None, stride, padding), inputs)
        return maps + self.bias.view(-1, 1, 1)

    def run(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Output and switches."""
        maps = PLAIN[self.activation, self.form][0](self.affine(inputs))
        if self.geometry.pool == (1, 1, 0):
            return maps, None
        return F.max_pool2d(maps, *self.geometry.pool, return_indices=True)

    def features(self, y: Tensor, switches: Tensor | None) -> Tensor:
        """Unpooled ``phi(y)``; the forms differ in the order, and in what they do where windows overlap."""
        phi = PLAIN[self.activation, self.form][1]
        if switches is None:
            return phi(y)
        maps = y.new_zeros(*y.shape[:2], self.geometry.map_size[0] * self.geometry.map_size[1])
        if self.form == "paper":
            maps = phi(maps.scatter(2, switches.flatten(2), y.flatten(2)))
        else:
            maps = maps.scatter_add(2, switches.flatten(2), phi(y).flatten(2))
        return maps.view(*y.shape[:2], *self.geometry.map_size)

    def back(self, features: Tensor, feedback: Tensor) -> Tensor:
        if feedback.dim() == 2:
            return features @ feedback
        (height, width), stride, padding = self.geometry.input_size, self.geometry.stride, self.geometry.padding
        side = feedback.shape[-1]
        left = [
            size - ((maps - 1) * stride - 2 * padding + side)
            for size, maps in zip((height, width), features.shape[2:], strict=True)
        ]
        return by_matrix(lambda x: F.conv_transpose2d(x, feedback, None, stride, padding, left), features)

    def sample(self, sigma: float, clean_switches: bool, copies: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient, loss, and mean squared changes of features by unit, on noise for ``copies`` of the batch."""
        inputs = self.inputs.repeat(copies, *[1] * (self.inputs.dim() - 1))
        y, switches = self.run(inputs)
        eps, eta = sigma * torch.randn_like(inputs), sigma * torch.randn_like(y)
        noisy, noisy_switches = self.run(inputs + eps)
        noisy_features = self.features(noisy, switches if clean_switches else noisy_switches)
        V = self.feedback.clone().requires_grad_()
        clean = self.back(self.features(y, switches), V)
        first = eps * (self.back(noisy_features, V) - clean)
        second = (self.back(self.features(y + eta, switches), V) - clean) ** 2
        loss = (second - 2 * first).flatten(1).sum(1).mean()
        (gradient,) = torch.autograd.grad(loss, V)
        phi = PLAIN[self.activation, self.form][1]
        change = (phi(y + eta) - phi(y)).square().flatten(2) if y.dim() > 2 else (phi(y + eta) - phi(y))[..., None] ** 2
        return gradient, loss.detach(), 2 * change.sum(2).mean(0)
