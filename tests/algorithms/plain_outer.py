"""Stages of the plain implementation whose feedback has its activation outside: ``G(y) = psi(V^T P^T y + c)``."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from tests.algorithms.plain import PlainStage, unpool

Activation = Callable[[Tensor], Tensor]


class OuterStage(PlainStage):
    """A stage whose ``psi`` is set on the class: the fields of a named tuple are fixed."""

    psi: Activation

    def back(self, values: Tensor, switches: Tensor | None, form: str) -> Tensor:
        if switches is None:
            return type(self).psi(values @ self.feedback + self.feedback_bias).reshape(-1, *self.input_shape)
        size = (self.input_shape[1], self.input_shape[2])
        maps = unpool(values, switches, size, adding=True)
        return type(self).psi(F.conv_transpose2d(maps, self.feedback, self.feedback_bias, padding=2))


def outer_stage(stage: PlainStage, psi: Activation) -> PlainStage:
    return type("OuterStage", (OuterStage,), {"psi": staticmethod(psi)})(*stage)
