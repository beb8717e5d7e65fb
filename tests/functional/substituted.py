"""Models in plain autograd whose errors are carried by other matrices, by substitution in the graph.

``f(x, W)`` becomes ``f(stop(x), W) + [f(x, B) - stop(f(x, B))]``: the value and the gradient of ``W`` are those of the
first term, the gradient of ``x`` that of the second.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn

Run = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def substituted(run: Run, backward: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shadow = run(inputs, backward.detach(), None)
    return run(inputs.detach(), weight, bias) + (shadow - shadow.detach())


def run_layer(layer: nn.Linear | nn.Conv2d) -> Run:
    return nn.functional.linear if isinstance(layer, nn.Linear) else layer._conv_forward


def with_backward_matrices(model: nn.Module, matrices: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model in which each named layer sends its error through another matrix."""
    twin = copy.deepcopy(model)
    for name, matrix in matrices.items():
        layer = twin.get_submodule(name)
        layer.forward = partial(forward, layer, matrix.detach().clone())
    return twin


def forward(layer: nn.Linear | nn.Conv2d, matrix: Tensor, inputs: Tensor) -> Tensor:
    return substituted(run_layer(layer), matrix, inputs, layer.weight, layer.bias)
