"""A stage of any geometry for `plain.PlainLearner`, of which `plain.PlainStage` knows one."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bioprop.networks import ConvStage, Mirror, Stage
from tests.algorithms.plain import unpool


class GeneralStage(NamedTuple):
    """Weights and geometry; no bias where it is None."""

    weight: Tensor
    bias: Tensor
    feedback: Tensor
    feedback_bias: Tensor
    input_shape: tuple[int, ...]
    activation: str
    stride: int
    padding: int
    pool: tuple[int, int, int] | None

    @property
    def is_output(self) -> bool:
        return self.activation == "identity"

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.weight.dim() == 2:
            return self.rho(inputs.flatten(1) @ self.weight.t() + self.bias), None
        maps = self.rho(F.conv2d(inputs, self.weight, self.bias, self.stride, self.padding))
        return F.max_pool2d(maps, *self.pool, return_indices=True) if self.pool else (maps, None)

    @property
    def geometry(self) -> tuple[int, int, tuple[int, int, int] | None]:
        return self.stride, self.padding, self.pool

    def features(self, values: Tensor, switches: Tensor | None, form: str) -> Tensor:
        if form == "paper":
            return self.phi(self.put_back(values, switches, adding=False), form)
        return self.put_back(self.phi(values, form), switches)

    def put_back(self, values: Tensor, switches: Tensor | None, adding: bool = True) -> Tensor:
        if switches is None:
            return values
        sizes = [side + 2 * self.padding - self.weight.shape[2] for side in self.input_shape[1:]]
        return unpool(values, switches, tuple(size // self.stride + 1 for size in sizes), adding)

    def back(self, values: Tensor, switches: Tensor | None, form: str) -> Tensor:
        values = self.features(values, switches, form)
        if self.weight.dim() == 2:
            return (values @ self.feedback + self.feedback_bias).reshape(-1, *self.input_shape)
        (height, width), kernel = self.input_shape[1:], self.weight.shape[2]
        padded = [side + 2 * self.padding for side in (height, width)]
        image = values.new_zeros(len(values), self.input_shape[0], *padded)
        for row in range(values.shape[2]):
            for column in range(values.shape[3]):
                patch = torch.einsum("no,oihw->nihw", values[:, :, row, column], self.feedback)
                top, left = row * self.stride, column * self.stride
                around = (left, padded[1] - left - kernel, top, padded[0] - top - kernel)
                image = image + F.pad(patch, around)
        p = self.padding
        return image[:, :, p : p + height, p : p + width] + self.feedback_bias.view(-1, 1, 1)

    def rho(self, values: Tensor) -> Tensor:
        if self.activation == "leaky_relu":
            return torch.where(values > 0, values, values * 0.01)
        if self.activation == "elu":
            return torch.where(values > 0, values, values.clamp(max=0).exp() - 1)
        return {"relu": values.clamp(min=0), "tanh": values.tanh(), "identity": values}[self.activation]

    def phi(self, values: Tensor, form: str) -> Tensor:
        if form == "paper" or self.activation not in ("elu", "tanh"):
            return self.rho(values)
        if self.activation == "tanh":
            inside = values.clamp(-1, 1)
            return inside - inside**3 / 3
        low = values.clamp(-1, 0)
        return torch.where(values > 0, values, low + low**2 / 2)


def general_stage(stage: Stage, mirror: Mirror | None) -> GeneralStage:
    """Copy the weights of a stage with biases, and those of its mirror if it has one."""
    none = [torch.zeros(0, dtype=torch.float64)] * 2
    feedback = none if mirror is None else [mirror.weight, mirror.bias]
    weights = [tensor.detach().clone() for tensor in (stage.weight, stage.bias, *feedback)]
    stride, padding, pool = 1, 0, None
    if isinstance(stage, ConvStage):
        (stride, _), (padding, _), pool = stage.conv.stride, stage.conv.padding, stage.pool
    return GeneralStage(*weights, tuple(stage.input_shape), stage.activation, stride, padding, pool)
